"""What calls cost: the logic with a clock that is told the time, the rest with what runs here."""

import contextlib
import json
import math
import warnings

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

from fxamp.cost import Probe, Spec, measurable, store
from fxamp.cost.calls import Call
from fxamp.cost.clock import DeviceClock, HostClock
from fxamp.cost.curves import at
from fxamp.cost.measuring import measure
from fxamp.cost.surroundings import undisturbed

CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class FakeClock:
    """Time goes by only where ``pass_`` says so."""

    sample = 1e-3

    def __init__(self):
        self.time = 0.0

    def now(self):
        return self.time

    def seconds(self, run, loops, idle=0.0):
        start = self.time
        for _ in range(loops):
            run()
        return (self.time - start) / loops - idle


class Timed:
    """A function that takes the time it is told to, and remembers in which dtypes it ran."""

    def __init__(self, clock, **seconds):
        self.clock, self.seconds, self.ran = clock, {getattr(torch, name): each for name, each in seconds.items()}, []

    def __call__(self, tensor, *others, **named):
        if tensor.is_meta:
            return tensor * 1
        self.ran.append(tensor.dtype)
        if tensor.dtype not in self.seconds:
            raise NotImplementedError(f"not for {tensor.dtype}")
        self.clock.time += self.seconds[tensor.dtype] * tensor.numel() / 64
        return tensor * 1


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "costs.json"


@pytest.fixture
def probe(clock, path):
    return Probe(CPU, path=path, clock=clock)


def spec(*shape, grad=False, **options):
    return Spec(shape or (8, 8), F32, grad, **options)


def ask(probe, function, *dtypes, args=None, training=False, key="timed"):
    return probe.compare(key, function, args or (spec(),), {}, dtypes or (F32, BF16), training=training)


def reopened(probe, **options):
    """As another process would find it."""
    probe.save()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_OPEN", {})
        return Probe(CPU, path=probe._store.path, **options)


# -- measuring -------------------------------------------------------------------------------------------


def test_a_call_is_measured_in_turns(clock, probe):
    timed = Timed(clock, float32=0.01, bfloat16=0.005)
    assert ask(probe, timed) == (pytest.approx(0.01), pytest.approx(0.005))
    assert timed.ran[-6:] == [F32, BF16] * 3
    assert len(timed.ran) < 14


def test_short_calls_are_repeated_until_they_show(clock):
    times = []
    timed = Timed(clock, float32=1e-5)
    clock.seconds = lambda run, loops, idle=0.0: times.append(loops) or FakeClock.seconds(clock, run, loops, idle)
    tensor = torch.zeros(64)
    assert measure(clock, [lambda: timed(tensor)], [1.0e-5]) == [pytest.approx(1e-5)]
    assert times == [1, 100, 100, 100]


def test_what_disturbs_does_not_count(clock):
    found = iter([0.02, 0.010, 0.030, 0.0101, 0.5])
    clock.seconds = lambda run, loops, idle=0.0: next(found)
    assert measure(clock, [lambda: None], [0.02]) == [0.010]
    assert next(found) == 0.5  # it went on until two of them were alike


def test_no_more_time_than_needed_is_spent(clock):
    """Where no two samples are alike, time is up at some point."""
    noise, count = iter(1.0 + 0.1 * n for n in range(100)), []

    def run():
        clock.time += 0.004 * next(noise)
        count.append(1)

    assert measure(clock, [run], [0.004]) == [pytest.approx(0.0044)]
    assert 4 <= len(count) <= 6


def test_a_long_call_is_made_once(clock, probe):
    timed = Timed(clock, float32=0.5, bfloat16=0.3)
    assert ask(probe, timed) == (0.5, pytest.approx(0.3))
    assert timed.ran == [F32, BF16]


def test_where_it_does_not_run(clock, probe):
    timed = Timed(clock, float32=0.01)
    assert ask(probe, timed, F32, F16) == (pytest.approx(0.01), None)
    timed.ran.clear()
    assert ask(probe, timed, F32, F16) == (pytest.approx(0.01), None)
    assert not timed.ran


def test_no_memory_says_nothing_of_the_dtype(probe):
    def large(tensor):
        raise torch.OutOfMemoryError

    assert ask(probe, large) == (None, None)
    assert ask(reopened(probe), lambda tensor: tensor) != (None, None)


def test_gradients_count_in_training_only(clock, probe):
    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            clock.time += 0.0 if x.is_meta else 0.01
            return x * y, torch.ones(2, dtype=torch.int64)

        @staticmethod
        def backward(ctx, gradient, _):
            clock.time += 0.0 if gradient.is_meta else 0.02
            assert gradient.count_nonzero() > 0
            return gradient, None

    args = (spec(grad=True), spec())
    assert ask(probe, Both.apply, args=args, training=True) == (pytest.approx(0.03),) * 2
    assert ask(probe, Both.apply, args=args) == (pytest.approx(0.01),) * 2
    assert ask(probe, Both.apply, args=(spec(), spec()), training=True) == (pytest.approx(0.01),) * 2


def test_a_dtype_that_is_asked_for_later_is_measured_beside_those_known(clock, probe):
    """The machine may be slower by then."""
    assert ask(probe, Timed(clock, float32=0.01), F32) == (pytest.approx(0.01),)
    busy = Timed(clock, float32=0.03, float16=0.06)
    assert ask(probe, busy, F32, F16) == (pytest.approx(0.01), pytest.approx(0.02))


def test_what_starts_a_backward_does_not_count(clock, probe, monkeypatch):
    monkeypatch.setattr(Probe, "_idle", lambda self: 0.004)
    timed = Timed(clock, float32=0.01)
    assert ask(probe, timed, F32, training=True) == pytest.approx((0.006,))
    assert ask(probe, timed, F32) == pytest.approx((0.01,))


def test_to_start_a_backward_takes_a_part_of_a_small_call():
    probe = Probe(CPU)
    tensor = Spec((4, 4), F32, grad=True)
    linear = probe.call("linear", F.linear, (tensor, tensor), {}, F32, training=True)
    x = torch.rand(4, 4, requires_grad=True)
    gradient = torch.rand(4, 4)
    whole = HostClock().seconds(lambda: torch.autograd.grad(F.linear(x, x), x, gradient), 200)
    assert linear is not None
    assert probe._idle() > 1e-6
    assert linear < whole


# -- what is asked ---------------------------------------------------------------------------------------


def text(*args, training=True, **kwargs):
    return Call("op", torch.add, args, kwargs, training, "").text()


def test_calls_that_no_measurement_tells_apart_are_one():
    half = Spec((8, 8), BF16)
    assert text(spec()) == text(half) == text(spec(strides=(8, 1)))
    assert text(spec(), stride=1, padding=2) == text(spec(), padding=2, stride=1)
    assert text(spec(1, 8), None) == text(spec(1, 8, strides=(1, 1)), None)
    assert text([spec(), 1]) == text((spec(), 1))


def test_calls_that_differ_are_not():
    asked = [
        ((spec(),), {}),
        ((spec(grad=True),), {}),
        ((spec(8, 9),), {}),
        ((spec(strides=(1, 8)),), {}),
        ((spec(fixed=True),), {}),
        ((Spec((8, 8), torch.float64),), {}),
        ((Spec((8, 8), torch.int64),), {}),
        ((spec(), 1), {}),
        ((spec(), 1.0), {}),
        ((spec(), True), {}),
        ((spec(), (1, 2)), {}),
        ((spec(), 1, 2), {}),
        ((spec(), slice(1, 2)), {}),
        ((spec(),), {"stride": 1}),
        ((spec(),), {"padding": 1}),
        ((spec(),), {"padding": "same"}),
    ]
    texts = {text(*args, training=training, **kwargs) for args, kwargs in asked for training in (True, False)}
    assert len(texts) == 2 * len(asked)


def test_what_cannot_be_written_is_not_measured(clock, probe):
    timed = Timed(clock, float32=0.01)
    assert ask(probe, timed, args=(spec(), object())) == (None, None)
    assert not timed.ran


def test_what_is_set_is_a_part_of_what_is_asked(clock, probe):
    timed = Timed(clock, float32=0.01)
    assert ask(probe, timed, F32) == (pytest.approx(0.01),)
    with torch.backends.cudnn.flags(benchmark=True):
        assert ask(probe, Timed(clock, float32=0.02), F32) == (pytest.approx(0.02),)
    assert ask(probe, timed, F32) == (pytest.approx(0.01),)


def test_a_method_by_its_name(path):
    probe = Probe(CPU, path=path)
    assert ask(probe, "softmax", args=(spec(), -1))[0] > 0
    assert ask(probe, "no_such_method", key="none") == (None, None)


@pytest.mark.parametrize(
    ("like", "dtype"),
    [
        (spec(2, 3, 4, 5), BF16),
        (spec(2, 3, 4, 5, strides=(60, 1, 15, 3)), BF16),
        (spec(3, 100, 100), BF16),
        (spec(4, 3, strides=(0, 1)), BF16),
        (spec(0, 3), BF16),
        (spec(), BF16),
        (spec(3, fixed=True), F32),
        (Spec((), F16), BF16),
        (Spec((3,), torch.float64), torch.float64),
        (Spec((3,), torch.int64), torch.int64),
        (Spec((3,), torch.bool), torch.bool),
    ],
)
def test_tensors_are_like_their_specs(like, dtype):
    made = like.make(BF16, torch.Generator())
    assert (made.dtype, made.shape, made.stride()) == (dtype, like.shape, like.layout)
    assert like.nbytes() == made.untyped_storage().nbytes() * like.dtype.itemsize // dtype.itemsize
    if dtype.is_floating_point:
        assert made.abs().max() <= 1 if made.numel() else True
        assert made.count_nonzero() >= 0.9 * made.numel()
    else:
        assert (made == (dtype == torch.bool)).all()
    assert Spec.of(made).text() == Spec(like.shape, dtype, strides=like.strides).text()


def test_only_what_wants_a_gradient_has_one():
    wanted = [
        Spec((2,), dtype, grad).make(F32, torch.Generator()).requires_grad
        for dtype, grad in [(F32, True), (F32, False), (torch.bool, False)]
    ]
    assert wanted == [True, False, False]


def test_a_spec_of_unknown_size_is_none():
    mode = torch._subclasses.FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    fake = mode.from_tensor(torch.zeros(5, 3))
    assert Spec.of(torch._subclasses.FakeTensorMode().from_tensor(torch.zeros(5, 3))) == spec(5, 3, strides=(3, 1))
    with pytest.raises(TypeError, match="a size is not known"):
        Spec.of(fake)


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "operations"),
    [
        (F.linear, (spec(8, 16, grad=True), spec(4, 16, grad=True)), {}, 3 * 2 * 8 * 16 * 4),
        (F.conv2d, (spec(1, 3, 8, 8), spec(4, 3, 3, 3, grad=True)), {"padding": 1}, 2 * 2 * 64 * 4 * 27),
        (F.scaled_dot_product_attention, (spec(2, 8, 4),) * 3, {}, 2 * 2 * 2 * 8 * 8 * 4),
    ],
)
def test_work_is_counted_in_floating_point_operations(function, args, kwargs, operations):
    call = Call("op", function, args, kwargs, training=True)
    with undisturbed(CPU, training=True):
        more, none = call.work(), Call("op", torch.ravel, args, kwargs, training=True).work()
    assert operations < more < operations + 10 * 4 * 6000
    assert none == 10 * sum(each.nbytes() for each in args)  # ravel takes no such arguments


# -- how much may be measured ----------------------------------------------------------------------------


def test_beyond_its_limit_it_scales_what_it_knows(clock, path):
    probe = Probe(CPU, path=path, clock=clock, limit=1.0)
    timed = Timed(clock, float32=0.1, bfloat16=0.05)
    args = (spec(8, 8),), (spec(80, 8),), (spec(4, 8),)
    ask(probe, timed, args=args[0])
    assert probe.spent == pytest.approx(0.75)
    timed.ran.clear()
    for given, expected in zip(args, ((0.1, 0.05), (1.0, 0.5), (0.1, 0.05)), strict=True):
        assert ask(probe, timed, args=given) == pytest.approx(expected)
    assert not timed.ran
    again = reopened(probe, clock=clock)
    assert ask(again, timed, args=args[1]) == pytest.approx((1.0, 0.5))
    assert not timed.ran, "an answer stays, though there is time now"


def test_the_first_of_an_operator_is_measured_all_the_same(clock, path):
    probe = Probe(CPU, path=path, clock=clock, limit=0.0)
    probe._limit = 1.0
    probe.spent = 1.0
    timed = Timed(clock, float32=0.01, bfloat16=0.01)
    assert ask(probe, timed) == pytest.approx((0.01, 0.01))
    assert ask(probe, timed, key="other") == pytest.approx((0.01, 0.01))
    assert ask(probe, timed, args=(spec(16, 8),)) == pytest.approx((0.02, 0.02))
    assert timed.ran.count(F32) < 20


def test_what_would_take_too_long_is_not_begun(path):
    """A matrix product of many seconds, told by a small one."""
    probe, large = Probe(CPU, path=path, limit=0.5), spec(16384, 16384)
    assert ask(probe, torch.mm, args=(large, large)) == (None, None)
    assert probe.spent < 5.0
    assert not (reopened(probe)._store.get(text_of(large)) or store.Row(0.0)).estimated, "that is not kept"


def text_of(large):
    return Call("timed", torch.mm, (large, large), {}, training=False).text()


def test_a_tensor_of_many_gigabytes_is_not_made(clock, probe):
    timed = Timed(clock, float32=1e-9, bfloat16=1e-9)
    assert ask(probe, timed, args=(spec(1 << 20, 1 << 10),)) == (None, None)
    assert not timed.ran


# -- what is known stays ---------------------------------------------------------------------------------


def test_what_was_measured_is_not_measured_again(clock, probe, path):
    timed = Timed(clock, float32=1 / 300, bfloat16=1 / 700)
    found = ask(probe, timed)
    timed.ran.clear()
    assert ask(Probe(CPU, path=path), timed) == found, "within the process, without a file"
    assert not path.exists()
    assert ask(reopened(probe), timed) == found, "to the last bit"
    assert not timed.ran
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00\xff",
        "[" * 100_000,
        '{"fxamp": 2}',
    ],
)
def test_a_file_that_is_none_is_written_anew(content, clock, probe, path):
    path.parent.mkdir()
    path.write_text(content, encoding="latin-1")
    found = ask(reopened(probe, clock=clock), Timed(clock, float32=0.01), F32)
    assert found == (pytest.approx(0.01),)
    ask(probe, Timed(clock, float32=0.02), F32)
    assert ask(reopened(probe), None, F32) == (pytest.approx(0.02),)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (f'"torch": "{torch.__version__}', '"torch": "1.0'),
        ('"threads": ', '"threads": 1'),
        ('"device": "', '"device": "another '),
        ('"fxamp": ', '"fxamp": 1'),
    ],
)
def test_a_file_about_something_else_is_written_anew(own, other, clock, probe, path):
    ask(probe, Timed(clock, float32=0.01), F32)
    probe.save()
    content = path.read_text()
    assert own in content
    path.write_text(content.replace(own, other))
    (text,) = json.loads(content)["calls"]
    fresh = store.Store(path, probe._store._about)
    assert fresh.get(text) is None
    fresh.put(text, store.Row(1.0, {"f32": 0.02}))
    fresh.save()
    assert store.Store(path, probe._store._about).get(text) == store.Row(1.0, {"f32": 0.02})


@pytest.mark.parametrize("wrong", ['"fast"', "-1", "NaN", "Infinity", "true", "[]", "{}"])
def test_a_number_that_is_none_is_not_taken(wrong, clock, probe, path):
    ask(probe, Timed(clock, float32=0.25), F32)
    probe.save()
    path.write_text(path.read_text().replace("0.25", wrong))
    found = reopened(Probe(CPU, path=path.with_name("x")), clock=clock)
    found._store = store.Store(path, probe._store._about)
    assert ask(found, Timed(clock, float32=0.5), F32) == (0.5,)


def test_two_writers_add_up_and_the_first_stays(clock, path, monkeypatch):
    first, second = (reopened(Probe(CPU, path=path, clock=clock), clock=clock) for _ in range(2))
    assert ask(first, Timed(clock, float32=0.25), F32, key="both") == (0.25,)
    assert ask(second, Timed(clock, float32=0.5, float16=0.75), F32, F16, key="both") == (0.5, 0.75)
    ask(first, Timed(clock, float32=0.3), F32, key="one")
    ask(second, Timed(clock, float32=0.4), F32, key="other")
    second._store._changed = first._store._changed = True
    first.save()
    third = reopened(second)
    assert ask(third, None, F32, F16, key="both") == (0.25, 0.75)
    assert ask(third, None, F32, key="one") == pytest.approx((0.3,))
    assert ask(third, None, F32, key="other") == pytest.approx((0.4,))


def test_a_folder_that_cannot_be_written_to_is_no_error(clock, tmp_path):
    (tmp_path / "file").write_text("")
    probe = Probe(CPU, path=tmp_path / "file" / "costs.json", clock=clock)
    assert ask(probe, Timed(clock, float32=0.01), F32) == (pytest.approx(0.01),)
    probe.save()
    assert ask(probe, None, F32) == (pytest.approx(0.01),)


def test_a_failed_write_leaves_what_was_there(clock, probe, path, monkeypatch):
    ask(probe, Timed(clock, float32=0.01), F32)
    probe.save()
    before = path.read_text()
    ask(probe, Timed(clock, float32=0.01), F32, key="more")

    def full(*names):
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "replace", full)
        probe.save()
    assert [each.read_text() for each in path.parent.iterdir()] == [before]
    probe.save()
    assert len(json.loads(path.read_text())["calls"]) == 2


def test_where_the_file_is(monkeypatch, tmp_path):
    def folder(**variables):
        for name in ("FXAMP_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(tmp_path / value))
        return Probe(CPU)._store.path.parent.relative_to(tmp_path).as_posix()

    assert folder(FXAMP_CACHE_DIR="mine", XDG_CACHE_HOME="cache", HOME="home") == "mine"
    assert folder(XDG_CACHE_HOME="cache", HOME="home") == "cache/fxamp"
    assert folder(HOME="home") == "home/.cache/fxamp"
    assert not list(tmp_path.iterdir())
    name = Probe(CPU)._store.path.name
    assert torch.__version__.replace("+", "-") in name
    assert name.endswith(f"_{torch.get_num_threads()}.json")


def test_a_user_without_a_home_keeps_nothing(monkeypatch, clock):
    def none():
        raise RuntimeError("Could not determine home directory.")

    for name in ("FXAMP_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(store.Path, "home", none)
    monkeypatch.setattr(store, "_OPEN", {})
    probe = Probe(CPU, clock=clock)
    assert ask(probe, Timed(clock, float32=0.01), F32) == (pytest.approx(0.01),)
    probe.save()


def test_the_number_of_threads_is_a_part_of_what_is_known(monkeypatch):
    one = Probe(CPU)._store
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert Probe(CPU)._store is not one


# -- nothing is disturbed --------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def state():
    return (
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_anomaly_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        list(warnings.filters),
    )


AROUND = {
    "nothing": contextlib.nullcontext,
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "meta device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
    "fake tensors": torch._subclasses.FakeTensorMode,
    "default dtype": default_dtype,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("around", AROUND)
def test_nothing_is_disturbed_and_nothing_disturbs(around, training, path):
    seen = []

    def function(x, weight):
        warnings.warn("this call warns", stacklevel=1)
        kind = "meta" if x.is_meta else type(x).__name__
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_anomaly_enabled(), x.is_inference()
        seen.append((kind, x.dtype, torch.ones(()).device.type, *modes))
        return F.linear(F.dropout(x, 0.5), weight)

    with AROUND[around]():
        before = state()
        probe = Probe(CPU, path=path)
        found = ask(probe, function, args=(spec(grad=True), spec(grad=True)), training=training)
        assert probe.cast(100, F32, BF16) > 0
        assert state() == before
    assert None not in found
    expected = {("Tensor", dtype, "cpu", training, False, False, False) for dtype in (F32, BF16)}
    assert {each for each in seen if each[0] != "meta"} == expected


def test_nothing_is_left_of_a_call_that_fails(probe):
    before = state()

    def fails(x):
        torch.rand(3)
        raise ValueError("no such thing")

    assert ask(probe, fails, training=True, args=(spec(grad=True),)) == (None, None)
    assert state() == before


def test_casts_that_autocast_holds_are_not_dropped(probe):
    """The user converts within a region of their own: its weights are not cast twice."""
    weight, x = torch.rand(3, 3, requires_grad=True), torch.rand(3, 3)
    with torch.autocast("cpu", dtype=BF16):
        one = F.linear(x, weight).grad_fn.next_functions
        ask(probe, F.linear, args=(spec(), spec()))
        two = F.linear(x, weight).grad_fn.next_functions
    assert [(f and f.name()) for f, _ in one] == [(f and f.name()) for f, _ in two]
    assert one[-1][0].next_functions[0][0] is two[-1][0].next_functions[0][0]


# -- clocks ----------------------------------------------------------------------------------------------


class FakeDevice:
    """A device with a queue: launches are told to the host's clock, kernels to its own."""

    def __init__(self, monkeypatch, *, launch, kernel):
        self.host, self.free, self.launch, self.kernel = 0.0, 0.0, launch, kernel
        self.begun_idle = None
        monkeypatch.setattr("fxamp.cost.clock.time.perf_counter", lambda: self.host)

    def run(self):
        self.host += self.launch
        self.free = max(self.free, self.host) + self.kernel

    def synchronize(self):
        self.host = max(self.host, self.free)

    def Event(self, *, enable_timing):
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, device):
        self.device = device

    def record(self):
        if self.device.begun_idle is None:
            self.device.begun_idle = self.device.host >= self.device.free
        self.at = max(self.device.host, self.device.free)

    def elapsed_time(self, end):
        assert self.device.host >= end.at, "before the device was done"
        return (end.at - self.at) * 1e3


@pytest.mark.parametrize(
    ("launch", "kernel", "idle", "expected"),
    [
        (1e-5, 1e-6, 0.0, 1e-5),
        (1e-5, 1e-6, 4e-6, 6e-6),
        (1e-5, 1e-6, 1.0, 2e-6),
        (1e-5, 1e-3, 0.0, 1e-3),
        (1e-5, 2e-5, 9e-6, 2e-5),
    ],
)
def test_a_queue_takes_as_long_as_the_longer_of_both(launch, kernel, idle, expected, monkeypatch):
    device = FakeDevice(monkeypatch, launch=launch, kernel=kernel)
    for _ in range(5):
        device.run()  # what was there before does not count
    assert DeviceClock(device).seconds(device.run, 100, idle) == pytest.approx(expected, rel=0.03)
    assert device.begun_idle


def test_what_can_be_measured_here():
    assert measurable(CPU)
    assert not measurable(torch.device("meta"))
    assert measurable(torch.device("cuda")) == torch.cuda.is_available()
    assert not measurable(torch.device("cuda", 1000))


# -- curves ----------------------------------------------------------------------------------------------


def test_between_sizes_time_is_interpolated_and_never_falls():
    sizes, seconds = (10, 100, 1000), (1.0, 0.9, 8.0)
    assert [at(n, sizes, seconds) for n in (0, 10, 50, 100, 1000, 5000)] == pytest.approx([1, 1, 1, 1, 8, 40])
    assert at(316, sizes, seconds) == pytest.approx(math.sqrt(8.0), rel=1e-2)


@pytest.mark.parametrize("training", [False, True])
def test_casts_and_pointwise_calls_take_longer_the_larger_they_are(training):
    probe = Probe(CPU, limit=0.0)
    sizes = (1, 1000, 30_000, 10**6, 10**8)
    for one in (
        lambda n: probe.cast(n, F32, BF16, training=training),
        lambda n: probe.cast(n, BF16, F32, training=training),
        lambda n: probe.pointwise(n, BF16, training=training),
    ):
        seconds = [one(size) for size in sizes]
        assert seconds == sorted(seconds)
        assert seconds[-1] > 100 * seconds[0] > 0
        known = dict(probe._store._rows)
        assert seconds == [one(size) for size in sizes]
        assert known == probe._store._rows


@pytest.mark.cuda
def test_on_a_gpu_a_large_product_takes_longer_than_a_small_one(path):
    probe = Probe(torch.device("cuda"), path=path)
    small, large = (
        probe.call("mm", torch.mm, (spec(n, n, grad=True),) * 2, {}, F32, training=True) for n in (32, 4096)
    )
    assert large > 5 * small > 0


# -- real calls ------------------------------------------------------------------------------------------


def test_a_large_product_takes_longer_than_a_small_one():
    probe = Probe(CPU)
    small, large = (probe.call("mm", torch.mm, (spec(n, n),) * 2, {}, F32, training=False) for n in (8, 512))
    assert large > 20 * small > 0


LSTM = (spec(32, 4), spec(32, 8), spec(32), spec(32))
REAL = {
    "conv2d": (F.conv2d, (spec(1, 3, 8, 8, strides=(192, 1, 24, 3)), spec(4, 3, 3, 3, grad=True), None, 2), {}),
    "sdpa": (F.scaled_dot_product_attention, (spec(1, 2, 4, 8, grad=True),) * 3, {"is_causal": True}),
    "masked": (
        F.scaled_dot_product_attention,
        (spec(1, 2, 4, 8, grad=True),) * 3,
        {"attn_mask": Spec((4, 4), torch.bool)},
    ),
    "lstm": (
        torch.lstm,
        (spec(5, 2, 4, grad=True), (spec(1, 2, 8), spec(1, 2, 8)), LSTM, True, 1, 0.0, True, False, False),
        {},
    ),
    "batch_norm": (
        F.batch_norm,
        (spec(4, 3, grad=True), Spec((3,), F32, fixed=True), Spec((3,), F32, fixed=True)),
        {"training": True},
    ),
    "embedding": (F.embedding, (Spec((3, 5), torch.int64), spec(7, 4, grad=True)), {}),
    "cross_entropy": (F.cross_entropy, (spec(4, 5, grad=True), Spec((4,), torch.int64)), {}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_calls(name, path):
    function, args, kwargs = REAL[name]
    probe = Probe(CPU, path=path)
    trained = probe.compare(name, function, args, kwargs, (F32, BF16), training=True)
    run = probe.compare(name, function, args, kwargs, (F32, BF16), training=False)
    assert all(0 < each < 0.1 for each in (*trained, *run))
