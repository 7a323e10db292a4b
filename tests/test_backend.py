"""``torch.compile(model, backend="fxamp")`` means what ``torch.autocast`` means, whatever Dynamo makes of the model."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint

import fxamp
from tests.helpers import assert_same, quiet, run
from tests.zoo import ZOO, Case

BF16 = torch.bfloat16

# What Dynamo and Inductor do themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    assert not torch.is_autocast_enabled("cpu")


def compiled(model: Any, dtype: torch.dtype = BF16, **options: Any) -> Any:
    return torch.compile(model, backend="fxamp", options={"dtype": dtype, **options})


def check(model: Any, *inputs: tuple[Any, ...], dtype: torch.dtype = BF16, modes: Any = (True, False)) -> list[Any]:
    """Outputs, gradients and buffers of the compiled model, called with these in turn, equal those under autocast."""
    theirs, ours = model, copy.deepcopy(model)
    call = compiled(ours, dtype)
    for training in modes:
        for owner in (theirs, ours):
            if isinstance(owner, nn.Module):
                owner.train(training)
        for i, args in enumerate(inputs):
            with quiet():
                expected, wanted = run(theirs, args, {}, torch.autocast("cpu", dtype), seed=i)
                found, given = run(call, args, {}, nullcontext(), seed=i)
            assert_same(found, expected)
            assert type(found) is type(expected)
            given = {name.removeprefix("_orig_mod."): grad for name, grad in given.items()}
            assert given.keys() == wanted.keys()
            for name, gradient in wanted.items():
                assert_same([given[name]], [gradient], f"gradient of {name}")
            for owner in (theirs, ours):
                if isinstance(owner, nn.Module):
                    owner.zero_grad()
    if isinstance(theirs, nn.Module):
        assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()), "buffers")
    return fxamp.reports(call)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(F.gelu(self.first(x))))


# -- what it means ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_is_one_graph_and_bitwise_autocast(dtype: torch.dtype) -> None:
    reports = check(Mlp(), (torch.randn(4, 8),), dtype=dtype)
    (report,) = reports
    assert (report.totals["lower"], report.totals["opaque"], report.mode) == (2, 0, "compiled")


def test_other_batch_sizes_are_compiled_as_torch_compile_does() -> None:
    reports = check(Mlp(), *((torch.randn(size, 8),) for size in (2, 3, 4, 5)), modes=(True,))
    assert len(reports) == 2  # the second with a symbol for the size


class Breaks(nn.Module):
    """Graph breaks with weights that are used on both sides of them, and work that Python does between the graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.between = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.body(x))
        torch._dynamo.graph_break()
        if x.float().sum() > 0:
            x = self.body(x)
        return self.outside(self.head(x)) + self.body(x)

    @torch.compiler.disable
    def outside(self, x: Tensor) -> Tensor:
        return self.between(self.between(x)) @ x.softmax(-1).T @ x


def test_what_is_outside_of_graphs_runs_under_autocast() -> None:
    reports = check(Breaks(), *((torch.randn(8, 8),) for _ in range(4)))
    assert len(reports) > 2


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", enabled=False):
            full = self.inner(x)
            with torch.autocast("cpu", dtype=torch.float16):
                half = self.other(full)
        with torch.no_grad():
            constant = self.inner(half.float())
        return full, half, constant, self.inner(constant)


def test_regions_of_the_user_are_honoured() -> None:
    (report,) = check(Regions(), (torch.randn(4, 8),), modes=(True,))
    dtypes = [row["output"] for row in report.nodes if row["op"] == "F.linear"]
    assert dtypes == ["f32", "f16", "bf16", "bf16"]


class AsksForDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        scale = torch.full((1,), 0.3, dtype=x.dtype)
        if x.dtype == torch.bfloat16 and torch.is_autocast_enabled("cpu"):
            scale = scale * 3
        return x * scale


def test_a_model_that_asks_for_dtypes_finds_those_of_autocast() -> None:
    check(AsksForDtypes(), (torch.randn(4, 8),))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return checkpoint.checkpoint(lambda y: self.drop(self.inner(y)), x, use_reentrant=False)


def test_a_checkpointed_part_draws_the_same_numbers_again() -> None:
    check(Checkpointed(), (torch.randn(4, 8),))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(8))
        self.calls = 0

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.calls += 1
        x = self.norm(self.inner(x))
        with torch.no_grad():
            self.seen = self.seen * 0.9 + x.mean(0)
        return {"x": x, "calls": self.calls, "size": x.shape[0]}


def test_buffers_counters_and_dicts() -> None:
    check(Counting(), (torch.randn(4, 8),), (torch.randn(4, 8),))


def test_recurrent_modules_which_dynamo_leaves_to_python() -> None:
    check(ZOO["sentiment"].make(), *(ZOO["sentiment"].inputs() for _ in range(2)))


def test_a_function() -> None:
    weight = torch.randn(8, 8, requires_grad=True)

    @torch.compile(backend="fxamp", options={"dtype": BF16})
    def function(x: Tensor) -> Tensor:
        return (x @ weight) @ weight

    x = torch.randn(4, 8)
    with torch.autocast("cpu", BF16):
        expected = (x @ weight) @ weight
    assert_same(function(x), expected)
    wanted = torch.autograd.grad(expected.float().sum(), weight)
    assert_same(torch.autograd.grad(function(x).float().sum(), weight), wanted)
    (report,) = fxamp.reports(function)
    assert report.totals["lower"] == 2


def test_a_module_compiled_in_place() -> None:
    model = Mlp()
    expected = copy.deepcopy(model)
    model.compile(backend="fxamp", options={"dtype": BF16})
    x = torch.randn(4, 8)
    with torch.autocast("cpu", BF16):
        assert_same(model(x), expected(x))
    assert len(fxamp.reports(model)) == 1


@pytest.mark.parametrize("name", ["vit", "gpt", "resnet", "sentiment", "unet"])
def test_models(name: str) -> None:
    _check_case(ZOO[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name: str) -> None:
    _check_case(ZOO[name])


class WithKeywords(nn.Module):
    """The model of a case and its loss as one module that is called by position."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model, self.kwargs = case.make(), dict(case.kwargs)
        self.loss, self.count = case.loss, len(case.loss_args())

    def forward(self, *args: Any) -> Any:
        given = len(args) - self.count
        output = self.model(*args[:given], **self.kwargs)
        return output if self.loss is None else (self.loss(output, *args[given:]), output)


def _check_case(case: Case) -> None:
    with quiet():
        model = WithKeywords(case)
    check(model, (*case.inputs(), *case.loss_args()))


# -- options ------------------------------------------------------------------------------------------------


def test_it_is_found_by_name_without_an_import() -> None:
    code = """
import torch
assert "fxamp" in torch.compiler.list_backends()
model = torch.nn.Linear(4, 4)
x = torch.ones(2, 4)
out = torch.compile(model, backend="fxamp")(x)
with torch.autocast("cpu"):
    assert torch.equal(out, model(x)) and out.dtype == torch.bfloat16
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_policy_full_casts_nothing() -> None:
    model, x = Breaks(), torch.randn(8, 8)
    call = compiled(model, policy="full")
    assert_same(call(x), model(x))
    assert fxamp.reports(call) == []


def test_overrides_of_modules_and_operators() -> None:
    policy = fxamp.Policy.autocast().with_modules({"first": "fp32", "no.such": "fp32"}).with_ops({F.gelu: "fp32"})
    call = compiled(Mlp(), policy=policy)
    call(torch.randn(4, 8))
    (report,) = fxamp.reports(call)
    rows = {(row["op"], row["module"]): row["runs_in"] for row in report.nodes}
    assert rows["F.linear", "first"] == rows["F.gelu", ""] == "f32"
    assert rows["F.linear", "second"] == "bf16"


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_other_backends_run_the_converted_graphs(inner: str) -> None:
    model, x = Mlp(), torch.randn(4, 8, requires_grad=True)
    call = compiled(copy.deepcopy(model), inner=inner)
    with torch.autocast("cpu", BF16):
        reference = torch.compile(copy.deepcopy(model), backend=inner)(x)
    found = call(x)
    assert_same(found, reference)
    wanted = torch.autograd.grad(reference.sum(), x)
    assert_same(torch.autograd.grad(found.sum(), x), wanted)
    assert len(fxamp.reports(call)) == 1


def test_a_backend_of_ones_own_runs_the_converted_graphs() -> None:
    seen: list[Any] = []

    def inner(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        seen.extend(node.target for node in gm.graph.nodes if "cast" in node.meta)
        assert not torch.is_autocast_enabled("cpu")
        return gm.forward

    call = torch.compile(Mlp(), backend=fxamp.backend(dtype=BF16, inner=inner))
    assert call(torch.randn(4, 8)).dtype == BF16
    assert len(seen) == 5


def test_the_default_dtype_is_that_of_autocast() -> None:
    assert torch.compile(nn.Linear(4, 4), backend="fxamp")(torch.ones(2, 4)).dtype == torch.get_autocast_dtype("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtyp": BF16}, "unknown option 'dtyp' of the backend: expected policy, dtype, device_type, inner"),
        ({"dtype": torch.float32}, "float32"),
        ({"policy": "fastest"}, "fastest"),
        ({"device_type": "gpu"}, "unknown device_type 'gpu'"),
        ({"inner": "inducto"}, "unknown inner backend 'inducto'"),
    ],
)
def test_wrong_options_are_refused_when_they_are_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fxamp.PolicyError, match=message):
        torch.compile(Mlp(), backend="fxamp", options=options)


def test_a_mode_is_for_inductor() -> None:
    with pytest.raises(fxamp.PolicyError, match=r"mode='max-autotune' is for Inductor, .*'eager'"):
        torch.compile(Mlp(), backend="fxamp", mode="max-autotune")
    torch.compile(Mlp(), backend=fxamp.backend(inner="inductor"), mode="reduce-overhead")


def test_reports_of_something_else() -> None:
    with pytest.raises(fxamp.FxampError, match=r"expected what torch\.compile made with the backend fxamp"):
        fxamp.reports(torch.compile(Mlp(), backend="eager"))


def test_an_error_leaves_no_autocast_behind() -> None:
    call = compiled(Mlp())
    with pytest.raises(RuntimeError):
        call(torch.randn(4, 7))


def test_the_modes_of_torch_compile_for_other_backends_are_as_they_were() -> None:
    fxamp.backend()
    model, x = Mlp(), torch.randn(4, 8)
    assert_same(torch.compile(model, backend="eager")(x), model(x))
