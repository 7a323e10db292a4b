"""The scaler against torch's: the same script driven on both, then what fxamp adds."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from fxamp.errors import FxampError
from fxamp.scaling import GradScaler, Overflow

INF, NAN = float("inf"), float("nan")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    # No momentum: torch 2.13 reads an uninitialized buffer where the very first step is skipped.
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}
SETTINGS = {"init_scale": 1024.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 3}


def small_model(device="cpu"):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(device)


def poison(model, step, bad):
    """Put a non-finite value into one gradient at the steps that ``bad`` names."""
    if step in bad:
        model[2].weight.grad[0, 1] = bad[step]


def drive(scaler, make, bad, *, steps=12, unscale=False, device="cpu"):
    """One training script; what it did, as plain values to compare bitwise."""
    model = small_model(device)
    optimizer = make(model.parameters())
    scales, moved = [], []
    data = torch.randn(steps, 5, 3, generator=torch.Generator().manual_seed(2)).to(device)
    for step in range(steps):
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(model(data[step]).square().mean()).backward()
        poison(model, step, bad)
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
        scales.append(scaler.get_scale())
        optimizer.zero_grad()
    return scales, moved, [p.detach().clone() for p in model.parameters()], optimizer.state_dict()["state"]


def overflowed(device="cpu", make=OPTIMIZERS["sgd"], **settings):
    """A scaler right after a skipped step, with its model and optimizer."""
    model = small_model(device)
    optimizer, scaler = make(model.parameters()), GradScaler(device, **settings)
    scaler.backward(model(torch.ones(2, 3, device=device)).sum())
    poison(model, 0, {0: INF})
    scaler.step(optimizer)
    return scaler, model, optimizer


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


def test_floor_keeps_the_scale_alive():
    every_step = dict.fromkeys(range(200), INF)
    torchs = drive(torch.amp.GradScaler("cpu"), OPTIMIZERS["sgd"], every_step, steps=200)[0]
    scaler = GradScaler("cpu", growth_interval=1, max_skips=None)
    ours = drive(scaler, OPTIMIZERS["sgd"], every_step, steps=200)[0]
    assert torchs[-1] == 0.0
    assert ours[:30] == torchs[:30]
    assert ours[-1] == 2.0**-14
    scales, moved, *_ = drive(scaler, OPTIMIZERS["sgd"], {}, steps=3)
    assert scales == [2.0**-13, 2.0**-12, 2.0**-11]
    assert all(moved)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 2.0**-14),
        ({"init_scale": 2.0**-20}, 2.0**-20),
        ({"min_scale": 64.0}, 64.0),
        ({"min_scale": 0}, 0.0),
    ],
)
def test_where_the_floor_is(settings, expected):
    scaler = GradScaler("cpu", max_skips=None, **settings)
    assert scaler.min_scale == expected
    every_step = dict.fromkeys(range(200), INF)
    assert drive(scaler, OPTIMIZERS["fused sgd"], every_step, steps=200)[0][-1] == expected


def test_floor_revives_a_dead_checkpoint():
    dead, scaler = torch.amp.GradScaler("cpu"), GradScaler("cpu")
    dead.load_state_dict(dead.state_dict() | {"scale": 0.0})
    scaler.load_state_dict(dead.state_dict())
    assert scaler.get_scale() == 2.0**-14
    for one, finite in ((scaler, True), (dead, False)):
        parameters = drive(one, OPTIMIZERS["sgd"], {}, steps=2)[2]
        assert all(p.isfinite().all().item() for p in parameters) == finite


@pytest.mark.parametrize("floor", [-1.0, 16.0, INF, NAN])
def test_floor_that_is_none(floor):
    with pytest.raises(FxampError) as error:
        GradScaler("cpu", init_scale=8.0, min_scale=floor)
    assert str(error.value) == (
        f"min_scale={floor} is not a floor for init_scale=8.0: expected a number from 0 to 8.0\n\n"
        "hint: lower min_scale, or leave it out"
    )


@pytest.mark.parametrize("new_scale", [3, 3.0, torch.tensor(3.0), 2.0**-30])
def test_update_takes_any_number_as_it_is(new_scale):
    scaler, *_ = overflowed()
    scaler.update(new_scale)
    assert scaler.get_scale() == float(new_scale)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skipped_waits_for_the_device_only_when_read(name, monkeypatch):
    reads, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append(1) or item(self))
    counts = []
    for kind in (GradScaler, torch.amp.GradScaler):
        model, scaler = small_model(), kind("cpu")
        optimizer = OPTIMIZERS[name](model.parameters())
        for step in range(3):
            scaler.scale(model(torch.ones(2, 3)).sum()).backward()
            poison(model, step, {1: INF})
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        counts.append(len(reads))
        reads.clear()
        if kind is GradScaler:
            assert not scaler.skipped
            assert not reads  # the host knew, or the flag is asked as a bool
    assert counts[0] == counts[1]
    if "fused" in name:
        assert counts[0] == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skipped_follows_the_last_step(name):
    model, scaler = small_model(), GradScaler("cpu")
    optimizer = OPTIMIZERS[name](model.parameters())
    assert not scaler.skipped
    for step in range(4):
        scaler.backward(model(torch.ones(2, 3)).sum())
        poison(model, step, {1: INF, 3: NAN})
        scaler.step(optimizer)
        assert scaler.skipped == (step in {1, 3})
        scaler.update()
        optimizer.zero_grad()
        assert scaler.skipped == (step in {1, 3})


def test_skipped_is_the_last_steps_own_with_two_optimizers():
    models, scaler = [small_model(), small_model()], GradScaler("cpu")
    good, bad = (torch.optim.SGD(m.parameters(), lr=0.1) for m in models)
    scaler.backward(sum(m(torch.ones(2, 3)).sum() for m in models))
    poison(models[1], 0, {0: INF})
    scaler.unscale_(good)
    scaler.step(bad)
    assert scaler.skipped
    scaler.step(good)
    scaler.update()  # torch adds the flags of both up in the first one
    assert not scaler.skipped


def test_overflow_names_the_parameters():
    scaler, model, _ = overflowed()
    assert str(scaler.overflow()) == "non-finite gradients in 1 parameter: param_groups[0]['params'][2]"
    model[0].bias.grad.fill_(NAN)
    scaler.update()
    assert scaler.overflow() == Overflow(("param_groups[0]['params'][1]", "param_groups[0]['params'][2]"))


def test_overflow_has_the_names_that_the_optimizer_was_given():
    model = small_model()
    optimizer, scaler = torch.optim.SGD(model.named_parameters(), lr=0.1), GradScaler("cpu")
    scaler.backward(model(torch.ones(2, 3)).sum())
    poison(model, 0, {0: INF})
    scaler.step(optimizer)
    assert scaler.overflow() == Overflow(("2.weight",))


def test_overflow_says_when_it_comes_too_late():
    scaler, _, optimizer = overflowed()
    optimizer.zero_grad()
    late = "non-finite gradients, cleared since: call overflow() between step() and zero_grad()"
    assert str(scaler.overflow()) == late
    del optimizer
    assert str(overflowed()[0].overflow()) == late


def test_overflow_is_none_without_one():
    scaler, model, optimizer = overflowed()
    scaler.update()
    optimizer.zero_grad()
    scaler.backward(model(torch.ones(2, 3)).sum())
    scaler.step(optimizer)
    assert scaler.overflow() is None
    assert GradScaler("cpu").overflow() is None


def test_overflow_shortens_a_long_list():
    text = str(Overflow(tuple(f"layer{i}" for i in range(11))))
    assert text.startswith("non-finite gradients in 11 parameters: layer0, ")
    assert text.endswith("layer7 and 3 more")


def test_overflow_reads_sparse_gradients():
    table = nn.Embedding(4, 2, sparse=True)
    optimizer, scaler = torch.optim.SGD(table.named_parameters(), lr=0.1), GradScaler("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about sparse invariant checks
        scaler.backward((table(torch.tensor([1, 1])) * INF).sum())
        scaler.step(optimizer)
        assert scaler.overflow() == Overflow(("weight",))


BAD_LOSSES = {
    "vector": (
        torch.ones(2, 3),
        "found f32[2, 3] with 6 elements",
        "reduce it to one number, for example loss.mean()",
    ),
    "empty": (
        torch.ones(0),
        "found f32[0] with 0 elements",
        "reduce it to one number, for example loss.mean()",
    ),
    "integer": (
        torch.tensor(1),
        "found i64[]",
        "compute the loss from floating-point outputs; an integer has no gradient",
    ),
    "complex": (
        torch.tensor(1j),
        "found c64[]",
        "take a real number of it, for example loss.abs()",
    ),
    "tuple": ((torch.ones(()), 1), "found a tuple", "unpack it first: loss, output = amp(...)"),
    "number": (1.0, "found a float", "pass the tensor that the loss function returned"),
    "count": (1, "found an int", "pass the tensor that the loss function returned"),
}


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("name", BAD_LOSSES)
def test_backward_refuses_what_is_no_loss(name, enabled):
    loss, found, hint = BAD_LOSSES[name]
    with pytest.raises(FxampError) as error:
        GradScaler("cpu", enabled=enabled).backward(loss)
    assert str(error.value) == (
        f"cannot run backward on this loss: {found}, expected a tensor with one real floating-point "
        f"element\n\nhint: {hint}"
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_backward_scales_every_real_loss(dtype, shape, monkeypatch):
    scaled, scale = [], torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda *a: scaled.append(scale(*a)) or scaled[-1])
    weight = torch.full(shape, 300.0, dtype=dtype, requires_grad=True)
    GradScaler("cpu", init_scale=2.0**15).backward(weight * 2)
    assert scaled[0].dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert scaled[0].item() == 600 * 2.0**15  # beyond float16
    assert torch.equal(weight.grad, torch.full(shape, 2.0**16, dtype=dtype))  # inf in float16


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


@pytest.mark.parametrize("enabled", [True, False])
def test_small_gradients_survive_in_float16(enabled):
    weight = torch.ones(4, requires_grad=True)
    optimizer, scaler = torch.optim.SGD([weight], lr=0.0), GradScaler("cpu", enabled=enabled)
    scaler.backward((weight.half() * 0.01).float().mean() * 1e-7)
    scaler.unscale_(optimizer)
    expected = 0.01 * 1e-7 / 4 if enabled else 0.0
    assert math.isclose(weight.grad[0].item(), expected, rel_tol=1e-2)
