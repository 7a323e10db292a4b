"""What users read when something is wrong, word for word; and that nothing is left behind."""

from __future__ import annotations

import inspect
import os
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _device

import fxamp
from fxamp import CaptureError, FxampError, PlanError, Policy, PolicyError, VerifyError
from tests.helpers import assert_same

FILE = os.path.basename(__file__)
RULE_LIST = "expected one of lower, fp32, promote, follow"
PASS_INPUTS = "give a tuple of positional inputs, or (args_tuple, kwargs_dict)"
WRITE_DTYPE = "write dtype=torch.bfloat16, or policy='full' for a model without casts"
OPERATOR_EXAMPLE = "name an operator as torch does, such as 'torch.softmax'"
USE_LOGITS = "use torch.nn.functional.binary_cross_entropy_with_logits, which takes the value before sigmoid"


class Gate(nn.Module):
    """Branches on data."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Peak(nn.Module):
    """Branches on what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        if (x @ x).sum() > 0:
            return x
        return -x


class Optional(nn.Module):
    """Takes one of its arguments."""

    def forward(self, ids: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        found = ids if ids is not None else embeds
        if found is None:
            raise ValueError("give ids or embeds")
        return found


class Unpacks(nn.Module):
    """Asks for a number of dimensions."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        batch, *_ = x.shape
        return y * batch


class Loop(nn.Module):
    """Loops over a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        for row in x:
            x = x + row
        return x


class Counter(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Draws(nn.Module):
    """Draws from Python's random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


class Regions(nn.Module):
    """Fails in the middle of every kind of region, with a write to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.fc(x))
        self.last = x
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.inference_mode():
            self.seen.add_(torch.rand(4))
            return x if torch.isnan(x).any() else -x


def line(function: Callable[..., Any], text: str) -> int:
    """The line of this file on which ``function`` says ``text``."""
    lines, start = inspect.getsourcelines(function)
    return start + next(i for i, found in enumerate(lines) if text in found)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())


def difference(output: Tensor, target: Tensor) -> Tensor:
    return output - target


def parts(output: Tensor, target: Tensor) -> Any:
    return {"l1": F.l1_loss(output, target)}


def nothing() -> Tensor:
    return torch.zeros(())


def probabilities(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy(output, target)


X, Y = torch.zeros(2, 4), torch.zeros(2, 3)


class Failure(NamedTuple):
    """A conversion that fails."""

    kind: type[FxampError]
    message: str
    hint: str
    make: Callable[[], Any] = mlp
    options: Mapping[str, Any] = MappingProxyType({})


def not_low(dtype: Any) -> str:
    return f"dtype {dtype!r} is not a low precision: expected torch.float16 or torch.bfloat16"


def cannot_trace(module: type[nn.Module], text: str, what: str) -> str:
    where = f"cannot trace {module.__name__}.forward ({FILE}:{line(module, text)})"
    return f"{where}: {what}"


WITH_INPUTS = "trace it with inputs: fxamp.convert(model, example_inputs=(x,))"
AS_IT_RUNS = 'torch.compile(model, backend="fxamp") takes every way, in several graphs'
IN_A_SUBMODULE = "put that line into a submodule of its own: a module that cannot be traced stays a call"

FAILURES = {
    # -- what cannot be traced
    "control flow": Failure(
        CaptureError,
        cannot_trace(Gate, "if x.sum", "the branch `if x.sum() > 0` depends on a tensor value"),
        WITH_INPUTS,
        Gate,
    ),
    "loop": Failure(
        CaptureError,
        cannot_trace(
            Loop, "for row", "`for row in x` iterates over a tensor, or over a tuple whose length is not known"
        ),
        WITH_INPUTS,
        Loop,
    ),
    "python state": Failure(
        CaptureError,
        cannot_trace(
            Counter, "calls +=", "`self.calls += 1` sets self.calls, which a graph cannot carry to the next call"
        ),
        IN_A_SUBMODULE,
        Counter,
    ),
    "control flow, with a loss": Failure(
        CaptureError,
        cannot_trace(Gate, "if x.sum", "the branch `if x.sum() > 0` depends on a tensor value"),
        "trace it with inputs: fxamp.convert(model, loss, example_inputs=(x, target))",
        Gate,
        {"loss": difference},
    ),
    "no argument": Failure(
        CaptureError,
        cannot_trace(Optional, "raise Val", "`raise ValueError(\"give ids or embeds\")`: give ids or embeds"),
        'trace it with inputs: fxamp.convert(model, example_inputs=((), {"ids": ...}))',
        Optional,
    ),
    "an unpacked shape": Failure(
        CaptureError,
        cannot_trace(
            Unpacks,
            "batch, *_",
            "`batch, *_ = x.shape` iterates over a tensor, or over a tuple whose length is not known",
        ),
        "trace it with inputs: fxamp.convert(model, example_inputs=(x, y))",
        Unpacks,
    ),
    "inside regions": Failure(
        CaptureError,
        cannot_trace(
            Regions, "isnan", "the branch `return x if torch.isnan(x).any() else -x` depends on a tensor value"
        ),
        WITH_INPUTS,
        Regions,
    ),
    "not callable": Failure(
        CaptureError, "found 3: expected a module or a callable", "fxamp.convert(model)", lambda: 3
    ),
    "twice": Failure(
        CaptureError,
        "the model is converted already",
        "amp.replan(policy) changes its policy",
        lambda: fxamp.convert(mlp()),
    ),
    # -- policies
    "policy": Failure(
        PolicyError,
        "unknown policy 'fats': expected one of autocast, fast, full",
        "write 'fast'",
        options={"policy": "fats"},
    ),
    "policy of another type": Failure(
        PolicyError,
        "policy is 3: expected a name or a Policy",
        "write policy='autocast' or policy=fxamp.Policy.autocast(...)",
        options={"policy": 3},
    ),
    "device type": Failure(
        PolicyError,
        "unknown device_type 'mps': expected one of cuda, cpu",
        "write device_type='cpu'",
        options={"device_type": "mps"},
    ),
    "device with an index": Failure(
        PolicyError,
        "unknown device_type 'cuda:0': expected one of cuda, cpu",
        "write device_type='cuda'",
        options={"device_type": "cuda:0"},
    ),
    "int8": Failure(PolicyError, not_low(torch.int8), WRITE_DTYPE, options={"dtype": torch.int8}),
    "float64": Failure(PolicyError, not_low(torch.float64), WRITE_DTYPE, options={"dtype": torch.float64}),
    "float32": Failure(PolicyError, not_low(torch.float32), WRITE_DTYPE, options={"dtype": torch.float32}),
    "dtype in words": Failure(PolicyError, not_low("float16"), WRITE_DTYPE, options={"dtype": "float16"}),
    "no such module": Failure(
        PolicyError,
        "the override 'head' matches no module of the model",
        "the model has 0, 1",
        options={"policy": Policy.autocast().with_modules({"head": "fp32"})},
    ),
    "no submodules": Failure(
        PolicyError,
        "the override 'head' matches no module of the model",
        "the model has no submodules",
        lambda: nn.Linear(4, 3),
        {"policy": Policy.autocast().with_modules({"head": "fp32"})},
    ),
    "nearly a module": Failure(
        PolicyError,
        "the override 'encodr' matches no module of the model",
        "write 'encoder'",
        lambda: nn.Sequential(OrderedDict(encoder=nn.Linear(4, 3))),
        {"policy": Policy.autocast().with_modules({"encodr": "fp32"})},
    ),
    "no such pattern": Failure(
        PolicyError,
        "the override '*.norm' matches no module of the model",
        "the model has 0, 1",
        options={"policy": Policy.autocast().with_modules({"*.norm": "fp32"})},
    ),
    "no such operator": Failure(
        PolicyError,
        "the override 'aten::softmax' matches no operator of the model",
        "print(amp.report()) lists the operators of the model",
        options={"policy": Policy.autocast().with_ops({torch.softmax: "fp32"})},
    ),
    "nearly an operator": Failure(
        PolicyError,
        "the override 'aten::sigmoid_' matches no operator of the model",
        "write 'aten::sigmoid'",
        options={"policy": Policy.autocast().with_ops({torch.sigmoid_: "fp32"})},
    ),
    "two patterns": Failure(
        PolicyError,
        "'0' matches two overrides: '*0' (lower) and '0*' (fp32)",
        "give the exact name '0'; an exact name wins over a pattern",
        options={"policy": Policy.autocast().with_modules({"0*": "fp32", "*0": "lower"})},
    ),
    # -- losses
    "loss no scalar": Failure(
        FxampError,
        "the loss returns shape (2, 3): expected one scalar",
        "reduce it, for example with .mean()",
        options={"loss": difference, "example_inputs": (X, Y)},
    ),
    "loss of parts": Failure(
        CaptureError,
        "the loss parts returns a dict: expected one tensor",
        "return the sum of its parts; the model's output may carry the rest",
        options={"loss": parts},
    ),
    "loss without arguments": Failure(
        CaptureError,
        "the loss nothing takes no argument: expected (output, *loss_args)",
        "write loss=lambda output, target: ...",
        options={"loss": nothing},
    ),
    "banned": Failure(
        PlanError,
        f"F.binary_cross_entropy (node 'binary_cross_entropy', {__file__}:{line(probabilities, 'return')}) is "
        "refused by torch.autocast: its result in torch.float16 would not be safe",
        USE_LOGITS,
        options={"loss": probabilities, "device_type": "cuda", "dtype": torch.float16},
    ),
    # -- example inputs
    "too few inputs": Failure(
        CaptureError,
        "example_inputs do not fit the signature (input): missing a required argument: 'input'",
        PASS_INPUTS,
        options={"example_inputs": ()},
    ),
    "too many inputs": Failure(
        CaptureError,
        "example_inputs do not fit the signature (input): too many positional arguments",
        PASS_INPUTS,
        options={"example_inputs": (X, X)},
    ),
    "no target": Failure(
        CaptureError,
        "example_inputs do not fit the signature (input, target): missing a required argument: 'target'",
        PASS_INPUTS,
        options={"loss": difference, "example_inputs": (X,)},
    ),
    "unknown keyword": Failure(
        CaptureError,
        "example_inputs do not fit the signature (input): got an unexpected keyword argument 'y'",
        PASS_INPUTS,
        options={"example_inputs": ((X,), {"y": Y})},
    ),
    "inputs in words": Failure(
        CaptureError, "example_inputs is 'x': expected a tuple", PASS_INPUTS, options={"example_inputs": "x"}
    ),
    "inputs in a dict": Failure(
        CaptureError,
        "example_inputs is a dict: expected a tuple",
        PASS_INPUTS,
        options={"example_inputs": {"input": 3}},
    ),
    "a number for a tensor": Failure(
        CaptureError,
        f"example_inputs do not fit the model: F.linear (node 'linear' in module '0', {__file__}:LINE) fails "
        "with: linear(): argument 'input' (position 1) must be Tensor, not int",
        "give inputs with which the model itself runs",
        options={"example_inputs": (3,)},
    ),
    "shape": Failure(
        CaptureError,
        f"example_inputs do not fit the model: F.linear (node 'linear' in module '0', {__file__}:LINE) fails "
        "with: a and b must have same reduction dim, but got [2, 3] X [4, 3].",
        "give inputs with which the model itself runs",
        options={"example_inputs": (Y,)},
    ),
}  # fmt: skip


def convert(failure: Failure, model: Any) -> FxampError:
    with pytest.raises(failure.kind) as raised:
        fxamp.convert(model, **failure.options)
    return raised.value


CONVERTS = inspect.getsourcelines(convert)[1] + 2  # the line of this file that calls fxamp.convert


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_the_text_of_an_error(failure: Failure) -> None:
    error = convert(failure, failure.make())
    assert type(error) is failure.kind
    # A call that no line of the user's makes has the line of the conversion.
    message = failure.message.replace("LINE", str(CONVERTS))
    assert str(error) == f"{message}\n\nhint: {failure.hint}"
    assert (error.message, error.hint) == (message, failure.hint)


def test_the_nearest_device_type_is_offered() -> None:
    with pytest.raises(PolicyError, match="hint: write device_type='cuda'"):
        fxamp.convert(mlp(), device_type="cdua")


def test_an_operator_is_named_as_the_user_wrote_it() -> None:
    with pytest.raises(PolicyError, match=r"for (F|torch\.nn\.functional)\.linear"):
        Policy.autocast().with_ops({F.linear: "low"})


@pytest.mark.parametrize(
    "call",
    [
        lambda: fxamp.convert(object()),
        lambda: fxamp.convert(mlp(), policy=object()),
        lambda: fxamp.convert(mlp(), example_inputs=object()),
    ],
)
def test_no_message_has_a_memory_address(call: Callable[[], Any]) -> None:
    with pytest.raises(FxampError) as raised:
        call()
    assert "0x" not in str(raised.value)


# -- policies that cannot be made ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message", "hint"),
    [
        (lambda: Policy("fats"), "unknown policy 'fats': expected one of autocast, fast, full", "write 'fast'"),
        (lambda: Policy.of("xyz"), "unknown policy 'xyz': expected one of autocast, fast, full", "write 'autocast'"),
        (
            lambda: Policy.autocast("cdua"),
            "unknown device_type 'cdua': expected one of cuda, cpu",
            "write 'cuda'",
        ),
        (lambda: Policy.fast("cpu", torch.float32), not_low(torch.float32), WRITE_DTYPE),
        (lambda: Policy.autocast(dtype=torch.int8), not_low(torch.int8), WRITE_DTYPE),
        (
            lambda: Policy.autocast().with_ops({torch.softmax: "low"}),
            f"unknown rule 'low' for torch.softmax: {RULE_LIST}",
            "write 'lower'",
        ),
        (
            lambda: Policy.autocast().with_ops({"aten::exp": "fp16"}),
            f"unknown rule 'fp16' for aten::exp: {RULE_LIST}",
            "write 'fp32'",
        ),
        (
            lambda: Policy.autocast().with_ops({torch.exp: "opaque"}),
            f"unknown rule 'opaque' for torch.exp: {RULE_LIST}",
            "write 'lower'",
        ),
        (
            lambda: Policy.autocast().with_modules({"blocks.*.norm": "folow"}),
            f"unknown rule 'folow' for 'blocks.*.norm': {RULE_LIST}",
            "write 'follow'",
        ),
        (
            lambda: Policy.autocast().with_modules({torch.exp: "fp32"}),
            "the module override the function exp is no name: expected a module path or a glob pattern",
            "write 'head' or 'blocks.*.norm'; with_ops takes operators",
        ),
        (
            lambda: Policy.autocast().with_ops({"torch.sofmax": "fp32"}),
            "unknown operator 'torch.sofmax': not an ATen operator",
            "did you mean 'torch.softmax'?",
        ),
        (
            lambda: Policy.autocast().with_ops({"aten::expp": "fp32"}),
            "unknown operator 'aten::expp': not an ATen operator",
            "did you mean 'exp'?",
        ),
        (
            lambda: Policy.autocast().with_ops({nn.Linear: "fp32"}),
            "Linear reaches no single ATen operator",
            OPERATOR_EXAMPLE,
        ),
        (
            lambda: Policy.autocast().with_ops({torch.Tensor.float: "fp32"}),
            "float reaches no single ATen operator",
            OPERATOR_EXAMPLE,
        ),
        (
            lambda: Policy.autocast("cuda").resolved("cpu"),
            "device_type is cpu, but the policy says cuda",
            "give device_type only once",
        ),
    ],
)  # fmt: skip
def test_a_policy_that_cannot_be_made(make: Callable[[], Any], message: str, hint: str) -> None:
    with pytest.raises(PolicyError) as raised:
        make()
    assert str(raised.value) == f"{message}\n\nhint: {hint}"


# -- errors at a call ------------------------------------------------------------------------------------


def test_a_loss_that_is_no_scalar_at_the_call() -> None:
    amp = fxamp.convert(mlp(), difference)
    with pytest.raises(FxampError) as raised:
        amp(X, Y)
    assert str(raised.value) == (
        "the loss returns shape (2, 3): expected one scalar\n\nhint: reduce it, for example with .mean()"
    )


def test_one_element_is_scalar_enough() -> None:
    inputs = torch.zeros(1, 4), torch.zeros(1, 1)
    amp = fxamp.convert(nn.Linear(4, 1), difference, example_inputs=inputs)
    assert amp(*inputs)[0].shape == (1, 1)


def test_the_plan_knows_no_such_node() -> None:
    plan = fxamp.convert(mlp()).plan
    for name, hint in (("linaer", "write 'linear'"), ("zzz", "print(amp.report()) lists the names")):
        with pytest.raises(PlanError) as raised:
            plan[name]
        assert str(raised.value) == f"the plan has no node '{name}'\n\nhint: {hint}"


def test_what_replan_refuses_leaves_the_module_as_it_is() -> None:
    amp = fxamp.convert(mlp(), probabilities, device_type="cpu", dtype=torch.bfloat16)
    code, x, y = amp.code, torch.rand(2, 4), torch.rand(2, 3)
    expected = amp(x, y)
    for policy, kind in (
        ("fats", PolicyError),
        (Policy.autocast("cuda"), PlanError),
        (Policy.autocast().with_modules({"head": "fp32"}), PolicyError),
        (Policy.autocast().with_ops({"exp": "fp32"}), PolicyError),
    ):
        with pytest.raises(kind):
            amp.replan(policy)
    assert amp.code == code
    assert_same(amp(x, y), expected)


# -- binary_cross_entropy --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [F.binary_cross_entropy, nn.BCELoss(), probabilities])
@pytest.mark.parametrize(
    "options",
    [
        {"device_type": "cpu"},
        {"device_type": "cuda", "policy": "full"},
        {"device_type": "cuda", "policy": Policy.autocast().with_ops({F.binary_cross_entropy: "fp32"})},
    ],
    ids=["cpu", "full", "override"],
)
def test_binary_cross_entropy_converts_where_it_is_safe(loss: Any, options: dict[str, Any]) -> None:
    model = mlp()
    amp = fxamp.convert(model, loss, dtype=torch.bfloat16, **options)
    x, y = torch.rand(2, 4), torch.rand(2, 3)
    found, output = amp(x, y)
    assert found.dtype == torch.float32
    assert_same(found, F.binary_cross_entropy(output.float(), y))


@pytest.mark.parametrize("loss", [F.binary_cross_entropy, nn.BCELoss()])
def test_the_refusal_says_where(loss: Any) -> None:
    with pytest.raises(PlanError) as raised:
        fxamp.convert(mlp(), loss, device_type="cuda", dtype=torch.bfloat16)
    where = " in module 'loss'" if isinstance(loss, nn.Module) else ""
    assert str(raised.value).startswith(f"F.binary_cross_entropy (node 'binary_cross_entropy'{where}, {__file__}:")
    assert str(raised.value).endswith(
        f" is refused by torch.autocast: its result in torch.bfloat16 would not be safe\n\nhint: {USE_LOGITS}"
    )


# -- nothing is left behind ------------------------------------------------------------------------------


PATCHED = (
    *((torch.autocast, name) for name in ("__init__", "__enter__", "__exit__")),
    *((kind, name) for kind in (torch.no_grad, torch.enable_grad) for name in ("__init__", "__enter__", "__exit__")),
    *((torch.set_grad_enabled, name) for name in ("__init__", "__enter__", "__exit__")),
    *((torch.inference_mode, name) for name in ("__init__", "__enter__", "__exit__")),
    *((nn.Module, name) for name in ("__setattr__", "__call__", "__getattr__", "__init__", "training", "forward")),
    *((torch.autograd.Function, name) for name in ("apply",)),
    *((torch, f.__name__) for f in _device._device_constructors() if hasattr(torch, f.__name__)),
    *((torch, name) for name in ("is_tensor", "rand", "zeros", "isnan", "_assert")),
    *((torch.Tensor, name) for name in ("to", "__iadd__", "__torch_function__")),
    *((F, name) for name in ("linear", "binary_cross_entropy")),
)  # fmt: skip


def process_state() -> dict[str, Any]:
    """What a conversion touches while it runs: patched functions, modes, random numbers, globals."""
    patched = {f"{owner.__name__}.{name}": inspect.getattr_static(owner, name, None) for owner, name in PATCHED}
    modes = {
        "autocast": [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cuda", "cpu")],
        "cache": torch.is_autocast_cache_enabled(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "modes": torch.overrides._get_current_function_mode_stack(),
        "random": (random.getstate(), torch.get_rng_state().tolist()),
        "globals": sorted(globals()),
        "default": torch.get_default_dtype(),
    }
    return patched | modes


def model_state(model: Any) -> list[Any]:
    """Everything a module tree holds: attributes, their values, and the bits of its tensors."""
    if not isinstance(model, nn.Module):
        return []
    found: list[Any] = []
    for path, module in model.named_modules():
        plain = {k: v for k, v in module.__dict__.items() if not k.startswith("_")}
        owned = {k: list(v) for k, v in module.__dict__.items() if k.startswith("_") and isinstance(v, dict)}
        found.append((path, list(module.__dict__), {k: repr(v) for k, v in plain.items()}, owned))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found.append({k: (id(t), t._version, t.requires_grad, t.dtype, t.detach().clone()) for k, t in tensors.items()})
    return found


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    before, state = model_state(model), process_state()
    yield
    after = process_state()
    assert {name for name in state if state[name] is not after[name] and state[name] != after[name]} == set()
    found = model_state(model)
    assert found[:-1] == before[:-1]
    if before:
        assert list(found[-1]) == list(before[-1])
        for name, (*facts, bits) in before[-1].items():
            *found_facts, found_bits = found[-1][name]
            assert found_facts == facts, name
            assert torch.equal(found_bits, bits), name


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_failed_conversion_leaves_no_trace(name: str, training: bool) -> None:
    failure = FAILURES[name]
    model = failure.make()
    if isinstance(model, nn.Module):
        model.train(training)
    with untouched(model):
        convert(failure, model)


@pytest.mark.parametrize("make", [mlp, lambda: nn.Sequential(Regions(), Counter(), Gate(), Draws())])
def test_a_conversion_that_works_leaves_no_trace_either(make: Callable[[], nn.Module]) -> None:
    model = make()
    model[1].eval()
    with untouched(model):
        fxamp.convert(model)
    with untouched(model):
        fxamp.convert(model, dtype=torch.float16, device_type="cuda", policy="fast")


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_the_callers_modes_are_restored(grad: bool, enabled: bool) -> None:
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.float16, enabled=enabled):
        model = Regions()
        with untouched(model):
            convert(FAILURES["inside regions"], model)
        assert torch.is_grad_enabled() is grad
        assert torch.is_autocast_enabled("cpu") is enabled


def test_a_model_converts_after_a_failure() -> None:
    model, x = mlp(), torch.randn(2, 4)
    convert(FAILURES["banned"], model)
    convert(FAILURES["shape"], model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    assert_same(fxamp.convert(model, dtype=torch.bfloat16)(x), expected)


# -- the classes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FxampError, CaptureError, PolicyError, PlanError, VerifyError])
def test_errors_pickle_and_are_caught_as_what_they_are(kind: type[FxampError]) -> None:
    error = kind("what failed", hint="what to do")
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is kind
    assert (copied.message, copied.hint, str(copied)) == (error.message, error.hint, str(error))
    assert str(error) == "what failed\n\nhint: what to do"
    assert str(kind("what failed")) == "what failed"
    assert isinstance(error, FxampError)
    assert isinstance(error, ValueError) is (kind is PolicyError)


@pytest.mark.parametrize("name", ["control flow", "banned", "two patterns", "shape"])
def test_raised_errors_pickle(name: str) -> None:
    error = convert(FAILURES[name], FAILURES[name].make())
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("name", ["control flow", "too few inputs", "shape"])
def test_the_cause_is_kept(name: str) -> None:
    error = convert(FAILURES[name], FAILURES[name].make())
    assert error.__cause__ is not None
