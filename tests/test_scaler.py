"""The scaler against torch's: the same script driven on both."""

import copy
import pickle

import pytest
import torch

from fxamp.scaling import GradScaler
from tests.scaling import DEVICES, INF, NAN, OPTIMIZERS, SETTINGS, drive, overflowed, poison, small_model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_script_as_torch(name, unscale, device):
    bad = {0: INF, 4: NAN, 5: -INF}
    ours, theirs = (
        drive(kind(device, **SETTINGS), OPTIMIZERS[name], bad, unscale=unscale, device=device)
        for kind in (GradScaler, torch.amp.GradScaler)
    )
    assert ours[:2] == theirs[:2]
    assert ours[1] == [step not in bad for step in range(12)]
    torch.testing.assert_close(ours[2:], theirs[2:], rtol=0, atol=0)


@pytest.mark.parametrize("flaw", [{0: INF}, {7: NAN}])
def test_two_optimizers_and_nested_outputs_as_torch(flaw):
    results = []
    for kind in (GradScaler, torch.amp.GradScaler):
        models, scaler = [small_model(), small_model()], kind("cpu", **SETTINGS)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
        scales = []
        for step in range(9):
            losses = [m(torch.ones(2, 3)).mean() for m in models]
            first, (second,) = scaler.scale((losses[0], [losses[1]]))
            (first + second).backward()
            poison(models[0], step, flaw)
            scaler.unscale_(optimizers[1])
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        results.append((scales, [p.detach() for m in models for p in m.parameters()]))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


def test_is_a_torch_scaler_with_the_same_constructor():
    scaler = GradScaler("cpu", 8.0, 3.0, 0.25, 7, True)
    assert isinstance(scaler, torch.amp.GradScaler)
    assert scaler.state_dict() == torch.amp.GradScaler("cpu", 8.0, 3.0, 0.25, 7, True).state_dict()


@pytest.mark.parametrize("settings", [{"growth_factor": 1.0}, {"backoff_factor": 1.0}])
def test_constructor_errors_are_torchs(settings):
    with pytest.raises(AssertionError) as theirs:
        torch.amp.GradScaler("cpu", **settings)
    with pytest.raises(AssertionError) as ours:
        GradScaler("cpu", **settings)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_default_device_without_a_gpu_as_torch():
    for kind in (GradScaler, torch.amp.GradScaler):
        with pytest.warns(UserWarning, match=r"CUDA is not available\.  Disabling\."):
            assert not kind().is_enabled()


def mistakes(kind):
    """Every way to call the methods out of order, and the error each one gives."""
    model, scaler, found = small_model(), kind("cpu"), []
    optimizer = OPTIMIZERS["sgd"](model.parameters())

    def fails(call, *args, **kwargs):
        with pytest.raises((AssertionError, RuntimeError)) as error:
            call(*args, **kwargs)
        found.append((error.type, str(error.value)))

    fails(scaler.update)
    fails(scaler.step, optimizer)
    fails(scaler.unscale_, optimizer)
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    scaler.unscale_(optimizer)
    fails(scaler.unscale_, optimizer)
    fails(pickle.dumps, scaler)
    scaler.step(optimizer)
    fails(scaler.step, optimizer)
    fails(scaler.step, optimizer, closure=None)
    scaler.update()
    fails(scaler.update)
    fails(scaler.load_state_dict, {})
    return found


def test_state_errors_are_torchs():
    assert mistakes(GradScaler) == mistakes(torch.amp.GradScaler)


def test_closure_is_refused_by_position_too():
    scaler, _, optimizer = overflowed()
    with pytest.raises(RuntimeError, match=r"^Closure use is not currently supported if GradScaler is ena"):
        scaler.step(optimizer, lambda: 0.0)
    GradScaler("cpu", enabled=False).step(optimizer, lambda: 0.0)  # no scaling, no problem


@pytest.mark.parametrize("kinds", [(GradScaler, torch.amp.GradScaler), (torch.amp.GradScaler, GradScaler)])
def test_state_dict_goes_both_ways(kinds):
    source, target = (kind("cpu", **SETTINGS) for kind in kinds)
    drive(source, OPTIMIZERS["sgd"], {0: INF}, steps=3)
    state = source.state_dict()
    assert list(state) == ["scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"]
    target.load_state_dict(state)
    assert target.state_dict() == state
    runs = [drive(scaler, OPTIMIZERS["sgd"], {2: NAN}, steps=6) for scaler in (source, target)]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_pickle_and_copy(copied):
    scaler, *_ = overflowed(min_scale=2.0)
    scaler.update()
    twin = copied(scaler)
    assert (twin.state_dict(), twin.min_scale) == (scaler.state_dict(), 2.0)
    assert (twin.skipped, twin.overflow()) == (False, None)
    assert scaler.skipped
    runs = [drive(one, OPTIMIZERS["adamw"], {1: INF}, steps=3) for one in (scaler, twin)]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_backward_passes_its_options_on():
    a, b = (torch.ones((), requires_grad=True) for _ in range(2))
    loss, scaler = a * b, GradScaler("cpu", init_scale=8.0)
    scaler.backward(loss, retain_graph=True, inputs=[a])
    assert (a.grad, b.grad) == (8.0, None)
    scaler.backward(loss)
    assert (a.grad, b.grad) == (16.0, 8.0)


def test_disabled_passes_everything_on():
    model, scaler = small_model(), GradScaler("cpu", enabled=False)
    twin = copy.deepcopy(model)
    for net in (model, twin):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        loss = net(torch.ones(2, 3)).sum().bfloat16()
        if net is model:
            scaler.backward(loss)
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=0, atol=0)
    assert (scaler.skipped, scaler.overflow(), scaler.state_dict()) == (False, None, {})
    assert pickle.loads(pickle.dumps(scaler)).get_scale() == 1.0


class Slotted:
    """An optimizer of somebody's own, which is none of torch's."""

    __slots__ = ("param_groups", "steps")

    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters)}]
        self.steps = 0

    __hash__ = None

    def step(self, factor=1.0):
        self.steps += 1
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter -= factor * parameter.grad
        return factor


def test_an_optimizer_that_is_none_of_torchs():
    runs = []
    for kind in (GradScaler, torch.amp.GradScaler):
        model, scaler = small_model(), kind("cpu")
        optimizer = Slotted(model.parameters())
        returned = []
        for step in range(3):
            scaler.scale(model(torch.ones(2, 3)).sum()).backward()
            poison(model, step, {1: INF})
            returned.append(scaler.step(optimizer, factor=0.5))
            scaler.update()
            model.zero_grad()
        assert (optimizer.steps, returned) == (2, [0.5, None, 0.5])
        runs.append(([p.detach() for p in model.parameters()], scaler.state_dict()))
    torch.testing.assert_close(*runs, rtol=0, atol=0)
