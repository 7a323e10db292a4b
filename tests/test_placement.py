"""Where "fast" runs what could run in either dtype: what is decided happens, and what must not be rounded is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxamp
from fxamp.plan import Decision, Value, argument_nodes
from tests.helpers import quiet
from tests.zoo import ZOO

LOW = torch.bfloat16


class Dtypes(fx.Interpreter):
    """Runs a converted graph, and has the dtype of each value that is a tensor."""

    def __init__(self, amp: fxamp.AmpModule) -> None:
        super().__init__(amp._root, graph=amp.graph)
        self.found: dict[str, torch.dtype] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n.name] = result.dtype
        return result


def dtypes(amp: fxamp.AmpModule, *values: Any) -> dict[str, torch.dtype]:
    interpreter = Dtypes(amp)
    with torch.no_grad():
        interpreter.run(*values)
    return interpreter.found


def fast(model: Any, *inputs: Any, dtype: torch.dtype = LOW, **options: Any) -> fxamp.AmpModule:
    options.setdefault("example_inputs", inputs)
    return fxamp.convert(model, dtype=dtype, policy="fast", **options)


def decisions(amp: fxamp.AmpModule, aten: str) -> list[Decision]:
    return [decision for decision in amp.plan if decision.aten == aten]


def ran_in(amp: fxamp.AmpModule, aten: str) -> list[torch.dtype | None]:
    return [decision.runs_in for decision in decisions(amp, aten)]


@pytest.mark.parametrize("examples", [True, False], ids=["examples", "symbolic"])
@pytest.mark.parametrize("name", ZOO)
def test_every_value_has_the_dtype_that_was_decided(name: str, examples: bool) -> None:
    case = ZOO[name]
    if not examples and not case.symbolic:
        pytest.skip("needs example inputs")
    torch.manual_seed(0)
    with quiet():
        model = case.make()
    inputs = (*case.inputs(), *case.loss_args())
    given = (inputs, dict(case.kwargs)) if examples else None
    amp = fxamp.convert(model, case.loss, example_inputs=given, dtype=LOW, policy="fast")
    checked = 0
    original = amp._run

    def run(variant: Any, values: Any) -> Any:
        nonlocal checked
        interpreter = Dtypes(amp)
        interpreter.graph = variant.graph
        with torch.autocast("cpu", enabled=False):
            interpreter.run(*values)
        for decision in variant.plan:
            if name == "tagger" and decision.name == "getitem_3":
                continue  # fake tensors have sizes of batches as floating numbers
            if isinstance(decision.output, Value) and decision.output.dtype and decision.name in interpreter.found:
                assert interpreter.found[decision.name] == decision.output.dtype, str(decision)
                checked += 1
        return original(variant, values)

    amp._run = run  # type: ignore[method-assign]
    with quiet():
        amp(*inputs, **case.kwargs)
    assert checked or not examples


def test_a_residual_stream_is_low_and_so_are_its_norms() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 32)
            self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, i: Tensor) -> Tensor:
            x = self.embed(i)
            for _ in range(3):
                x = x + self.down(F.gelu(self.up(self.norm(x))))
            return F.linear(x, self.embed.weight)

    amp = fast(Block(), torch.arange(16).repeat(4, 1))
    assert ran_in(amp, "add") == [LOW] * 3
    assert [decision.output.dtype for decision in decisions(amp, "layer_norm")] == [LOW] * 3
    assert amp.report().totals["activation_casts"] == 1


def test_what_comes_in_is_not_rounded_but_for_the_table() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + x * 3

    amp = fast(Shifted(), torch.randn(4, 8))
    assert ran_in(amp, "mul") == ran_in(amp, "add") == [torch.float32]
    assert ran_in(amp, "linear") == [LOW]


def test_positions_and_times_stay_in_float32_until_they_are_waves() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)
            self.register_buffer("frequencies", 100.0 ** -(torch.arange(8) / 8))

        def forward(self, x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[1]).unsqueeze(-1)
            angles = positions * self.frequencies
            waves = torch.cat([angles.sin(), angles.cos()], -1)
            return self.fc(self.fc(x) * waves)

    amp = fast(Rotary(), torch.randn(2, 512, 16))
    first = decisions(amp, "mul")[0]
    assert first.output == Value(torch.float32, False, 2)
    assert ran_in(amp, "sin") == ran_in(amp, "cos") == [torch.float32]
    assert decisions(amp, "mul")[1].runs_in == LOW  # waves are between -1 and 1


def test_what_was_an_integer_stays_in_float32_where_it_is_made() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(512, 8)
            self.scale = nn.Parameter(torch.ones(512))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.arange(512) * self.scale) + self.fc(x)

    amp = fast(Places(), torch.randn(4, 512))
    assert ran_in(amp, "mul") == [torch.float32]


class Growing(nn.Module):
    """A residual stream beyond what float16 holds, of branches that it does hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(8, 32), nn.LayerNorm(32)
        self.fc, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
        nn.init.uniform_(self.fc.bias, -4e4, 4e4)

    def forward(self, i: Tensor) -> Tensor:
        x = self.embed(i)
        for _ in range(4):
            x = x + self.fc(self.norm(x))
        return self.head(self.norm(x))


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(("dtype", "stream"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_what_float16_may_not_hold_stays_in_float32(dtype: torch.dtype, stream: Any, device_type: str) -> None:
    model, i = Growing(), torch.arange(8).repeat(4, 1)
    amp = fast(model, i, dtype=dtype, device_type=device_type)
    assert ran_in(amp, "add") == [stream] * 4
    with torch.no_grad():
        torch.testing.assert_close(amp(i).float(), model(i), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mask_of_the_lowest_number_keeps_its_meaning(dtype: torch.dtype) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk = nn.Linear(8, 16)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k = self.qk(x).chunk(2, -1)
            scores = q @ k.transpose(-1, -2) + (1 - mask.float()) * torch.finfo(torch.float32).min
            return scores.softmax(-1) @ k

    x, mask = torch.randn(2, 4, 8), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]).bool()[:, None]
    model = Masked()
    amp = fast(model, x, mask, dtype=dtype)
    assert ran_in(amp, "add") == ran_in(amp, "softmax") == [torch.float32]
    with torch.no_grad():
        expected = model(x, mask)
        torch.testing.assert_close(amp(x, mask).float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("number", "dtype", "low"),
    [
        (1e-12, torch.float16, False),
        (1e-3, torch.float16, True),
        (1e9, torch.float16, False),
        (1e9, torch.bfloat16, True),
    ],
)
def test_a_number_out_of_range_forces_float32(number: float, dtype: torch.dtype, low: bool) -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x) + number)

    amp = fast(Added(), torch.randn(64, 32), dtype=dtype)
    assert ran_in(amp, "add") == [dtype if low else torch.float32]


@pytest.mark.parametrize(("value", "low"), [(torch.finfo(torch.float32).min, False), (-10.0, True)])
def test_a_constant_out_of_range_forces_float32(value: float, low: bool) -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.register_buffer("bias", torch.full((32,), value))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x) + self.bias)

    assert ran_in(fast(Biased(), torch.randn(64, 32)), "add") == [LOW if low else torch.float32]


@pytest.mark.parametrize("call", [torch.exp, torch.log1p, torch.Tensor.rsqrt, lambda x: x.pow(2), torch.cumsum])
def test_dangerous_operators_run_in_float32(call: Any) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x).sigmoid()
            return self.fc(call(y, 0) if call is torch.cumsum else call(y))

    amp = fast(Between(), torch.randn(64, 32))
    assert [d.runs_in for d in amp.plan if d.rule == "fp32"] == [torch.float32]
    assert [d.reason for d in amp.plan if d.rule == "fp32"] == ["not safe in bf16"]


def test_a_cast_stands_where_the_tensor_is_smallest() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.scale = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            picked = (x * 2)[:, 0]
            return self.fc(picked), self.fc(x) * self.scale.expand(64, 16, 8)

    amp = fast(Narrow(), torch.randn(64, 16, 8))
    casts = [node.meta["cast"].value for node in amp.graph.nodes if "cast" in node.meta]
    assert "getitem" in casts
    assert "mul" not in casts
    assert "expand" not in casts


def test_the_users_casts_are_kept() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return self.fc(F.relu(y.float()) + 1)

    amp = fast(Careful(), torch.randn(64, 32))
    assert [decision.output.dtype for decision in decisions(amp, "float")] == [torch.float32]


def test_what_is_written_to_is_not_cast_and_seen_by_all() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.zeros(4, 8)
            part = y[:2]
            part += 1
            y[2:] = 2.0
            return self.fc(y) + y.sum() + self.fc(x)

    model = Written()
    amp = fast(model, torch.randn(4, 8))
    x = torch.randn(4, 8)
    torch.testing.assert_close(amp(x).float(), model(x), atol=0.5, rtol=2e-2)


def test_an_override_wins() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8))
    policy = fxamp.Policy.fast(dtype=LOW).with_ops({F.gelu: "fp32"}).with_modules({"2": "fp32"})
    amp = fxamp.convert(model, example_inputs=(torch.randn(64, 32),), policy=policy)
    assert ran_in(amp, "gelu") == [torch.float32] * 2
    assert ran_in(amp, "linear") == [LOW, torch.float32, LOW]


def test_a_region_of_the_users_is_kept() -> None:
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.one(x))
            with torch.autocast("cpu", enabled=False):
                x = F.relu(self.two(x.float()) * 3)
            return self.three(x)

    amp = fast(Region(), torch.randn(64, 32))
    assert ran_in(amp, "linear") == [LOW, torch.float32, LOW]
    assert ran_in(amp, "mul") == [torch.float32]
    assert ran_in(amp, "relu") == [LOW, torch.float32]


@pytest.mark.parametrize("name", ["gpt", "resnet", "unet", "attention", "autoencoder", "experts"])
def test_outputs_have_the_dtypes_of_autocast(name: str) -> None:
    case = ZOO[name]
    model, inputs = case.make(), (*case.inputs(), *case.loss_args())
    amp = fxamp.convert(model, case.loss, example_inputs=(inputs, dict(case.kwargs)), dtype=LOW)
    ours = pytree.tree_leaves(amp.replan("fast")(*inputs, **case.kwargs))
    theirs = pytree.tree_leaves(amp(*inputs, **case.kwargs))
    assert all(a.dtype in (b.dtype, torch.float32) for a, b in zip(ours, theirs, strict=True))
    dangerous = name == "experts"  # a logarithm stays in float32
    assert dangerous or [t.dtype for t in ours] == [t.dtype for t in theirs]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["gpt", "resnet", "unet", "attention_masked"])
def test_it_is_deterministic_and_never_casts_more(name: str, device_type: str) -> None:
    case = ZOO[name]
    torch.manual_seed(0)
    model, inputs = case.make(), (*case.inputs(), *case.loss_args())
    made = [
        fxamp.convert(
            model,
            case.loss,
            example_inputs=(inputs, dict(case.kwargs)),
            dtype=LOW,
            device_type=device_type,
            policy=policy,
        )
        for policy in ("fast", "fast", "autocast")
    ]
    assert made[0].code == made[1].code
    fast_casts, casts = (made[i].report().totals["activation_casts"] for i in (0, 2))
    assert fast_casts <= casts


def test_on_a_gpu_norms_and_softmax_keep_low_inputs_where_autocast_widens() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.Softmax(-1), nn.Linear(32, 8))
    x = torch.randn(64, 32)
    amp = fxamp.convert(model, example_inputs=(x,), device_type="cuda", dtype=LOW)
    low = amp.replan("fast")
    assert ran_in(amp, "layer_norm") == ran_in(amp, "softmax") == [torch.float32]
    assert ran_in(low, "layer_norm") == ran_in(low, "softmax") == [LOW]
    assert [d.reason for d in low.plan if d.aten in ("layer_norm", "softmax")] == ["float32 inside"] * 2
    layer_norm = next(node for node in low.graph.nodes if node.name == "layer_norm")
    assert all(source.name.endswith("bf16") or source.name == "linear" for source in argument_nodes(layer_norm))
