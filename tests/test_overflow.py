"""Where a skipped step came from: the first value that is not finite is named, and what is proposed helps."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxamp

INF = math.inf


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Network(nn.Module):
    """Residual blocks with dropout, a batch norm and a head: random numbers, buffers, values with several uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.drop, self.norm, self.head = nn.Dropout(0.2), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(self.drop(x)))


class Apply(nn.Module):
    """A linear layer, then a function, then the mean as the loss."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.function = nn.Linear(8, 8), function

    def forward(self, x):
        return self.function(self.first(x)).float().mean()


def inputs(rows=16):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 8, generator=generator), torch.randint(0, 4, (rows,), generator=generator)


def converted(model=None, loss=F.cross_entropy, **options):
    return fxamp.convert(model or Network(), loss, dtype=torch.float16, device_type="cpu", **options)


def step(amp, *args, loss=lambda result: result[0], optimizer=None):
    """A whole iteration; what is said of it."""
    optimizer = optimizer or torch.optim.SGD(amp.parameters(), lr=0.1)
    amp.scaler.backward(loss(amp(*args)))
    amp.scaler.step(optimizer)
    amp.scaler.update()
    optimizer.zero_grad()
    return amp.scaler.overflow()


def enlarge(model, path, factor):
    with torch.no_grad():
        model.get_parameter(path).mul_(factor)


# -- forward -----------------------------------------------------------------------------------------------


def test_the_forward_call_is_named_with_what_helps():
    amp = converted()
    enlarge(amp, "blocks.1.up.weight", 3e4)
    enlarge(amp, "blocks.1.down.weight", 300)
    found = step(amp, *inputs())
    assert (found.phase, found.node, found.op, found.module) == ("forward", "linear_3", "F.linear", "blocks.1.down")
    assert (found.value, found.dtype, found.source.partition(":")[0]) == ("inf", torch.float16, __file__)
    assert 1e4 < found.largest <= 65504
    assert found.overrides == {"blocks.1.down": "fp32"}
    assert amp.replan(amp.policy.with_modules(found.overrides)).plan["linear_3"].rule == "fp32"


def test_the_text():
    amp = converted(Apply(lambda x: x * 6e4 * x), None)
    text = str(step(amp, inputs()[0], loss=lambda result: result))
    line = text.splitlines()
    assert line[0].startswith("first non-finite value: inf in f16 in the forward pass of 'mul' (operator.mul, ")
    assert line[1].startswith("finite before it: up to ")
    assert line[1].endswith("; f16 ends at 65504")
    assert line[2] == "to compute it in float32: amp.replan(amp.policy.with_ops({'aten::mul': 'fp32'}))"


def test_every_place_in_the_forward():
    for path, _ in Network().named_modules():
        if "up" not in path and "down" not in path and path != "head":
            continue
        amp = converted()
        enlarge(amp, f"{path}.weight", 6.0e4 / amp.get_parameter(f"{path}.weight").abs().max())
        found = step(amp, inputs()[0] * 1e3, inputs()[1])
        assert (found.phase, found.module) == ("forward", path)


def test_a_weight_that_float16_cannot_hold_is_named_at_its_cast():
    amp = converted()
    with torch.no_grad():
        amp.blocks[2].down.weight[0, 0] = 1e6
    found = step(amp, *inputs())
    assert (found.phase, found.module, found.overrides) == ("forward", "blocks.2.down", {"blocks.2.down": "fp32"})
    assert found.largest == 1e6
    assert found.note.startswith("its input does not fit when it is cast")


def test_calls_are_named_in_the_order_of_the_model_and_not_of_the_casts():
    model = Network()
    amp = converted(model)
    enlarge(amp, "blocks.0.up.weight", 1e5)
    with torch.no_grad():
        amp.head.weight[0, 0] = 1e6
    found = step(amp, inputs()[0] * 10, inputs()[1])
    assert (found.phase, found.module) == ("forward", "blocks.0.up")


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_parameter_that_is_not_finite(bad):
    amp = converted()
    with torch.no_grad():
        amp.norm.weight[3] = bad
    found = step(amp, *inputs())
    assert (found.phase, found.module, found.overrides) == ("forward", "norm", {})
    assert "'norm.weight' of the model is not finite when it comes in" in str(found)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_an_input_that_is_not_finite(bad):
    x, y = inputs()
    x[3, 4] = bad
    found = step(converted(), x, y)
    assert (found.phase, found.op, found.overrides) == ("forward", "placeholder", {})
    assert "an input of the model is not finite when it comes in: look at what makes it" in str(found)


def test_what_float32_does_not_mend_gets_no_override():
    amp = converted(Apply(lambda x: torch.sqrt(-x.abs() - 1)), None)
    found = step(amp, inputs()[0], loss=lambda result: result)
    assert (found.phase, found.op, found.value, found.overrides) == ("forward", "torch.sqrt", "nan", {})
    assert "in float32 it is not finite either" in str(found)


class Attention(nn.Module):
    def __init__(self, mask):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.mask_kind = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), mask
        self.register_buffer("mask", torch.full((16, 16), -INF).triu(1))

    def forward(self, x, given=None):
        scores = self.q(x) @ self.k(x).T
        if self.mask_kind == "buffer":
            scores = scores + self.mask
        elif self.mask_kind == "given":
            scores = scores + given
        else:
            scores = scores.masked_fill(self.mask < 0, -INF)
        return (scores.softmax(-1) @ self.v(x)).float().square().mean()


@pytest.mark.parametrize("kind", ["buffer", "filled", "given"])
def test_an_infinity_that_is_meant_is_not_blamed(kind):
    amp = converted(Attention(kind), None)
    args = (inputs()[0], amp.mask.clone()) if kind == "given" else (inputs()[0],)
    assert step(amp, *args, loss=lambda result: result) is None
    for path in ("q", "k"):
        enlarge(amp, f"{path}.weight", 1000)
    found = step(amp, *args, loss=lambda result: result)
    assert (found.phase, found.node) == ("forward", "matmul")


def test_a_row_that_is_masked_whole_is_blamed_on_the_softmax():
    amp = converted(Attention("given"), None)
    found = step(amp, inputs()[0], torch.full((16, 16), -INF), loss=lambda result: result)
    assert (found.phase, found.node, found.value) == ("forward", "softmax", "nan")


class Scaled(nn.Module):
    """A layer whose output is multiplied by a buffer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("gain", torch.tensor(1.0))

    def forward(self, x):
        return self.inner(x) * self.gain


@pytest.mark.parametrize("bad", [INF, -INF])
def test_an_infinite_buffer_is_no_mask_when_it_multiplies(bad):
    model = Network()
    model.blocks[1].up = nn.Sequential(Scaled(), model.blocks[1].up)
    amp = converted(model)
    amp.blocks[1].up[0].gain.fill_(bad)
    found = step(amp, *inputs())
    assert (found.phase, found.module) == ("forward", "blocks.1.up.0")


def test_a_negative_infinity_among_data_is_no_mask():
    x, y = inputs()
    x[3, 4] = -INF
    found = step(converted(), x, y)
    assert (found.phase, found.op) == ("forward", "placeholder")


def test_the_mask_of_a_module_that_is_not_traced_into_is_not_blamed():
    attention = Attention("buffer")
    attention.register_forward_hook(lambda module, args, output: None)
    amp = converted(nn.Sequential(attention), None)
    for path in ("0.q", "0.k"):
        enlarge(amp, f"{path}.weight", 1000)
    found = step(amp, inputs()[0], loss=lambda result: result)
    assert (found.phase, found.module, found.value) == ("forward", "0", "nan")
    assert "mask" not in found.note


def test_an_infinity_that_leaves_no_trace_but_in_the_gradient():
    amp = converted(Apply(lambda x: 1 / torch.exp(x.half() * 0 + 12)), None)
    found = step(amp, inputs()[0], loss=lambda result: result)
    assert (found.phase, found.op) == ("forward", "torch.exp")


# -- backward ----------------------------------------------------------------------------------------------


class Explode(torch.autograd.Function):
    """The value itself, and its gradient times a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (factor,) = ctx.saved_tensors
        return gradient * factor, None


class Exploding(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(1.0))

    def forward(self, x):
        return Explode.apply(x, self.factor)


@pytest.mark.parametrize("factor", [INF, math.nan])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_place_in_the_backward(place, factor):
    model = Network()
    for block in model.blocks:
        block.down = nn.Sequential(block.down, Exploding())
    amp = converted(model)
    amp.get_submodule(f"blocks.{place}.down.1").factor.fill_(factor)
    found = step(amp, *inputs())
    assert found.module == f"blocks.{place}.down.1"
    assert found.phase == "forward"  # the buffer is a value of it


def test_a_scale_that_is_too_large_for_a_gradient():
    amp = converted(Apply(lambda x: x * 3e4), None)
    found = step(amp, inputs()[0] * 1e-3, loss=lambda result: result)
    assert (found.phase, found.op, found.value, found.dtype) == ("backward", "operator.mul", "inf", torch.float16)
    assert "a smaller scale may be all it takes" in found.note
    for overrides in ({"aten::mul": "fp32"}, {"first": "fp32"}):  # the gradient is cast one call later, then
        assert found.overrides == overrides
        kind = amp.policy.with_ops if "aten::mul" in overrides else amp.policy.with_modules
        amp = amp.replan(kind(overrides))
        found = step(amp, inputs()[0] * 1e-3, loss=lambda result: result)
    assert found is None


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_that_was_written_to_is_named_alone(clip_norm):
    amp = converted()
    optimizer = torch.optim.SGD(amp.parameters(), lr=0.1)
    amp.scaler.backward(amp(*inputs())[0])
    amp.blocks[1].up.weight.grad[0, 0] = math.nan
    amp.scaler.step(optimizer, clip_norm=clip_norm)
    found = amp.scaler.overflow()
    assert (found.parameters, found.module, found.value) == (("blocks.1.up.weight",), "blocks.1.up", "")


# -- several calls -----------------------------------------------------------------------------------------


def layer():
    return fxamp.convert(nn.Sequential(nn.Linear(8, 8)), dtype=torch.float16, device_type="cpu")


def chain(calls, parameters, factor=1.0):
    """What is said of a step through several calls, each of what the one before gave."""
    optimizer, scaler = torch.optim.SGD(parameters, lr=0.1), fxamp.GradScaler("cpu", init_scale=1024.0)
    x = torch.ones(4, 8)
    for call in calls:
        x = call(x)
    scaler.backward(x.float().mean() * factor)
    scaler.step(optimizer)
    scaler.update()
    return scaler.overflow()


def set_weight(amp, value):
    with torch.no_grad():
        amp.get_parameter("0.weight").fill_(value)


@pytest.mark.parametrize("turned", [False, True])
def test_of_several_modules_the_one_that_made_it_is_named(turned):
    kept = []
    for _ in range(4):  # they are found in no order of their own
        first, second = [layer(), layer()][:: -1 if turned else 1]
        kept += [first, second]
        set_weight(first, 6e4)
        found = chain([first, second], [*first.parameters(), *second.parameters()])
        assert (found.phase, found.op, found.module) == ("forward", "F.linear", "0")
        set_weight(first, 0.0)
        set_weight(second, 3e3)
        found = chain([first, second], [*first.parameters(), *second.parameters()])
        assert (found.phase, found.op, found.module) == ("backward", "F.linear", "0")


def test_of_several_calls_of_one_module_the_one_that_made_it_is_named():
    amp = layer()
    set_weight(amp, 1e3)
    found = chain([amp, amp], amp.parameters())
    assert (found.phase, found.op) == ("forward", "F.linear")
    assert found.largest == pytest.approx(8e3, rel=0.01)


def test_a_module_whose_parameters_are_not_trained_may_have_made_it():
    generator, judge = layer(), layer()
    set_weight(judge, 3e3)
    found = chain([generator, judge], [*generator.parameters()])
    assert (found.phase, found.op, found.module) == ("backward", "F.linear", "0")
    assert found.largest == 32


def test_a_function_without_parameters_may_have_made_it():
    multiply = fxamp.convert(lambda x, w: x @ w, dtype=torch.float16, device_type="cpu")
    weight = torch.full((8, 8), 3e3, requires_grad=True)
    found = chain([lambda x: x * weight[0, 0] / 3e4, lambda x: multiply(x, weight)], [weight])
    assert (found.phase, found.op) == ("backward", "operator.matmul")


def test_a_backward_pass_may_come_after_the_report():
    model = Network()
    model.blocks[1].up = nn.Sequential(Scaled(), model.blocks[1].up)
    gradients = []
    for looks in (False, True):
        amp = converted(copy.deepcopy(model))
        optimizer = torch.optim.SGD(amp.parameters(), lr=0.1)
        torch.manual_seed(3)
        first, second = amp(*inputs())[0], amp(*inputs())[0]
        amp.scaler.backward(first * INF)
        amp.scaler.step(optimizer)
        if looks:
            assert amp.scaler.overflow().phase == "backward"
        amp.scaler.update()
        optimizer.zero_grad()
        amp.scaler.backward(second)
        gradients.append([parameter.grad for parameter in amp.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


class Double(nn.Module):
    def forward(self, x):
        return x + x


def test_the_gradients_of_an_input_may_not_fit_when_they_are_added():
    first, second = layer(), fxamp.convert(Double(), dtype=torch.float16, device_type="cpu")
    set_weight(first, 0.0)
    found = chain([first, second], [*first.parameters()], factor=1500.0)
    assert (found.phase, found.op, found.node) == ("backward", "placeholder", "x")


def test_with_nothing_but_inputs_to_name_it_is_the_first():
    first, second = layer(), layer()
    with torch.no_grad():
        first.get_parameter("0.bias").fill_(0)
    found = chain([lambda x: x * INF, first, second], [*first.parameters(), *second.parameters()])
    assert (found.phase, found.op, found.value) == ("forward", "placeholder", "inf")
