"""What torch's own tests ask of a gradient scaler, asked of torch's class and of ours.

Every test runs for both: that torch's class passes shows that torch does what is asked. This file asks about one
call at a time, the others about training, and about mistakes and optimizers that know of scaling. What runs torch's
tests themselves is ``upstream_scaler.py``.
"""

import copy
import itertools
import pickle

import pytest
import torch

import fxamp

INF, NAN = float("inf"), float("nan")
KINDS = [pytest.param(torch.amp.GradScaler, id="torch"), pytest.param(fxamp.GradScaler, id="fxamp")]
SETTINGS = {"init_scale": 64.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 3}
pytestmark = [
    pytest.mark.parametrize("kind", KINDS),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
]


def optimizer_for(*gradients):
    """An optimizer whose parameters are zero and have these gradients; None is a parameter without one."""
    parameters = []
    for gradient in gradients:
        parameters.append(torch.zeros(2) if gradient is None else torch.zeros_like(gradient))
        parameters[-1].grad = gradient
    return torch.optim.SGD(parameters, lr=1.0)


def ready(kind, *gradients, **settings):
    """A scaler whose scale is on the device, and an optimizer with these gradients."""
    scaler = kind("cpu", **(SETTINGS | settings))
    scaler.scale(torch.zeros(()))
    return scaler, optimizer_for(*gradients)


def iterate(scaler, *gradients):
    """One iteration that finds these gradients."""
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer_for(*(torch.full((2,), value) for value in gradients)))
    scaler.update()


def test_scale_reaches_every_output(kind):
    outputs = (torch.full((), 1.0), [torch.full((2,), 2.0), (torch.full((1, 1), 3.0),)], [])
    first, (second, third), empty = scaled = kind("cpu", init_scale=8.0).scale(outputs)
    assert [type(part) for part in (scaled, scaled[1], third, empty)] == [tuple, list, tuple, list]
    assert (first.tolist(), second.tolist(), third[0].tolist()) == (8.0, [16.0, 16.0], [[24.0]])


def test_scale_takes_any_iterable(kind):
    scaled = kind("cpu", init_scale=8.0).scale(torch.full((), float(i)) for i in range(3))
    assert [s.item() for s in scaled] == [0.0, 8.0, 16.0]


@pytest.mark.parametrize(
    "devices",
    [
        ("cpu", "meta"),
        pytest.param(("cpu", "cuda"), marks=pytest.mark.cuda),
        pytest.param(("cuda", "cpu"), marks=pytest.mark.cuda),
    ],
)
def test_scale_of_outputs_on_two_devices(kind, devices):
    scaler = kind("cpu", init_scale=8.0)
    scaled = scaler.scale([torch.ones((), device=device) for device in devices])
    assert tuple(s.device.type for s in scaled) == devices
    assert all(s.item() == 8.0 for s in scaled if s.device.type != "meta")
    assert scaler._scale.device.type == devices[0]


@pytest.mark.parametrize("outputs", [3.0, None, [torch.ones(()), 3.0]], ids=["number", "none", "number inside"])
def test_scale_refuses_what_is_no_output(kind, outputs):
    with pytest.raises(ValueError, match="outputs must be a Tensor or an iterable of Tensors"):
        kind("cpu").scale(outputs)


@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scale_promotes_as_a_product_does(kind, dtype, shape):
    output = torch.full(shape, 3.0, dtype=dtype)
    scaled = kind("cpu", init_scale=8.0).scale(output)
    expected = output * torch.full((), 8.0)
    assert scaled.dtype == expected.dtype
    assert torch.equal(scaled, expected)


def test_the_scale_is_made_by_the_first_call(kind):
    scaler = kind("cpu", **SETTINGS)
    assert (scaler._scale, scaler._growth_tracker, scaler.get_scale()) == (None, None, 64.0)
    scaler.scale(torch.ones(()))
    assert (scaler._scale.dtype, scaler._scale.shape) == (torch.float32, ())
    assert (scaler._growth_tracker.dtype, scaler._growth_tracker.item()) == (torch.int32, 0)
    assert scaler._get_scale_async() is scaler._scale
    assert (scaler.get_scale(), scaler._get_growth_tracker()) == (64.0, 0)


def sparse(dtype, values, indices=((0, 1, 1), (2, 0, 2))):
    return torch.sparse_coo_tensor(torch.tensor(indices), torch.tensor(values, dtype=dtype), (2, 3))


DENSE = {
    "contiguous": lambda: torch.full((4, 4), 4.0),
    "transposed": lambda: torch.full((4, 3), 4.0).t(),
    "columns": lambda: torch.full((4, 4), 4.0)[:, :3],
    "float64": lambda: torch.full((4, 4), 4.0, dtype=torch.float64),
    "float16": lambda: torch.full((4, 4), 4.0, dtype=torch.float16),
    "bfloat16": lambda: torch.full((4, 4), 4.0, dtype=torch.bfloat16),
    "scalar": lambda: torch.full((), 4.0),
}


@pytest.mark.parametrize(("bad", "value"), [(None, 1.0), *itertools.product(DENSE, [INF, -INF, NAN])])
def test_unscale_finds_what_is_not_finite(kind, bad, value):
    gradients = {name: make() for name, make in DENSE.items()}
    if bad:
        gradients[bad][(1,) * gradients[bad].ndim] = value
    scaler, optimizer = ready(kind, None, *gradients.values())
    flags = scaler._unscale_grads_(optimizer, torch.full((1,), 0.25), torch.zeros(1), True)
    assert {device: flag.item() for device, flag in flags.items()} == {torch.device("cpu"): float(bad is not None)}
    for name, gradient in gradients.items():
        assert name == bad or torch.equal(gradient, torch.ones_like(gradient))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("value", "found"), [(64.0, 0.0), (INF, 1.0), (NAN, 1.0)])
def test_unscale_of_sparse_gradients(kind, dtype, value, found):
    gradient = sparse(dtype, [16.0, 32.0, value])
    scaler, optimizer = ready(kind, gradient.clone())
    flags = scaler._unscale_grads_(optimizer, torch.full((1,), 0.25), torch.zeros(1), True)
    assert flags[torch.device("cpu")].item() == found
    (parameter,) = optimizer.param_groups[0]["params"]
    assert found or torch.equal(parameter.grad.to_dense(), (gradient / 4).to_dense())


@pytest.mark.parametrize(("dtype", "found"), [(torch.float16, 1.0), (torch.float32, 0.0)])
def test_values_of_one_index_overflow_together(kind, dtype, found):
    gradient = sparse(dtype, [60000.0, 32.0, 60000.0], ((0, 1, 0), (2, 0, 2)))
    assert not gradient.is_coalesced()
    scaler, optimizer = ready(kind, gradient)
    flags = scaler._unscale_grads_(optimizer, torch.full((1,), 0.25), torch.zeros(1), True)
    assert flags[torch.device("cpu")].item() == found


def test_each_device_has_its_flag(kind):
    scaler, optimizer = ready(kind, torch.ones(2), torch.ones(2, device="meta"), None)
    flags = scaler._unscale_grads_(optimizer, torch.ones(()), torch.zeros(()), False)
    assert {device.type for device in flags} == {flag.device.type for flag in flags.values()} == {"cpu", "meta"}


@pytest.mark.cuda
def test_gradients_on_two_devices(kind):
    scaler, optimizer = ready(kind, torch.full((2,), 64.0), torch.full((2,), 64.0, device="cuda"))
    scaler.unscale_(optimizer)
    flags = scaler._found_inf_per_device(optimizer)
    assert {device.type: flag.item() for device, flag in flags.items()} == {"cpu": 0.0, "cuda": 0.0}
    assert scaler.step(optimizer) is None
    assert all(p.tolist() == [-1.0, -1.0] for p in optimizer.param_groups[0]["params"])


def test_the_check_alone_leaves_gradients_as_they_are(kind):
    scaler, optimizer = ready(kind, torch.full((2,), 4.0), torch.full((2,), INF))
    flags = scaler._check_inf_per_device(optimizer)
    assert [flag.item() for flag in flags.values()] == [1.0]
    assert flags is scaler._found_inf_per_device(optimizer)
    assert [p.grad.tolist() for p in optimizer.param_groups[0]["params"]] == [[4.0, 4.0], [INF, INF]]


def test_step_unscales_what_unscale_did_not(kind):
    for first in (True, False):
        scaler, optimizer = ready(kind, torch.full((2,), 64.0))
        if first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        (parameter,) = optimizer.param_groups[0]["params"]
        assert (parameter.grad.tolist(), parameter.tolist()) == ([1.0, 1.0], [-1.0, -1.0])


@pytest.mark.parametrize(
    ("gradients", "scale", "tracker"),
    [
        ([1.0], 64.0, 1),
        ([1.0, 1.0, 1.0], 256.0, 0),
        ([INF], 16.0, 0),
        ([1.0, 1.0, NAN, 1.0, 1.0], 16.0, 2),
        ([-INF, 1.0, 1.0, 1.0, INF], 16.0, 0),
    ],
)
def test_scale_and_tracker_follow_what_was_found(kind, gradients, scale, tracker):
    scaler = kind("cpu", **SETTINGS)
    for value in gradients:
        iterate(scaler, 1.0, value)
    assert (scaler.get_scale(), scaler._get_growth_tracker()) == (scale, tracker)


def test_factors_can_be_set(kind):
    scaler = kind("cpu", **SETTINGS)
    scaler.set_growth_factor(2.0)
    scaler.set_backoff_factor(0.125)
    scaler.set_growth_interval(1)
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()) == (2.0, 0.125, 1)
    iterate(scaler, 1.0)
    assert scaler.get_scale() == 128.0
    iterate(scaler, INF)
    assert scaler.get_scale() == 16.0


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_new_scale_is_copied(kind, dtype):
    scaler = kind("cpu", **SETTINGS)
    iterate(scaler, 1.0)
    new = torch.tensor(3.0, dtype=dtype) if dtype else 3.0
    scaler.update(new)
    new *= 2
    assert (scaler.get_scale(), scaler._get_growth_tracker(), scaler._scale.dtype) == (3.0, 1, torch.float32)


def test_growth_stops_before_infinity(kind):
    scaler = kind("cpu", init_scale=2.0**126, growth_factor=16.0, growth_interval=1)
    iterate(scaler, 1.0)
    assert scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("source", [torch.amp.GradScaler, fxamp.GradScaler])
def test_state_of_either_class_loads(kind, source, lazy):
    other = source("cpu", **SETTINGS)
    scaler = kind("cpu", init_scale=6.0, growth_factor=7.0, backoff_factor=0.8, growth_interval=1)
    scaler._init_growth_tracker = 7  # to be written over
    if not lazy:
        iterate(other, 1.0)
        scaler.scale(torch.ones(()))
    scaler.load_state_dict(other.state_dict())
    state = (64.0, 4.0, 0.25, 3, int(not lazy))
    assert scaler._init_growth_tracker == scaler._get_growth_tracker() == state[-1]
    keys = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    assert tuple(scaler.state_dict()[key] for key in keys) == state
    assert scaler.scale(torch.ones(())).item() == 64.0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scaler: pickle.loads(pickle.dumps(scaler))])
@pytest.mark.parametrize("lazy", [True, False])
def test_copies_begin_where_the_scaler_is(kind, copied, lazy):
    scaler = kind("cpu", **SETTINGS)
    if not lazy:
        iterate(scaler, 1.0)
    twin = copied(scaler)
    assert type(twin) is kind
    assert twin.is_enabled()
    assert twin.state_dict() == scaler.state_dict()
    assert (twin._scale, twin._growth_tracker, twin._init_growth_tracker) == (None, None, int(not lazy))
    assert twin._per_optimizer_states["any"] == torch.amp.grad_scaler._refresh_per_optimizer_state()
    assert twin.scale(torch.full((), 2.0)).item() == 128.0


def test_disabled_does_nothing(kind):
    scaler, output = kind("cpu", enabled=False), torch.ones(())
    optimizer = optimizer_for(torch.full((2,), INF))
    assert scaler.scale(output) is output
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    scaler.load_state_dict({"scale": 2.0})
    assert optimizer.param_groups[0]["params"][0].tolist() == [-INF, -INF]
    assert (scaler.is_enabled(), scaler.get_scale(), scaler._get_growth_tracker()) == (False, 1.0, 0)
    assert scaler.state_dict() == pickle.loads(pickle.dumps(scaler)).state_dict() == {}
