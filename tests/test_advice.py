"""The advice on a first scale: what it says is lost is what float16 loses, and measuring leaves no trace."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxamp
from fxamp.scaling.advice import Advice
from tests.test_overflow import Apply, Network, converted, inputs


def batches(count=3):
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)) for _ in range(count)
    ]


class Spread(nn.Module):
    """One float16 value whose gradients are the weights given: from far below float16's range to within."""

    def __init__(self, exponents):
        super().__init__()
        self.linear = nn.Linear(1, len(exponents), bias=False)
        self.register_buffer("weights", 2.0 ** torch.tensor(exponents, dtype=torch.float64).float() * 1.5)

    def forward(self, x):
        return (self.linear(x).float() * self.weights).sum()


EXPONENTS = [-60.0, -45.0, -40.0, -30.0, -25.0, -20.0, -10.0, 0.0]


@pytest.mark.parametrize("bits", range(-4, 44, 4))
def test_the_shares_are_what_float16_loses(bits):
    amp = converted(Spread(EXPONENTS), None)
    advice = fxamp.GradScaler.advise(amp, [torch.ones(1, 1)])
    # The gradients of the output of linear, and of its cast weight; there are as many, and of one magnitude.
    counts = {int(e) + 1: 2 for e in EXPONENTS}
    assert advice == Advice(2.0**12, counts)
    scaled = (amp.weights * 2.0**bits).half()
    assert advice.lost(2.0**bits) == (scaled == 0).float().mean()
    assert advice.overflowing(2.0**bits) == scaled.isinf().float().mean()
    subnormal = (scaled != 0) & (scaled < torch.finfo(torch.float16).smallest_normal)
    assert advice.rounded(2.0**bits) == subnormal.float().mean()


def test_the_advised_scale_keeps_what_another_loses():
    amp = converted(Spread([-30.0, -28.0, -26.0, -12.0]), None)
    advice = fxamp.GradScaler.advise(amp, [torch.ones(1, 1)])
    reference = amp.weights[:, None]
    for scale, exact in ((advice.init_scale, True), (1.0, False)):
        scaler = fxamp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD(amp.parameters(), lr=0.0)
        scaler.backward(amp(torch.ones(1, 1)))
        scaler.step(optimizer)
        assert not scaler.skipped
        assert torch.equal(amp.linear.weight.grad, reference) == exact
        optimizer.zero_grad()


def test_measuring_leaves_no_trace():
    runs = []
    for measures in (False, True):
        torch.manual_seed(4)
        amp = converted()
        optimizer = torch.optim.AdamW(amp.parameters(), lr=0.01)
        losses = []
        for x, y in batches():
            loss = amp(x, y)[0]
            amp.scaler.backward(loss)
            if measures:
                before = [p.grad.clone() for p in amp.parameters()]
                fxamp.GradScaler.advise(amp, batches())
                torch.testing.assert_close([p.grad for p in amp.parameters()], before, rtol=0, atol=0)
            amp.scaler.step(optimizer)
            amp.scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append((losses, copy.deepcopy(amp.state_dict()), amp.scaler.state_dict(), torch.get_rng_state()))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_a_loss_outside_of_the_graph():
    torch.manual_seed(0)
    inside = fxamp.GradScaler.advise(converted().eval(), batches())
    outside = fxamp.GradScaler.advise(
        converted(loss=None).eval(), batches(), lambda amp, batch: F.cross_entropy(amp(batch[0]), batch[1])
    )
    # The loss's own gradient, of the logits, is cast from float32 in one graph, and comes in as float32 in the other.
    assert outside.init_scale == inside.init_scale


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def test_a_call_that_is_not_looked_into():
    amp = converted(Recurrent())
    advice = fxamp.GradScaler.advise(amp, [(torch.randn(4, 5, 8), torch.tensor([0, 1, 2, 3]))])
    assert advice.overflowing(advice.init_scale) == 0


def test_the_table():
    text = str(Advice.of({-40: 30, -20: 60, 1: 10}))
    assert text.splitlines() == [
        "100 gradients that float16 is to hold, from 2**-41 to 2**1; shares at each scale",
        "",
        "scale    becomes zero    loses bits    overflows",
        "-------  --------------  ------------  -----------  --------",
        "2**0     30.00%          60.00%        0",
        "2**4     30.00%          60.00%        0",
        "2**8     30.00%          0             0",
        "2**12    30.00%          0             0            <- start",
        "2**16    0               30.00%        10.00%",
        "2**20    0               30.00%        10.00%",
        "2**24    0               30.00%        10.00%",
    ]


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (Network, [], "cannot advise on Network: expected a module that was converted to float16"),
        (
            lambda: fxamp.convert(Network(), dtype=torch.bfloat16, device_type="cpu"),
            [],
            "cannot advise on AmpModule: expected a module that was converted to float16",
        ),
        (converted, [], "there is no batch to measure"),
        (lambda: converted(policy="full"), batches(1), "no gradient would be in float16"),
        (
            lambda: converted(loss=None),
            batches(1)[0][:1],
            "cannot run backward on this loss: found f32[16, 4] with 64 elements, expected a tensor with one real "
            "floating-point element",
        ),
    ],
)
def test_what_cannot_be_advised_on(make, given, message):
    with pytest.raises(fxamp.FxampError) as error:
        fxamp.GradScaler.advise(make(), given)
    assert error.value.message == message
    assert error.value.hint


def test_what_is_not_finite_is_not_counted():
    amp = converted(Apply(lambda x: x / 0), None)
    assert fxamp.GradScaler.advise(amp, [inputs()[0]]).counts == {-6: 128}  # of the mean, before it is divided by 0
