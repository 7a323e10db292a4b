"""What is decided for a model under a policy, why, and what planning knows of dtypes before anything runs."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxamp
from fxamp.dtypes import abbreviate
from fxamp.plan import NOT_A_TENSOR, UNKNOWN, Decision, Flow, PrecisionPlan, Tensors, Value, make_plan, tensors_in
from fxamp.plan.observer import FakeObserver
from fxamp.policy import POLICY_NAMES
from tests.helpers import assert_same, graph_text
from tests.zoo import BASIC as ZOO

LOW = (torch.bfloat16, torch.float16)
CALLS = ("placeholder", "get_attr", "output")


def calls(plan: PrecisionPlan) -> list[Decision]:
    return [decision for decision in plan if decision.op not in CALLS]


def shown(plan: PrecisionPlan) -> list[str]:
    """One line a call: op, rule, how many casts, output, reason."""
    return [
        f"{d.op} {d.rule or '-'} {len(d.casts)} {'/'.join(_short(v) for v in tensors_in(d.output))} {d.reason}"
        for d in calls(plan)
    ]


def _short(value: Value) -> str:
    return "?" if value.dtype is None else abbreviate(value.dtype)


# -- decisions with reasons ------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Every rule on both devices, a region, a write, a cast of the user's and a call that stays one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.rnn = nn.Linear(4, 4), nn.LayerNorm(4), nn.GRU(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.fc(x))
        x = torch.cat([x, x.exp()])
        x.mul_(2)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            y = torch.mm(x.float(), x.float().t())
        x, _ = self.rnn(y[:, :4])
        return F.mse_loss(x, x.double().softmax(-1))


DECISIONS = {
    ("autocast", "cpu"): """
        F.linear lower 3 f16 op table
        F.layer_norm follow 0 f16 input dtype
        Tensor.exp follow 0 f16 input dtype
        torch.cat promote 0 f16 op table
        Tensor.mul_ follow 0 f16 in-place
        Tensor.float follow 0 f32 region enabled=False
        Tensor.float follow 0 f32 region enabled=False
        Tensor.t follow 0 f32 region enabled=False
        torch.mm follow 0 f32 region enabled=False
        operator.getitem follow 0 f32 input dtype
        nn.GRU opaque 0 ? module runs as a whole
        operator.getitem follow 0 ? input dtype
        operator.getitem follow 0 ? input dtype
        Tensor.double follow 0 f64 input dtype
        Tensor.softmax follow 0 f64 input dtype
        F.mse_loss fp32 1 ? op table
    """,
    ("autocast", "cuda"): """
        F.linear lower 3 f16 op table
        F.layer_norm fp32 1 f32 op table
        Tensor.exp fp32 0 f32 op table
        torch.cat follow 0 f32 input dtype
        Tensor.mul_ follow 0 f32 in-place
        Tensor.float follow 0 f32 region enabled=False
        Tensor.float follow 0 f32 region enabled=False
        Tensor.t follow 0 f32 region enabled=False
        torch.mm follow 0 f32 region enabled=False
        operator.getitem follow 0 f32 input dtype
        nn.GRU opaque 0 ? module runs as a whole
        operator.getitem follow 0 ? input dtype
        operator.getitem follow 0 ? input dtype
        Tensor.double follow 0 f64 input dtype
        Tensor.softmax fp32 0 f64 op table
        F.mse_loss fp32 1 ? op table
    """,
    ("full", "cpu"): """
        F.linear follow 0 ? policy full
        F.layer_norm follow 0 ? policy full
        Tensor.exp follow 0 ? policy full
        torch.cat follow 0 ? policy full
        Tensor.mul_ follow 0 ? in-place
        Tensor.float follow 0 f32 region enabled=False
        Tensor.float follow 0 f32 region enabled=False
        Tensor.t follow 0 f32 region enabled=False
        torch.mm follow 0 f32 region enabled=False
        operator.getitem follow 0 f32 policy full
        nn.GRU follow 0 ? policy full
        operator.getitem follow 0 ? policy full
        operator.getitem follow 0 ? policy full
        Tensor.double follow 0 f64 policy full
        Tensor.softmax follow 0 f64 policy full
        F.mse_loss follow 0 ? policy full
    """,
}


@pytest.mark.parametrize(("policy", "device_type"), DECISIONS)
def test_decisions_and_reasons(policy: str, device_type: str) -> None:
    amp = fxamp.convert(Mixed(), dtype=torch.float16, device_type=device_type, policy=policy)
    assert shown(amp.plan) == [line.strip() for line in DECISIONS[policy, device_type].strip().splitlines()]


def test_a_decision_says_where_and_in_words() -> None:
    amp = fxamp.convert(Mixed(), dtype=torch.float16, device_type="cuda")
    decision = amp.plan["linear"]
    assert (decision.module, decision.aten, decision.runs_in) == ("fc", "linear", torch.float16)
    assert str(decision) == (
        "linear: F.linear lower in f16 (op table), casts x to f16, casts fc_weight to f16, casts fc_bias to f16"
    )
    assert str(amp.plan["x"]) == "x: placeholder has no rule (model input)"
    assert [decision.name for decision in amp.plan] == [
        n.name for n in amp.graph.nodes if "cast" not in n.meta and not n.meta.get("module_of")
    ]
    assert len(amp.plan) == len(list(amp.plan))


# -- laws of planning ------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """What ``make_plan`` is given for one graph of a converted model."""

    amp: fxamp.AmpModule
    examples: list[Any]

    def plan(self, *, exact: bool, mode: str = "train") -> PrecisionPlan:
        conversion = self.amp._conversion
        graph, program, policy = conversion.base.traced.graph, conversion.program, self.amp.policy
        rulings = policy.module_rulings(path for path, _ in program.whole.named_modules())
        device_type = self.amp.policy.device_type or "cpu"
        observer = FakeObserver(program.attribute, graph, self.examples, device_type) if exact else None
        return make_plan(graph, program.attribute, policy, rulings, mode=mode, observer=observer)


@functools.cache
def converted(name: str, device_type: str, policy: str) -> Planned:
    case = ZOO[name]
    torch.manual_seed(0)
    inputs = (*case.inputs(), *case.loss_args())
    amp = fxamp.convert(
        case.make(), case.loss, example_inputs=(inputs, dict(case.kwargs)),
        dtype=torch.bfloat16, device_type=device_type, policy=policy,
    )  # fmt: skip
    examples = amp._conversion.examples
    assert examples is not None
    return Planned(amp, examples)


COMBINATIONS = [
    (name, device_type, policy)
    for name in ZOO
    for device_type in ("cpu", "cuda")
    for policy in POLICY_NAMES
    # binary_cross_entropy is refused there.
    if (name, device_type) != ("autoencoder", "cuda") or policy == "full"
]


@pytest.mark.parametrize(("name", "device_type", "policy"), COMBINATIONS)
def test_planning_twice_gives_equal_plans_and_changes_nothing(name: str, device_type: str, policy: str) -> None:
    planned = converted(name, device_type, policy)
    graph = planned.amp._conversion.base.traced.graph
    text, meta = graph_text(graph), [dict(node.meta) for node in graph.nodes]
    state = {k: (id(t), t._version, t.clone()) for k, t in planned.amp.state_dict(keep_vars=True).items()}
    drawn = torch.get_rng_state(), random.getstate()
    for exact in (True, False):
        assert planned.plan(exact=exact) == planned.plan(exact=exact)
    assert planned.plan(exact=True) == planned.amp.plan
    assert graph_text(graph) == text
    assert [dict(node.meta) for node in graph.nodes] == meta
    assert (torch.equal(torch.get_rng_state(), drawn[0]), random.getstate()) == (True, drawn[1])
    for key, tensor in planned.amp.state_dict(keep_vars=True).items():
        same, version, bits = state[key]
        assert (id(tensor), tensor._version) == (same, version), key
        assert torch.equal(tensor, bits), key


def dtype_fits(derived: Flow, exact: Flow) -> bool:
    """Whether what was derived by rule is unknown or what it really is."""
    if isinstance(derived, Value):
        return derived == UNKNOWN or derived.dtype is None or (
            isinstance(exact, Value) and derived.dtype == exact.dtype
        )  # fmt: skip
    if isinstance(derived, Tensors):
        return isinstance(exact, tuple) and all(dtype_fits(derived.each, item) for item in exact)
    if isinstance(derived, tuple):
        return isinstance(exact, tuple) and len(exact) == len(derived) and all(map(dtype_fits, derived, exact))
    return derived == exact == NOT_A_TENSOR


# Without shapes "fast" may decide otherwise; what it derives is tested by running it, in test_placement.
@pytest.mark.parametrize(("name", "device_type", "policy"), [c for c in COMBINATIONS if c[2] != "fast"])
def test_a_dtype_derived_by_rule_is_the_exact_one(name: str, device_type: str, policy: str) -> None:
    planned = converted(name, device_type, policy)
    for derived, exact in zip(planned.plan(exact=False), planned.plan(exact=True), strict=True):
        assert derived.name == exact.name
        assert dtype_fits(derived.output, exact.output), f"{derived}: {derived.output}, it is {exact.output}"


@pytest.mark.parametrize("name", ZOO)
def test_an_exact_dtype_is_what_comes_out(name: str) -> None:
    """The model's outputs have the dtypes that the plan says, and nothing is unknown but what is opaque."""
    planned, case = converted(name, "cpu", "autocast"), ZOO[name]
    torch.manual_seed(0)
    outputs = planned.amp(*case.inputs(), *case.loss_args(), **case.kwargs)
    told = [v for flow in planned.amp.plan["output"].inputs for v in tensors_in(flow)]
    found = [t.dtype for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]
    assert [value.dtype for value in told] == found


def derived_and_run(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[torch.dtype | None, Tensor, Tensor]:
    """The dtype the plan derives for the last call, what it gives, and what eager autocast gives."""
    amp = fxamp.convert(function, dtype=torch.bfloat16, device_type="cpu")
    *_, last = calls(amp.plan)
    assert isinstance(last.output, Value)
    with torch.autocast("cpu", torch.bfloat16):
        expected = function(*inputs)
    return last.output.dtype, amp(*inputs), expected


SCALARS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse_loss": lambda low, x: F.mse_loss(low, x),
    "l1_loss": lambda low, x: F.l1_loss(low, x),
    "smooth_l1_loss": lambda low, x: F.smooth_l1_loss(low, x),
    "cross_entropy": lambda low, x: F.cross_entropy(low, x.argmax(-1)),
    "kl_div": lambda low, x: F.kl_div(low, x.abs(), reduction="sum"),
    "logsumexp": lambda low, x: torch.logsumexp(F.linear(x, x).float(), (0, 1)),
    "linear of vectors": lambda low, x: F.linear(x[0], x[1]).float(),
}
RIGHT_SCALARS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda low, x: F.linear(x, x).float().mean(),
    "huber_loss": lambda low, x: F.huber_loss(low, x),
    "nll_loss": lambda low, x: F.nll_loss(low, x.argmax(-1)),
    "binary_cross_entropy_with_logits": lambda low, x: F.binary_cross_entropy_with_logits(low, x.abs()),
    "dist": lambda low, x: torch.dist(low.float(), x),
    "inner": lambda low, x: torch.inner(low[0].float(), x[0]),
    "dot": lambda low, x: torch.dot(low[0].float(), x[0]),
    "sum": lambda low, x: low.float().sum(),
    "amax": lambda low, x: low.float().amax((0, 1)),
    "norm": lambda low, x: torch.linalg.vector_norm(low.float()),
    "item of a row": lambda low, x: low.float()[0][0],
    "a new tensor": lambda low, x: torch.tensor(2.0),
    "zeros": lambda low, x: torch.zeros(()) + 2,
}


@pytest.mark.parametrize("name", [*SCALARS, *RIGHT_SCALARS])
def test_a_result_without_dimensions_does_not_promote(name: str) -> None:
    scalar = (SCALARS | RIGHT_SCALARS)[name]
    x = torch.randn(4, 4)

    def scaled(x: Tensor) -> Tensor:
        low = F.linear(x, x)
        return low * scalar(low, x)

    def cast_again(x: Tensor) -> Tensor:
        return torch.prod(scaled(x))  # float32 by the table, whatever comes in

    dtype, found, expected = derived_and_run(scaled, x)
    assert_same(found, expected)
    assert dtype in (None, expected.dtype)
    assert_same(*derived_and_run(cast_again, x)[1:])


class Scaled(nn.Module):
    """A scale without dimensions, spread out before it is used."""

    def __init__(self, spread: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.spread = spread

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x * self.spread(self.scale, x))


@pytest.mark.parametrize(
    "spread",
    [
        pytest.param(lambda scale, x: scale.expand_as(x), id="expand_as"),
        pytest.param(lambda scale, x: scale.repeat(4), id="repeat"),
        pytest.param(lambda scale, x: scale.masked_fill(x > 0, 2), id="masked_fill"),
        pytest.param(lambda scale, x: scale, id="as it is"),
        pytest.param(lambda scale, x: scale.expand(4), id="expand"),
        pytest.param(lambda scale, x: scale.unsqueeze(0), id="unsqueeze"),
        pytest.param(lambda scale, x: scale.view(1, 1), id="view"),
        pytest.param(lambda scale, x: scale.reshape(-1), id="reshape"),
        pytest.param(lambda scale, x: scale[None], id="index"),
        pytest.param(lambda scale, x: torch.stack([scale] * 4), id="stack"),
        pytest.param(lambda scale, x: torch.where(x > 0, scale, x.float()), id="where"),
    ],
)
def test_a_scale_without_dimensions(spread: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, x = Scaled(spread), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    assert_same(fxamp.convert(model, dtype=torch.bfloat16)(x), expected)
    assert_same(fxamp.convert(model, dtype=torch.bfloat16, example_inputs=(x,))(x), expected)


# -- what cannot be seen into ------------------------------------------------------------------------------


class Counting(nn.Module):
    """Stays one call, for it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.softmax(x, -1) * self.calls


def test_an_opaque_call_gives_what_autocast_of_its_device_gives() -> None:
    """On a GPU softmax gives float32, so the linear behind it needs a cast."""
    model = nn.Sequential(nn.Linear(4, 4), Counting(), nn.Linear(4, 4))
    amp = fxamp.convert(model, device_type="cuda", dtype=torch.bfloat16, example_inputs=(torch.zeros(4, 4),))
    assert (amp.plan["_1"].rule, amp.plan["linear_1"].rule) == ("opaque", "lower")
    assert amp.plan["_1"].output == Value(torch.float32, False, 2)
    assert "_1" in {cast.value for cast in amp.plan["linear_1"].casts}


@pytest.mark.parametrize(
    "examples",
    [
        None,
        pytest.param(
            (torch.zeros(4, 4),),
            marks=(),
        ),
    ],
    ids=["derived", "examples"],
)
def test_an_opaque_module_is_not_run_while_planning(examples: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Counting()), torch.randn(4, 4)
    amp = fxamp.convert(model, dtype=torch.bfloat16, example_inputs=examples)
    assert model[1].calls == 0
    assert getattr(amp, "1").calls == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(amp(x), model(x))


# -- torch's own lists of what autocast does ---------------------------------------------------------------


class Entry(NamedTuple):
    """One line of torch's lists: an operator, how it is called, and what autocast gives back."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rule: str
    output: torch.dtype


# cudnn_*: their kernels need a GPU, and the third item of their lines is no keyword arguments.
# einsum: its line is malformed, the arguments come third. equal: gives a bool of Python's, not a tensor.
# The last one is Python 2's division, which torch.fx does not know.
NOT_ONE_CALL = ("cudnn_convolution", "cudnn_convolution_transpose", "einsum", "equal", "__div__")
MODULES = {"torch": torch, "nn": torch._C._nn, "linalg": torch._C._linalg}
RULES = {"fp16": "lower", "16": "lower", "fp32": "fp32", "need_autocast_promote": "promote"}
BUILTIN = "expect_builtin_promote"


@functools.cache
def lists(device_type: str) -> dict[str, list[tuple[Any, ...]]]:
    """Attribute to lines. The module that defines them warns about what is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import autocast_test_lists as found
    kind = found.AutocastTestLists if device_type == "cuda" else found.AutocastCPUTestLists
    torch.manual_seed(0)
    return vars(kind(torch.device("cpu")))


def entry(device_type: str, attribute: str, index: int, dtype: torch.dtype) -> Entry:
    """A line of the lists, for one low dtype."""
    name, args, *rest = lists(device_type)[attribute][index]
    module, _, kind = attribute.partition("_")
    outputs = {"lower": dtype, "fp32": torch.float32, "promote": torch.float32}
    if device_type == "cpu" and kind in (BUILTIN, "need_autocast_promote"):
        args, rest = (args if dtype == torch.bfloat16 else rest[0]), rest[1:]
    rule = RULES.get(kind, "follow")
    if kind == BUILTIN and device_type == "cpu" and name in ("cat", "stack"):
        rule = "promote"
    output = rest[0] if kind == BUILTIN else outputs[rule]
    kwargs = rest[0] if rest and isinstance(rest[0], dict) else {}
    call = _method(name) if module == "methods" else getattr(MODULES[module], name)
    return Entry(call, args, kwargs, rule, output)


def _method(name: str) -> Callable[..., Any]:
    return lambda tensor, *args: getattr(tensor, name)(*args)


def one_call(found: Entry) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """A function of the entry's tensors that makes its one call."""
    leaves, spec = pytree.tree_flatten((found.args, found.kwargs))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def function(*given: Tensor) -> Any:
        rest = iter(given)
        args, kwargs = pytree.tree_unflatten(
            [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        )
        return found.call(*args, **kwargs)

    return function, tensors


def lines(device_type: str) -> list[Any]:
    """Every line that makes a function of one call."""
    found = []
    for attribute, entries in lists(device_type).items():
        for index, (name, *_) in enumerate(entries):
            if attribute != "banned" and name not in NOT_ONE_CALL:
                found.append(pytest.param(attribute, index, id=f"{attribute}-{index}-{name}"))
    return found


# torch deprecates what two of the lines call: chain_matmul, and cross without a dimension.
DEPRECATED = pytest.mark.filterwarnings(
    "ignore:torch.chain_matmul is deprecated", "ignore:Using torch.cross without specifying"
)


@DEPRECATED
@pytest.mark.parametrize("examples", [True, False], ids=["examples", "derived"])
@pytest.mark.parametrize(("attribute", "index"), lines("cuda"))
def test_the_lists_of_torch_for_the_gpu(attribute: str, index: int, examples: bool) -> None:
    found = entry("cuda", attribute, index, torch.float16)
    function, tensors = one_call(found)
    amp = fxamp.convert(
        (lambda *given: function(*given)) if examples else _with_arguments(function, len(tensors)),
        example_inputs=tensors if examples else None,
        device_type="cuda",
        dtype=torch.float16,
    )
    (decision,) = (d for d in calls(amp.plan) if d.op != "operator.getitem")
    assert decision.rule == found.rule
    assert decision.reason == ("op table" if found.rule != "follow" else "input dtype")
    planned = {value.dtype for value in tensors_in(decision.output)}
    assert planned == {found.output} if examples else planned <= {found.output, None}


def _with_arguments(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The function with as many arguments by name, which tracing without examples needs."""
    return (
        lambda: function(),
        lambda a: function(a),
        lambda a, b: function(a, b),
        lambda a, b, c: function(a, b, c),
        lambda a, b, c, d: function(a, b, c, d),
        lambda a, b, c, d, e: function(a, b, c, d, e),
        lambda a, b, c, d, e, f: function(a, b, c, d, e, f),
        lambda a, b, c, d, e, f, g: function(a, b, c, d, e, f, g),
    )[count]


@DEPRECATED
@pytest.mark.parametrize("dtype", LOW, ids=abbreviate)
@pytest.mark.parametrize(("attribute", "index"), lines("cpu"))
def test_the_lists_of_torch_for_the_cpu(attribute: str, index: int, dtype: torch.dtype) -> None:
    found = entry("cpu", attribute, index, dtype)
    function, tensors = one_call(found)
    amp = fxamp.convert(function, example_inputs=tensors, device_type="cpu", dtype=dtype)
    (decision,) = calls(amp.plan)
    assert (decision.rule, decision.reason) == (
        found.rule,
        "op table" if found.rule != "follow" else "input dtype",
    )
    assert {value.dtype for value in tensors_in(decision.output)} == {found.output}
    with torch.autocast("cpu", dtype):
        expected = function(*tensors)
    assert_same(amp(*tensors), expected)
    without = fxamp.convert(_with_arguments(function, len(tensors)), device_type="cpu", dtype=dtype)
    assert_same(without(*tensors), expected)


def test_the_lists_are_all_there() -> None:
    known = {f"{module}_{kind}" for module in (*MODULES, "methods") for kind in (*RULES, BUILTIN)} | {"banned"}
    for device_type, least in (("cuda", 110), ("cpu", 50)):
        assert set(lists(device_type)) <= known
        assert len(lines(device_type)) >= least


def test_what_torch_bans_is_refused() -> None:
    assert lists("cuda")["banned"]
    for name, args, module in lists("cuda")["banned"]:
        function = _with_arguments(getattr(module, name), len(args))
        for examples in (args, None):
            with pytest.raises(fxamp.PlanError, match=r"is refused by torch\.autocast"):
                fxamp.convert(function, example_inputs=examples, device_type="cuda")
