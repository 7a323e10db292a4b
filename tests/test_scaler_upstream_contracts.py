"""What torch's scaler refuses, and what it agrees on with optimizers that know of scaling: torch's class and ours."""

import copy
import pickle

import pytest
import torch

from tests.test_scaler_upstream import KINDS, SETTINGS, optimizer_for, ready

INF, NAN = float("inf"), float("nan")
pytestmark = pytest.mark.parametrize("kind", KINDS)


def at(stage, scaler, optimizer):
    """A scaler whose optimizer is as far as that."""
    if stage != "unused":
        scaler.scale(torch.zeros(()))
    if stage in ("unscaled", "stepped"):
        getattr(scaler, {"unscaled": "unscale_", "stepped": "step"}[stage])(optimizer)
    return scaler


CLOSURE, UNUSED = "Closure use is not currently supported", "but _scale is None.  This may indicate your script"
NEW_SCALE = "new_scale should be a float or a 1-element"
# What the scaler was made to do before, the call, and the error.
MISTAKES = [
    ("unused", lambda s, o: s.unscale_(o), AssertionError, f"Attempted unscale_ {UNUSED}"),
    ("unused", lambda s, o: s.step(o), AssertionError, f"Attempted step {UNUSED}"),
    ("unused", lambda s, o: s.update(), AssertionError, f"Attempted update {UNUSED}"),
    ("unused", lambda s, o: s.update(2.0), AssertionError, f"Attempted update {UNUSED}"),
    ("unused", lambda s, o: s.step(o, closure=None), RuntimeError, CLOSURE),
    ("unused", lambda s, o: s.load_state_dict({}), RuntimeError, "The source state dict is empty"),
    ("scaled", lambda s, o: s.update(), AssertionError, "No inf checks were recorded prior to update"),
    ("scaled", lambda s, o: s.update(torch.ones(2)), AssertionError, NEW_SCALE),
    ("scaled", lambda s, o: s.update(torch.ones((), device="meta")), AssertionError, NEW_SCALE),
    ("scaled", lambda s, o: s.update(torch.ones((), requires_grad=True)), AssertionError, NEW_SCALE),
    ("unscaled", lambda s, o: s.unscale_(o), RuntimeError, r"unscale_\(\) has already been called on this optimizer"),
    ("unscaled", lambda s, o: pickle.dumps(s), AssertionError, "may only be pickled at the beginning of an iteration"),
    ("stepped", lambda s, o: s.unscale_(o), RuntimeError, r"unscale_\(\) is being called after step\(\)"),
    ("stepped", lambda s, o: s.step(o), RuntimeError, r"step\(\) has already been called since the last update\(\)"),
    ("stepped", lambda s, o: s.step(o, closure=None), RuntimeError, CLOSURE),
    ("stepped", lambda s, o: copy.deepcopy(s), AssertionError, "may only be pickled at the beginning of an iteration"),
]


@pytest.mark.parametrize(("stage", "call", "error", "text"), MISTAKES)
def test_mistakes(kind, stage, call, error, text):
    optimizer = optimizer_for(torch.ones(2))
    with pytest.raises(error, match=text):
        call(at(stage, kind("cpu"), optimizer), optimizer)


@pytest.mark.parametrize("call", ["unscale_", "step"])
def test_float16_gradients_are_refused(kind, call):
    scaler, optimizer = ready(kind, torch.ones(2), torch.ones(2, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"Attempting to unscale FP16 gradients\."):
        getattr(scaler, call)(optimizer)


@pytest.mark.parametrize("factor", ["growth_factor", "backoff_factor"])
def test_factors_that_do_nothing_are_refused(kind, factor):
    with pytest.raises(AssertionError, match="factor must be"):
        kind("cpu", **{factor: 1.0})


class Aware(torch.optim.Optimizer):
    """Gradient descent that is told of the scale and of overflow, instead of not being called."""

    _step_supports_amp_scaling = True

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.told = []

    def descend(self, scale, skip):
        for parameter in self.param_groups[0]["params"]:
            if not skip:
                parameter.data.sub_(parameter.grad / scale)


class ReadsAttributes(Aware):
    """Reads ``grad_scale`` and ``found_inf``, which are set while it steps."""

    def step(self, closure=None):
        assert isinstance(self.found_inf, torch.Tensor)
        self.scaled = self.grad_scale is not None
        self.told.append(self.found_inf.item())
        self.descend(1.0 if self.grad_scale is None else self.grad_scale, self.found_inf.item())
        return 5.0


class TakesScaler(Aware):
    """Takes the scaler itself and does all of its work, which torch is about to stop."""

    def step(self, closure=None, *, factor=1.0, grad_scaler=None):
        assert not hasattr(self, "grad_scale")
        assert not hasattr(self, "found_inf")
        before = [p.grad.clone() for p in self.param_groups[0]["params"]]
        grad_scaler.unscale_(self)
        found = sum(flag.item() for flag in grad_scaler._found_inf_per_device(self).values())
        self.told.append((grad_scaler, before))
        self.descend(factor, found)
        return factor


@pytest.mark.parametrize("preset", [None, 4.0])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("value", [8.0, INF, NAN])
def test_optimizer_that_reads_attributes(kind, value, first, preset):
    scaler, plain = ready(
        kind, torch.full((2,), value * 64 * (preset or 1.0)), torch.full((3,), 64.0 * (preset or 1.0))
    )
    optimizer = ReadsAttributes(plain.param_groups[0]["params"])
    if preset:
        optimizer.grad_scale = torch.tensor(preset)
    if first:
        scaler.unscale_(optimizer)
    assert scaler.step(optimizer) == 5.0
    assert optimizer.scaled == (not first or preset is not None)
    finite = value == 8.0
    assert optimizer.told == [float(not finite)]
    assert [p.tolist() for p in optimizer.param_groups[0]["params"]] == (
        [[-8.0] * 2, [-1.0] * 3] if finite else [[0.0] * 2, [0.0] * 3]
    )
    assert not hasattr(optimizer, "found_inf")
    assert preset or not hasattr(optimizer, "grad_scale")
    scaler.update()
    assert scaler.get_scale() == (64.0 if finite else 16.0)


@pytest.mark.parametrize("value", [8.0, INF, NAN])
def test_optimizer_that_takes_the_scaler(kind, value):
    scaler, plain = ready(kind, torch.full((2,), value * 64))
    optimizer = TakesScaler(plain.param_groups[0]["params"])
    with pytest.warns(FutureWarning, match="grad_scale"):
        assert scaler.step(optimizer, factor=2.0) == 2.0
    ((told, gradients),) = optimizer.told
    assert told is scaler
    torch.testing.assert_close(gradients, [torch.full((2,), value * 64)], equal_nan=True, rtol=0, atol=0)
    assert optimizer.param_groups[0]["params"][0].tolist() == ([-4.0] * 2 if value == 8.0 else [0.0] * 2)
    scaler.update()
    assert scaler.get_scale() == (64.0 if value == 8.0 else 16.0)


class Returns(torch.optim.SGD):
    def step(self, *args, **kwargs):
        super().step()
        return args, kwargs


@pytest.mark.parametrize("enabled", [True, False])
def test_step_passes_on_and_returns(kind, enabled):
    for value, expected in ((1.0, ((3,), {"key": 4})), (INF, None)):
        scaler = kind("cpu", **SETTINGS, enabled=enabled)
        scaler.scale(torch.zeros(()))
        optimizer = Returns(optimizer_for(torch.full((2,), value)).param_groups[0]["params"])
        assert scaler.step(optimizer, 3, key=4) == (expected if enabled else ((3,), {"key": 4}))
