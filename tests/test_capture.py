"""What tracing keeps of a model's meaning, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxamp
from tests.helpers import assert_same, check_against_autocast, graph_text


class Doubled(torch.autograd.Function):
    """Its backward is not that of its forward, so that losing it shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 100


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Output:
    value: Tensor
    extra: dict[str, Tensor]


class Net(nn.Module):
    """A module around a function of (module, x), with a linear layer at hand."""

    def __init__(self, function: Any, **buffers: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.function = function
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def autograd_function(m: Any, x: Tensor) -> Tensor:
    return Doubled.apply(m.fc(x))


def inplace_arithmetic(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    y += x
    y *= 2
    y[:, 0] = 0
    y[x.argmax(-1) == 0] = 1.0
    return y


def inplace_on_view(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x).float()
    row = y[0]
    low = y @ m.fc.weight
    row.add_(1)
    return low + y @ m.fc.weight


def write_between_casts(m: Any, x: Tensor) -> Tensor:
    y = x.clone()
    a = torch.mm(y, m.table)
    y.view(-1).mul_(0.5)
    m.table.view(-1)[0] = 7.0
    return a + torch.mm(y, m.table)


def factories(m: Any, x: Tensor) -> Tensor:
    noise = torch.randn(4) + torch.rand(x.shape[0], 1)
    grid = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
    return m.fc(x + noise + grid + torch.tensor(0.5) + torch.full((1,), 2.0))


def shape_arithmetic(m: Any, x: Tensor) -> Tensor:
    b, c = x.shape
    half = int(c / 2) if isinstance(c, int) else 0
    y = m.fc(x)[:, :half] * (1 / math.sqrt(max(b, 2))) * len(x)
    return y.reshape(x.size(0) * half)


def type_questions(m: Any, x: Any) -> Tensor:
    y = m.fc(x)
    if isinstance(y, tuple):
        y = y[0] * 0
    if torch.is_tensor(y) and isinstance(y, torch.Tensor) and not isinstance(x.shape[0], Tensor):
        y = y + 1
    return y


def guards(m: Any, x: Tensor) -> Tensor:
    assert x.dim() == 2, "two dimensions"
    if x.shape[1] != m.fc.in_features or not x.is_floating_point():
        raise ValueError("bad input")
    return m.fc(x)


def remember(m: Any, x: Tensor) -> Tensor:
    m.seen = m.fc(x)
    m.steps = m.steps + 1
    m.average = 0.9 * m.average + m.seen.detach().float().mean(0)
    return m.seen + m.average


def user_casts(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x).float()
    z = y.to(torch.bfloat16).to(x.dtype) + y.half().type_as(x) + y.double().float()
    return torch.mm(z, z.t()).to(m.fc.weight.dtype)


def many_outputs(m: Any, x: Tensor) -> Any:
    y = m.fc(x)
    values, indices = y.topk(2)
    low, high = y.chunk(2, dim=-1)
    return Pair(values, low), {"i": indices, "x": [high, None, 3]}, x


def dataclass_output(m: Any, x: Tensor) -> Output:
    return Output(m.fc(x), {"x": x})


def mask_constant(m: Any, x: Tensor) -> Tensor:
    scores = m.fc(x).float().masked_fill(x > 0, torch.finfo(torch.float32).min)
    return scores.softmax(-1) @ m.fc.weight


def closures(m: Any, x: Tensor) -> Tensor:
    return m.fc(x) + OUTSIDE


OUTSIDE = torch.arange(4.0)


@pytest.mark.parametrize(
    ("function", "buffers"),
    [
        (autograd_function, {}),
        (inplace_arithmetic, {}),
        (write_between_casts, {"table": torch.eye(4)}),
        (factories, {}),
        (shape_arithmetic, {}),
        (type_questions, {}),
        (guards, {}),
        (remember, {"steps": torch.zeros(()), "average": torch.zeros(4)}),
        (user_casts, {}),
        (many_outputs, {}),
        (mask_constant, {}),
        (closures, {}),
    ],
)
@pytest.mark.parametrize("policy", ["autocast", "full"])
def test_bitwise_eager(function: Any, buffers: dict[str, Tensor], policy: str) -> None:
    model = Net(function, **{name: tensor.clone() for name, tensor in buffers.items()})
    check_against_autocast(model, torch.randn(4, 4), policy=policy)


def test_a_write_through_a_view_is_seen_by_the_next_cast() -> None:
    check_against_autocast(Net(inplace_on_view), torch.randn(4, 4))


def test_output_classes_are_kept() -> None:
    amp = fxamp.convert(Net(many_outputs))
    pair, _, _ = amp(torch.randn(3, 4))
    assert isinstance(pair, Pair)
    output = fxamp.convert(Net(dataclass_output))(torch.randn(3, 4))
    assert isinstance(output, Output)
    assert output.value.shape == (3, 4)


def test_attributes_set_in_forward_are_set_at_run_time() -> None:
    amp = fxamp.convert(Net(remember, steps=torch.zeros(()), average=torch.zeros(4)))
    for step in (1, 2):
        out = amp(torch.randn(2, 4))
        assert amp.steps == step
        assert amp.seen.shape == out.shape


def test_guards_still_guard() -> None:
    amp = fxamp.convert(Net(guards))
    with pytest.raises(AssertionError, match=r"the model requires: x.dim\(\) == 2 is True"):
        amp(torch.randn(2, 2, 4))


def test_random_tensors_are_drawn_at_every_call() -> None:
    amp = fxamp.convert(Net(factories))
    x = torch.randn(2, 4)
    assert not torch.equal(amp(x), amp(x))


class Branch(nn.Module):
    """Branches on data."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return torch.mm(x, x)
        return -x


class Counter(nn.Module):
    """Keeps Python state."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Chance(nn.Module):
    """Draws from Python's random module."""

    def forward(self, x: Tensor) -> Tensor:
        return x * random.choice([0.0, 1.0])


class Keeper(nn.Module):
    """Keeps what it saw in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return x * len(self.seen)


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (Branch, "branches on a tensor value"),
        (Counter, "sets self.calls, which a graph cannot carry to the next call"),
        (Chance, "draws from Python's random module, which a graph would freeze"),
        (Keeper, "changes self.seen, which a graph cannot carry to the next call"),
    ],
)
def test_a_submodule_that_cannot_be_traced_stays_a_call(inner: type[nn.Module], reason: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), inner(), nn.Linear(4, 4))
    if inner is Chance:
        amp = fxamp.convert(model, dtype=torch.bfloat16)
        random.seed(0)
        assert len({getattr(amp, "1")(torch.ones(1)).item() for _ in range(9)}) == 2
    else:
        amp = check_against_autocast(model, torch.randn(4, 4))
    row = next(node for node in amp.report().to_dict()["nodes"] if node["op"] == inner.__name__)
    assert (row["rule"], row["reason"]) == ("opaque", reason)


@pytest.mark.parametrize("root", [Counter, Chance, Keeper])
def test_the_model_itself_cannot_stay_a_call(root: type[nn.Module]) -> None:
    model = root()
    before = {name: list(v) if isinstance(v, list) else v for name, v in model.__dict__.items()}
    with pytest.raises(fxamp.CaptureError, match=r"(?s)cannot trace .*\n\nhint: "):
        fxamp.convert(model)
    assert {name: model.__dict__[name] for name in before} == before


def test_a_region_around_a_call_that_is_rolled_back() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False), torch.no_grad():
                y = self.fc(x.float())
                if y.sum() > 0:
                    y = y + 1
            return self.fc(y)

    amp = check_against_autocast(nn.Sequential(nn.Linear(4, 4), Half(), nn.Linear(4, 4)), torch.randn(4, 4))
    assert [d.rule for d in amp.plan if d.rule] == ["lower", "opaque", "lower"]


class TestCallables:
    def test_a_decorated_function(self) -> None:
        @fxamp.convert
        def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float = 0.5) -> Tensor:
            return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v

        def eager(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.5) -> Tensor:
            return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v

        q, k, v = torch.randn(3, 2, 4, 4)
        with torch.autocast("cpu"):
            expected = eager(q, k, v), eager(q, k, v, 2.0)
        assert_same((attention(q, k, v), attention(q, k, v, scale=2.0)), expected)
        assert attention.report().model.endswith("attention")

    def test_a_function_over_modules_owns_their_parameters(self) -> None:
        net = nn.Linear(4, 4)

        def f(x: Tensor) -> Tensor:
            return net(x).relu()

        amp = fxamp.convert(f, dtype=torch.bfloat16)
        assert list(amp.state_dict()) == ["net.weight", "net.bias"]
        x = torch.randn(2, 4)
        with torch.autocast("cpu"):
            assert_same(amp(x), f(x))

    def test_a_method(self) -> None:
        class Codec(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 2)

            def encode(self, x: Tensor) -> Tensor:
                return self.fc(x).tanh()

        codec = Codec()
        amp = fxamp.convert(codec.encode, dtype=torch.bfloat16)
        x = torch.randn(2, 4)
        with torch.autocast("cpu"):
            assert_same(amp(x), codec.encode(x))
        assert list(amp.state_dict()) == list(codec.state_dict())


class TestArguments:
    def test_star_arguments(self) -> None:
        class Sum(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, *xs: Tensor, bias: Tensor | None = None) -> Tensor:
                total = sum(self.fc(x) for x in xs)
                return total if bias is None else total + bias

        for count in (1, 3):
            check_against_autocast(Sum(), *(torch.randn(2, 4) for _ in range(count)))
        check_against_autocast(Sum(), torch.randn(2, 4), bias=torch.randn(4))
        check_against_autocast(
            Sum(), torch.randn(2, 4), torch.randn(2, 4), loss=nn.MSELoss(), loss_args=(torch.zeros(2, 4),)
        )

    def test_keyword_arguments_of_a_model(self) -> None:
        class Kw(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x: Tensor, **extra: Any) -> Tensor:
                y = self.fc(x)
                return y * extra["scale"] if "scale" in extra else y

        check_against_autocast(Kw(), torch.randn(2, 4))
        check_against_autocast(Kw(), torch.randn(2, 4), scale=torch.tensor(3.0))

    def test_loss_arguments_come_after_the_models_required_ones(self) -> None:
        class Two(nn.Module):
            def forward(self, x: Tensor, y: Tensor, gain: float = 1.0) -> Tensor:
                return (x @ y) * gain

        def weighted(output: Tensor, target: Tensor, y: Tensor, power: int = 2) -> Tensor:
            return ((output - target).abs() ** power * y).mean()

        amp = fxamp.convert(Two(), weighted, dtype=torch.bfloat16)
        x, y, t, w = torch.randn(4, 3, 3)
        with torch.autocast("cpu"):
            output = Two()(x, y, 2.0)
            expected = weighted(output, t, w, 3), output
        assert_same(amp(x, y, t, w, gain=2.0, power=3), expected)
        assert_same(amp(x, y, target=t, loss_y=w, gain=2.0, power=3), expected)

    def test_wrong_arguments_are_a_type_error_like_the_models(self) -> None:
        amp = fxamp.convert(nn.Linear(4, 4))
        with pytest.raises(TypeError, match="missing a required argument: 'input'"):
            amp()
        with pytest.raises(TypeError, match="too many positional arguments"):
            amp(1, 2)

    def test_none_for_a_required_argument(self) -> None:
        class Maybe(nn.Module):
            def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
                return x if mask is None else x * mask

        amp = fxamp.convert(Maybe())
        assert_same(amp(torch.ones(2), None), torch.ones(2))
        assert_same(amp(torch.ones(2), torch.zeros(2)), torch.zeros(2))

    def test_example_inputs_of_every_form(self) -> None:
        model = nn.Linear(4, 4)
        x, y = torch.randn(2, 4), torch.randn(2, 4)
        for example in ((x, y), ((x,), {"target": y}), ((x, y), {})):
            amp = fxamp.convert(model, F.mse_loss, example_inputs=example, dtype=torch.bfloat16)
            assert amp.report().totals["dtype_unknown"] == 0
            assert amp(x, y)[0].dtype == torch.float32

    def test_example_inputs_tell_the_length_of_a_list(self) -> None:
        class Each(nn.Module):
            def forward(self, xs: list[Tensor]) -> Tensor:
                total = xs[0] * 0
                for x in xs:
                    total = total + x @ x
                return total

        xs = [torch.randn(3, 3) for _ in range(3)]
        amp = fxamp.convert(Each(), example_inputs=(xs,), dtype=torch.bfloat16)
        with torch.autocast("cpu"):
            assert_same(amp(xs), Each()(xs))
            assert_same(amp(xs[:2]), Each()(xs[:2]))


def test_the_graph_as_text() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))
    amp = fxamp.convert(model, dtype=torch.bfloat16, device_type="cuda")
    assert graph_text(amp.graph) == (
        "input_1 = placeholder input()\n"
        "_0_weight = get_attr 0.weight()\n"
        "_0_bias = get_attr 0.bias()\n"
        "cast_weights_bf16 = call_function cast_weights_bf16(_0_bias, _0_weight)\n"
        "_0_bias_bf16 = call_function getitem(cast_weights_bf16, 0)\n"
        "_0_weight_bf16 = call_function getitem(cast_weights_bf16, 1)\n"
        "input_1_bf16 = call_function soft_cast(input_1, bf16)\n"
        "linear = call_function linear(input_1_bf16, _0_weight_bf16, _0_bias_bf16)\n"
        "softmax = call_function softmax(linear, dim=-1, _stacklevel=5, dtype=f32)\n"
        "output = output output(softmax)"
    )


def test_the_seed_cases() -> None:
    def f(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Any:
        low = torch.mm(a, b)
        mixed = torch.mm(low, c)
        with torch.autocast("cpu", enabled=False):
            full = torch.mm(c.float(), mixed.float())
        again = torch.mm(d, full)
        return low, mixed, full, again

    tensors = torch.randn(4, 4, 4)
    amp = fxamp.convert(f, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = f(*tensors)
    found = amp(*tensors)
    assert_same(found, expected)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]


def default(value: Any, otherwise: Any) -> Any:
    """An idiom of many models."""
    return value if value is not None else otherwise() if callable(otherwise) else otherwise


def asks_what_can_be_called(m: Any, x: Tensor) -> Tensor:
    y: Tensor = default(None, m.fc(x)) + default(None, lambda: x) + default(None, m.fc.weight)
    assert not callable(x.shape[0])
    return y * 2 if callable(y.view) and callable(m.fc) else y


@pytest.mark.parametrize("examples", [False, True])
def test_a_traced_value_cannot_be_called(examples: bool) -> None:
    check_against_autocast(Net(asks_what_can_be_called), torch.randn(4, 4), examples=examples)
