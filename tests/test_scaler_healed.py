"""What torch's scaler does not do: bounds, errors that help, gradients of any kind, no needless wait."""

import math
import warnings

import pytest
import torch
from torch import nn

from benchmarks.scaler import Counted
from fxamp.errors import FxampError
from fxamp.scaling import GradScaler, Overflow
from tests.scaling import INF, NAN, OPTIMIZERS, drive, overflowed, poison, small_model


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


@pytest.mark.parametrize("new_scale", [3, 3.0, torch.tensor(3.0), torch.tensor([3.0]), 2.0**-30])
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


@pytest.mark.parametrize("enabled", [True, False])
def test_small_gradients_survive_in_float16(enabled):
    weight = torch.ones(4, requires_grad=True)
    optimizer, scaler = torch.optim.SGD([weight], lr=0.0), GradScaler("cpu", enabled=enabled)
    scaler.backward((weight.half() * 0.01).float().mean() * 1e-7)
    scaler.unscale_(optimizer)
    expected = 0.01 * 1e-7 / 4 if enabled else 0.0
    assert math.isclose(weight.grad[0].item(), expected, rel_tol=1e-2)


# -- the cap ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 2.0**24),
        ({"init_scale": 2.0**30}, 2.0**30),
        ({"max_scale": 2.0**17}, 2.0**17),
        ({"max_scale": INF}, 2.0**36),
    ],
)
def test_where_the_cap_is(settings, expected):
    scaler = GradScaler("cpu", growth_interval=1, **settings)
    assert scaler.max_scale == settings.get("max_scale", expected)
    scales = drive(scaler, OPTIMIZERS["sgd"], {}, steps=20)[0]
    assert scales[-1] == expected == max(scales)


def test_cap_takes_a_checkpoint_down():
    scaler = GradScaler("cpu", max_scale=2.0**20)
    scaler.load_state_dict(torch.amp.GradScaler("cpu", 2.0**40).state_dict())
    assert scaler.get_scale() == 2.0**20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_scale": 4.0}, "max_scale=4.0 is not a cap for init_scale=8.0: expected 8.0 or more"),
        ({"max_scale": NAN}, "max_scale=nan is not a cap for init_scale=8.0: expected 8.0 or more"),
        ({"max_skips": 0}, "max_skips=0: expected a positive number"),
    ],
)
def test_settings_that_are_none(settings, message):
    with pytest.raises(FxampError) as error:
        GradScaler("cpu", init_scale=8.0, **settings)
    assert error.value.message == message


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_max_skips_counts_in_a_row(name):
    bad = {step: INF for step in range(40) if step % 4}  # three in a row
    assert len(drive(GradScaler("cpu", max_skips=4), OPTIMIZERS[name], bad, steps=40)[0]) == 40
    scaler = GradScaler("cpu", max_skips=4)
    with pytest.raises(FxampError, match=r"^4 iterations in a row had a skipped step, and the scale is down to"):
        drive(scaler, OPTIMIZERS[name], {0: INF} | dict.fromkeys(range(3, 20), INF), steps=20)
    scales = drive(scaler, OPTIMIZERS[name], {}, steps=1)[0]  # ready for the next iteration
    # Known at once, or when the flags of twice as many steps are there.
    assert scales == [2.0**16 / 2.0 ** (10 if "fused" in name else 5)]


# -- the loss and the scale ------------------------------------------------------------------------------------


def test_scale_of_numbers_and_of_tensors_in_float16():
    scaler = GradScaler("cpu")
    one, many = torch.ones(1, dtype=torch.float16), torch.ones(2, dtype=torch.float16)
    for scaled in (scaler.scale(one), scaler.scale([one])[0], scaler.scale((many, (one,)))[1][0]):
        assert (scaled.dtype, scaled.item(), scaled.shape) == (torch.float32, 2.0**16, (1,))
    assert next(scaler.scale(iter([one]))).dtype == torch.float32
    assert scaler.scale(many).dtype == torch.float16  # as in torch's
    with pytest.raises(ValueError, match=r"^outputs must be a Tensor or an iterable of Tensors$"):
        scaler.scale([3.0])


@pytest.mark.parametrize("new_scale", [0, -1.0, NAN, INF, "8", None])
def test_update_refuses_what_is_no_scale(new_scale):
    scaler, *_ = overflowed()
    before = scaler.get_scale()
    if new_scale is None:
        scaler.update(None)
        assert scaler.get_scale() == before / 2
        return
    with pytest.raises(FxampError) as error:
        scaler.update(new_scale)
    assert error.value.message == (
        f"update({new_scale!r}) sets no scale: expected a positive finite number or a tensor with one"
    )
    assert scaler.get_scale() == before


# -- gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_without_gradients_changes_nothing(name):
    idle, model, scaler = small_model(), small_model(), GradScaler("cpu", growth_interval=1)
    optimizers = [OPTIMIZERS[name](each.parameters()) for each in (idle, model)]
    before = [p.detach().clone() for p in idle.parameters()]
    for _ in range(2):
        scaler.backward(model(torch.ones(2, 3)).sum())
        kind = type(optimizers[0]).__name__
        with pytest.warns(UserWarning, match=f"^no parameter of this {kind} has a gradient: there is nothing to unsc"):
            scaler.step(optimizers[0])
        assert not scaler.skipped
        scaler.step(optimizers[1])
        scaler.update()
    assert scaler.get_scale() == 2.0**18  # of the other one
    torch.testing.assert_close(list(idle.parameters()), before, rtol=0, atol=0)
    with pytest.warns(UserWarning, match=r"^no parameter of this"):
        scaler.step(optimizers[0])
    scaler.update()  # there was nothing to learn from
    assert scaler.get_scale() == 2.0**18


def float16_model():
    model = small_model()
    model[2].half()
    return model, lambda: model[2](model[1](model[0](torch.ones(2, 3))).half()).float().sum()


def test_float16_parameters_are_named_and_nothing_is_changed():
    model, loss = float16_model()
    optimizer, scaler = torch.optim.SGD(model.named_parameters(), lr=0.1), GradScaler("cpu", init_scale=8.0)
    scaler.backward(loss())
    before = [p.grad.clone() for p in model.parameters()]
    for call in (scaler.step, scaler.unscale_):
        with pytest.raises(FxampError) as error:
            call(optimizer)
        assert isinstance(error.value, ValueError)
        assert str(error.value) == (
            "Attempting to unscale FP16 gradients. The gradient of 2.weight is float16, and so is the parameter: "
            "expected float32\n\nhint: keep the parameters in float32, with model.float() before the optimizer is "
            "made; fxamp.convert and torch.autocast compute in float16 without it"
        )
    torch.testing.assert_close([p.grad for p in model.parameters()], before, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [{}, {1: INF}])
def test_float16_parameters_with_a_fused_optimizer_as_torch(bad):
    runs = []
    for kind in (GradScaler, torch.amp.GradScaler):
        model, loss = float16_model()
        optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), kind("cpu", init_scale=8.0)
        for step in range(3):
            scaler.scale(loss()).backward()
            poison(model, step, bad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        runs.append(([p.detach() for p in model.parameters()], scaler.state_dict()))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_skipped_step_all_gradients_are_unscaled(name):
    model, twin = small_model(), small_model()
    optimizer, scaler = OPTIMIZERS[name](model.parameters()), GradScaler("cpu")
    scaler.backward(model(torch.ones(2, 3)).sum())
    twin(torch.ones(2, 3)).sum().backward()
    for each in (model, twin):
        poison(each, 0, {0: INF})
    scaler.step(optimizer)
    expected = [p.grad for p in twin.parameters()]
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=0, atol=0)


@pytest.mark.parametrize("conjugated", [False, True])
def test_complex_gradients(conjugated):
    weight = torch.tensor([1 + 2j, 3 - 1j], requires_grad=True)
    optimizer, scaler = torch.optim.SGD([weight], lr=0.5), GradScaler("cpu", init_scale=8.0)
    for bad, expected in ((1.0, [0.5 + 1j, 1.5 - 0.5j]), (INF, [0.5 + 1j, 1.5 - 0.5j])):
        scaler.backward((weight.abs() ** 2).sum() / 2 * bad)
        if conjugated:
            weight.grad = weight.grad.conj().resolve_conj().conj()
            assert weight.grad.is_conj()
        scaler.step(optimizer)
        scaler.update()
        weight.grad = None
        assert scaler.skipped == math.isinf(bad)
        assert weight.tolist() == expected


# -- who waits, and how often ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_pass_and_at_most_one_wait_a_step(name):
    model, scaler = small_model(), GradScaler("cpu")
    scaler.backward(model(torch.ones(2, 3)).sum())
    optimizer = OPTIMIZERS[name](model.parameters())
    scales = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: scales.append(getattr(optimizer, "grad_scale", None)))
    with Counted() as plain:
        optimizer.step()
    with Counted() as scaled:
        scaler.step(optimizer)
        scaler.update()
    calls = scaled.calls - plain.calls
    assert calls["_amp_foreach_non_finite_check_and_unscale_"] == 1
    assert calls["_local_scalar_dense"] == (0 if "fused" in name else 1)
    assert scales == [None, None]  # nothing is left for the kernel to unscale


def test_a_learning_rate_follows_what_was_stepped():
    model, scaler = small_model(), GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rates = []
    for step in range(4):
        scaler.backward(model(torch.ones(2, 3)).sum())
        poison(model, step, {0: INF, 2: NAN})
        scaler.step(optimizer)
        scaler.update()
        if not scaler.skipped:
            scheduler.step()  # torch warns where this comes before the first step
        rates.append(scheduler.get_last_lr()[0])
        optimizer.zero_grad()
    assert rates == [1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clip_norm_is_unscale_and_clip(name, enabled):
    runs = []
    for short in (True, False):
        model, scaler = small_model(), GradScaler("cpu", enabled=enabled)
        optimizer = OPTIMIZERS[name](model.parameters())
        for _ in range(3):
            scaler.backward(model(torch.ones(2, 3)).sum() * 100)
            if short:
                scaler.step(optimizer, clip_norm=0.5)
            else:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        runs.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*runs, rtol=0, atol=0)
