"""State: what one call leaves for the next, and what surrounds a call, is followed, or refused; never frozen."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import itertools
import random
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, clear_autocast_cache, is_grad_enabled, nn, set_autocast_enabled

import fxamp
from tests.helpers import assert_same, check_against_autocast, run
from tests.oracle import cuda_rules

BF16 = torch.bfloat16


class Net(nn.Module):
    """A module whose forward is a function, with a linear layer and a weight at hand."""

    def __new__(cls, function: Any = None, **attributes: Any) -> Any:
        kind = cls if function is None else type(cls.__name__, (cls,), {"forward": function})
        return object.__new__(kind)

    def __init__(self, function: Any, **attributes: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(8, 8))
        for name, value in attributes.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)


def rows() -> Tensor:
    return torch.randn(4, 8, requires_grad=True)


# -- state that the first call makes ---------------------------------------------------------------------


def recurrent(m: Any, x: Tensor) -> Tensor:
    h = m.h if hasattr(m, "h") else torch.zeros(8)
    m.h = torch.tanh(m.fc(x) + h).detach()
    return m.h @ m.w


def recurrent_by_default(m: Any, x: Tensor) -> Tensor:
    h = getattr(m, "h", None)
    m.h = torch.tanh(m.fc(x) + (0 if h is None else h)).detach()
    return m.h @ m.w


def recurrent_by_exception(m: Any, x: Tensor) -> Tensor:
    try:
        h = m.h
    except AttributeError:
        h = torch.zeros(8)
    m.h = torch.tanh(m.fc(x) + h).detach()
    return m.h @ m.w


def kept_noise(m: Any, x: Tensor) -> Tensor:
    if not hasattr(m, "noise"):
        m.noise = torch.randn(8)
    return m.fc(x) * m.noise


def from_a_number(m: Any, x: Tensor) -> Tensor:
    m.total = m.total * 0.5 + x.detach().mean()
    return m.fc(x) * m.total


def empty_at_first(m: Any, x: Tensor) -> Tensor:
    if m.h.numel() == 0:
        m.h = torch.zeros(8)
    m.h = torch.tanh(m.fc(x) + m.h).detach()
    return m.h @ m.w


def registered_late(m: Any, x: Tensor) -> Tensor:
    if not hasattr(m, "mask"):
        m.register_buffer("mask", torch.randn(8, 8))
    return m.fc(x) @ m.mask


def none_in_the_buffers(m: Any, x: Tensor) -> Tensor:
    if m.h is None:
        m.h = torch.zeros(8)
    m.h = torch.tanh(m.fc(x) + m.h).detach()
    return m.h @ m.w


def past_setattr(m: Any, x: Tensor) -> Tensor:
    c = m.__dict__.get("c")
    object.__setattr__(m, "c", x.detach())
    return m.fc(x) if c is None else m.fc(x) + c


def counting_past_setattr(m: Any, x: Tensor) -> Tensor:
    m.__dict__["n"] = m.__dict__.get("n", 0) + 1
    return m.fc(x) * m.n


def past_the_buffers(m: Any, x: Tensor) -> Tensor:
    m._buffers["low"] = m._buffers["low"] * 0.9 + x.detach().mean(0) * 0.1
    return m.fc(x) + m.low


def remembering_in_a_set(m: Any, x: Tensor) -> Tensor:
    m.seen.add(len(m.seen))
    return m.fc(x) * len(m.seen)


def remembering_in_a_queue(m: Any, x: Tensor) -> Tensor:
    m.queue.append(x.detach())
    return m.fc(x) * len(m.queue)


def deleting(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x) * m.once
    del m.once
    return y


class Cached(Net):
    """Draws once, and keeps what it drew."""

    @functools.cached_property
    def noise(self) -> Tensor:
        return torch.randn(8)


class CachedMethod(Net):
    """Draws once, in a cache of Python's."""

    @functools.lru_cache  # noqa: B019 - what users write
    def noise_of(self, size: int) -> Tensor:
        return torch.randn(size)


class ClassDefault(Net):
    """Has no state at first."""

    h = None


class BehindAProperty(Net):
    """Keeps its state behind a property."""

    @property
    def state(self) -> Any:
        return self.__dict__.get("_state")

    @state.setter
    def state(self, value: Any) -> None:
        self._state = value


def behind_a_property(m: Any, x: Tensor) -> Tensor:
    before = m.state
    m.state = m.fc(x).detach()
    return m.fc(x) if before is None else m.fc(x) + before


STATEFUL: dict[str, Any] = {
    "hasattr": lambda: Net(recurrent),
    "getattr": lambda: Net(recurrent_by_default),
    "AttributeError": lambda: Net(recurrent_by_exception),
    "a default of the class": lambda: ClassDefault(none_in_the_buffers),
    "a buffer that is None": lambda: with_empty_buffer(Net(none_in_the_buffers)),
    "a number at first": lambda: Net(from_a_number, total=0.0),
    "noise": lambda: Net(kept_noise),
    "an empty buffer": lambda: Net(empty_at_first, h=torch.zeros(0)),
    "a buffer made late": lambda: Net(registered_late),
    "object.__setattr__": lambda: Net(past_setattr),
    "__dict__": lambda: Net(counting_past_setattr),
    "_buffers": lambda: Net(past_the_buffers, low=torch.ones(8)),
    "a set": lambda: Net(remembering_in_a_set, seen=set()),
    "a cached property": lambda: Cached(lambda m, x: m.fc(x) * m.noise),
    "a property": lambda: BehindAProperty(behind_a_property),
}


def with_empty_buffer(model: Net) -> Net:
    model.register_buffer("h", None)
    return model


@pytest.mark.parametrize("name", STATEFUL)
def test_state_of_the_first_call_in_a_submodule_is_kept_by_a_call(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), STATEFUL[name](), nn.Linear(8, 8))
    amp = check_against_autocast(model, rows(), calls=3, modes=(True,))
    assert [decision.rule for decision in amp.plan if decision.rule] == ["lower", "opaque", "lower"]


@pytest.mark.parametrize("policy", ["autocast", "full"])
@pytest.mark.parametrize("name", STATEFUL)
def test_state_of_the_first_call_of_the_model_is_refused(name: str, policy: str) -> None:
    model = STATEFUL[name]()
    before = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(model).items()}
    with pytest.raises(fxamp.CaptureError, match=r"(?s)cannot trace .*self\..*\n\nhint: put that line into a subm"):
        fxamp.convert(model, policy=policy)
    assert vars(model).keys() == before.keys()


@pytest.mark.parametrize(
    "model",
    [
        Net(deleting, once=torch.ones(8)),
        Net(remembering_in_a_queue, queue=deque()),
        CachedMethod(lambda m, x: m.fc(x) * m.noise_of(8)),
    ],
)
def test_other_state_that_a_graph_would_forget_is_refused(model: nn.Module) -> None:
    with pytest.raises(fxamp.CaptureError, match=r"deletes self\.once|changes self\.queue|in the cache of noise_of"):
        fxamp.convert(model)


KEPT: Any = None
CALLS = 0


def in_a_global(m: Any, x: Tensor) -> Tensor:
    global KEPT
    before, KEPT = KEPT, x.detach()
    return m.fc(x) if before is None else m.fc(x) + before


def counting_in_a_global(m: Any, x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return m.fc(x) * CALLS


def in_the_class(m: Any, x: Tensor) -> Tensor:
    before = type(m).h
    type(m).h = x.detach()
    return m.fc(x) if before is None else m.fc(x) + before


LOG: deque[Any] = deque()


def in_a_list_of_the_file(m: Any, x: Tensor) -> Tensor:
    LOG.append(x)
    return m.fc(x) * len(LOG)


def counter() -> Any:
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    return count


def test_lists_of_the_file_and_variables_of_a_closure_are_state_too() -> None:
    with pytest.raises(fxamp.CaptureError, match="keeps something in a list of a global or class variable"):
        fxamp.convert(Net(in_a_list_of_the_file))
    assert not LOG
    with pytest.raises(fxamp.CaptureError, match=r"changes self\.count"):
        fxamp.convert(Net(lambda m, x: m.fc(x) * m.count(), count=counter()))


@pytest.mark.parametrize("function", [in_a_global, counting_in_a_global, in_the_class])
def test_variables_that_a_forward_sets_are_refused_and_put_back(function: Any) -> None:
    model = ClassDefault(function)
    with pytest.raises(fxamp.CaptureError, match="sets the global or class variable"):
        fxamp.convert(model)
    assert (KEPT, CALLS, type(model).h) == (None, 0, None)


MISSING = float("nan")
FILLS = {"missing": MISSING}


def test_a_nan_in_a_variable_of_the_file_has_not_changed() -> None:
    check_against_autocast(Net(lambda m, x: torch.where(x > 0, m.fc(x), MISSING + FILLS["missing"])), rows())


def test_what_is_written_and_read_in_one_call_is_followed() -> None:
    def remembering(m: Any, x: Tensor) -> Tensor:
        m.last = m.fc(x)
        m.last = m.last * 2
        m.aux = m.last.mean()
        m.average = m.average * 0.9 + m.last.detach().float().mean(0) * 0.1
        return m.last + m.average

    model = Net(remembering, aux=0.0, last=None, average=torch.zeros(8))
    amp = check_against_autocast(model, rows(), calls=3)
    assert amp.aux.shape == ()
    assert "opaque" not in [decision.rule for decision in amp.plan]


def test_a_cached_property_without_tensors_is_settled_at_once() -> None:
    class Sized(Net):
        @functools.cached_property
        def scale(self) -> float:
            return self.fc.in_features**-0.5

    check_against_autocast(Sized(lambda m, x: F.relu(m.fc(x)) * m.scale), rows())


def test_a_function_that_is_refused_leaves_its_modules_as_they_were() -> None:
    model = Net(past_the_buffers, low=torch.ones(8))
    seen: list[Any] = []
    model.seen = seen

    def step(x: Tensor) -> Tensor:
        model.seen.append(x)
        return model(x)

    low = model.low
    with pytest.raises(fxamp.CaptureError):
        fxamp.convert(step)
    assert model.low is low
    assert model.seen is seen
    assert seen == []


# -- what the model asks about gradients -----------------------------------------------------------------


def on_grad_mode(m: Any, x: Tensor) -> Tensor:
    return m.fc(x) if torch.is_grad_enabled() else m.fc(x) * 2


def on_imported_grad_mode(m: Any, x: Tensor) -> Tensor:
    return m.fc(x) if is_grad_enabled() else m.fc(x) * 2


def on_inference_mode(m: Any, x: Tensor) -> Tensor:
    return m.fc(x) * (2 if torch.is_inference_mode_enabled() else 3)


def inside_of_regions(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = 2.0 if torch.is_grad_enabled() else 3.0
        scale += 5 if torch.is_inference_mode_enabled() else 7
        with torch.enable_grad():
            scale += 10 if torch.is_grad_enabled() else 20
    return m.fc(x) * scale * (2 if torch.is_grad_enabled() else 5)


GRAD_CONTEXTS: Any = (torch.enable_grad, torch.no_grad, torch.inference_mode, torch.enable_grad)


def equal_in(contexts: Any, amp: Any, eager: Any, *args: Any, **named: Any) -> None:
    for context in contexts:
        with context(), torch.autocast("cpu", BF16):
            expected = eager(*args, **named)
        with context():
            assert_same(amp(*args, **named), expected, context.__name__)


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("function", [on_grad_mode, on_imported_grad_mode, on_inference_mode, inside_of_regions])
@pytest.mark.parametrize("converted_in", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_grad_mode_is_that_of_each_call(function: Any, examples: bool, converted_in: Any) -> None:
    model, x = Net(function), rows()
    with converted_in():
        amp = fxamp.convert(model, dtype=BF16, example_inputs=(x,) if examples else None)
    equal_in(GRAD_CONTEXTS, amp, model, x)
    equal_in(GRAD_CONTEXTS, amp.eval(), model.eval(), x)
    equal_in(GRAD_CONTEXTS, copy.deepcopy(amp), model, x)


def test_a_model_that_does_not_ask_has_one_graph_for_every_grad_mode() -> None:
    model = Net(lambda m, x: F.layer_norm(m.fc(x), (8,)))
    amp = fxamp.convert(model, dtype=BF16)
    equal_in(GRAD_CONTEXTS, amp, model, rows())
    assert len(amp._conversion.variants) == 2


def viewing(m: Any, x: Tensor, scale: Any = None) -> Tensor:
    y = m.fc(x).view(-1, 2, 4) + m.w[0].view(2, 4)  # of a weight, too
    y = y.flatten(1) if x.dim() == 2 else y.sum(1)
    y[:, :4] += m.buffer.view(2, 2).repeat(1, 2).view(8)[:4]
    return y if scale is None else y * scale


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_conversion_in_inference_mode_is_the_same(device_type: str) -> None:
    model, x = Net(viewing, buffer=torch.randn(4)), rows()
    found = []
    for context in (torch.enable_grad, torch.inference_mode):
        with context():
            amp = fxamp.convert(model, dtype=BF16, device_type=device_type, example_inputs=(x,))
        found.append(str(amp.report()))
    assert found[0] == found[1]


def test_the_first_call_of_a_kind_may_be_in_inference_mode() -> None:
    model, x = Net(viewing, buffer=torch.randn(4)), rows()
    for first in (torch.inference_mode, torch.enable_grad):
        amp = fxamp.convert(model, dtype=BF16, example_inputs=(x,))
        with first():
            amp(x, torch.randn(8))
            amp(x.double().detach().bfloat16(), torch.randn(8))  # planned by rule
        equal_in(GRAD_CONTEXTS, amp, model, x, torch.randn(8))
        assert amp(x, torch.randn(8)).requires_grad
    with torch.inference_mode():
        inside = torch.randn(4, 8)
        amp = fxamp.convert(model, dtype=BF16, example_inputs=(inside,))
    equal_in((torch.inference_mode,), amp, model, inside)
    equal_in((torch.enable_grad,), amp, model, x)


def test_a_module_frozen_in_inference_mode_serves_inputs_that_want_a_gradient() -> None:
    amp, x = fxamp.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), dtype=BF16), rows()
    with torch.inference_mode():
        frozen = amp.freeze()
    frozen(x).sum().backward()
    assert_same(frozen(x), amp.eval()(x))
    assert x.grad is not None


def penalty(m: Any, x: Tensor) -> Tensor:
    return m.fc(x).float().sum() + sum(p.pow(2).sum() for p in m.parameters() if p.requires_grad)


def on_one_weight(m: Any, x: Tensor) -> Tensor:
    return m.fc(x) if m.w.requires_grad else m.fc(x.detach()) * 2


def on_a_dtype(m: Any, x: Tensor) -> Tensor:
    return m.fc(x.to(next(m.parameters()).dtype))


@pytest.mark.parametrize("function", [penalty, on_one_weight])
def test_whether_a_parameter_is_trained_is_asked_at_each_call(function: Any) -> None:
    model, x = Net(function), rows()
    amp = fxamp.convert(model, dtype=BF16)
    for trained in (True, False, True):
        model.w.requires_grad_(trained)
        equal_in([torch.enable_grad], amp, model, x)
    model.fc.weight.requires_grad_(False)
    equal_in(GRAD_CONTEXTS, amp, model, x)


def test_a_frozen_module_goes_the_way_of_the_one_that_was_frozen() -> None:
    model, x = Net(penalty), rows()
    amp = fxamp.convert(model, dtype=BF16).eval()
    frozen = amp.freeze()
    assert_same(frozen(x), amp(x))
    assert all(p.requires_grad for p in model.parameters()), "what was frozen is left as it is"
    assert not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(fxamp.PolicyError, match=r"policy autocast/cpu bf16(?s:.*)hint: amp.replan\(policy\)"):
        amp.freeze().replan("full")


def test_a_dtype_that_is_asked_of_a_parameter_is_asked_again() -> None:
    model, x = Net(on_a_dtype), rows()
    amp = fxamp.convert(copy.deepcopy(model), dtype=BF16)
    equal_in([torch.enable_grad], amp, model, x)
    equal_in([torch.enable_grad], amp.double(), model.double(), x)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.fc(x) if next(m.parameters()).grad is None else m.fc(x) * 2,
        lambda m, x: m.fc(x) if m.w.grad is None else m.fc(x) * 2,
        lambda m, x: m.fc(x) if x.grad_fn is None else m.fc(x) * 2,
    ],
)
def test_what_may_be_none_of_a_tensor_is_refused(function: Any) -> None:
    with pytest.raises(fxamp.CaptureError, match=r"reads \.grad.* of a tensor, which may be None at another call"):
        fxamp.convert(Net(function))
    check_against_autocast(nn.Sequential(nn.Linear(8, 8), Net(function)), rows())


# -- numbers that code branches on -----------------------------------------------------------------------


def scheduled(m: Any, x: Tensor, step: int = 0) -> Tensor:
    return m.fc(x) if step > 100 else m.fc(x) * 2


def warming_up(m: Any, x: Tensor, step: float) -> Tensor:
    y = m.fc(x) * step
    if step < 10 and 10 / (step + 1) > 1:
        y = y + torch.randn(8)
    return y


def repeating(m: Any, x: Tensor, times: int = 1) -> Tensor:
    for _ in range(times):
        x = m.fc(x)
    return x


@pytest.mark.parametrize(
    ("function", "numbers"),
    [(scheduled, (50, 150, 60, 100, 101)), (warming_up, (50.0, 3.0, 9.0, 20.0)), (repeating, (2, 5, 2))],
)
@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_number_that_goes_another_way_gets_another_graph(
    function: Any, numbers: Any, examples: bool, named: bool
) -> None:
    model, x = Net(function), rows()
    step = next(reversed(inspect.signature(function).parameters))
    if examples is False and function is warming_up:
        return  # refused: it needs an example of its number
    amp = fxamp.convert(model, dtype=BF16, example_inputs=(x, numbers[0]) if examples else None)
    for number in numbers:
        args, kwargs = ((x,), {step: number}) if named and function is not warming_up else ((x, number), {})
        torch.manual_seed(0)
        with torch.autocast("cpu", BF16):
            expected = model(*args, **kwargs)
        torch.manual_seed(0)
        assert_same(amp(*args, **kwargs), expected)


def test_a_hundred_numbers_on_one_way_share_a_graph() -> None:
    model, x = Net(scheduled), rows()
    amp = fxamp.convert(model, dtype=BF16)
    for step in range(200):
        equal_in([torch.enable_grad], amp, model, x, step)
    assert len(amp._conversion.variants) <= 5


# -- None, where a trace has a value ---------------------------------------------------------------------


class State(NamedTuple):
    value: Tensor
    extra: Tensor | None


@dataclasses.dataclass(frozen=True)
class Batch:
    x: Tensor
    mask: Tensor | None = None
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)


class Bag:
    """A class that nothing is known of."""

    def __init__(self, x: Tensor, mask: Tensor | None) -> None:
        self.x, self.mask = x, mask

    def get(self, name: str) -> Any:
        return getattr(self, name, None)


def of_a_state(m: Any, x: Tensor, state: Any) -> Tensor:
    y = m.fc(x) + state[0]
    return y * 3 if state[1] is None else y * state[1]


def of_an_optional_state(m: Any, x: Tensor, state: Any = None) -> Tensor:
    if state is None:
        return m.fc(x)
    return m.fc(x) * 3 if state[1] is None else m.fc(x) * 2


def of_a_dict(m: Any, b: Any) -> Tensor:
    y = m.fc(b["x"])
    return y * 2 if b.get("mask") is None else y * b["mask"]


def of_attributes(m: Any, b: Any) -> Tensor:
    y = m.fc(b.x)
    return y * 2 if b.mask is None else y * b.mask


def of_an_asking_object(m: Any, b: Any) -> Tensor:
    y = m.fc(b.x)
    return y * 2 if b.get("mask") is None else y * 3


def of_a_flag(m: Any, x: Tensor, options: Any) -> Tensor:
    y = m.fc(x) * options["scale"]
    return y * 2 if options["double"] and options["how"] != "sum" else y


def two(value: Tensor) -> list[Any]:
    return [value, torch.full((8,), 1.5)]


X = torch.randn(4, 8)
CONTAINERS: dict[str, tuple[Any, list[tuple[Any, ...]]]] = {
    "a tuple": (of_a_state, [(X, (X, None)), (X, (X, X + 1)), (X, [X, None]), (X, State(X, None)), (X, State(X, X))]),
    "an optional tuple": (of_an_optional_state, [(X, (X, None)), (X,), (X, (X, X)), (X, None)]),
    "a dict": (of_a_dict, [({"x": X},), ({"x": X, "mask": None},), ({"x": X, "mask": X + 1},), ({"mask": X, "x": X},)]),
    "a dataclass": (of_attributes, [(Batch(X),), (Batch(X, X + 1),), (Batch(X, None, {"a": X}),)]),
    "a namespace": (of_attributes, [(SimpleNamespace(x=X, mask=X),), (SimpleNamespace(x=X + 1, mask=X + 1),)]),
    "flags": (
        of_a_flag,
        [
            (X, {"scale": 2.0, "double": True, "how": "mean"}),
            (X, {"scale": 3.0, "double": True, "how": "mean"}),
            (X, {"scale": 2.0, "double": False, "how": "mean"}),
            (X, {"scale": 2.0, "double": True, "how": "sum"}),
        ],
    ),
}


@pytest.mark.parametrize("policy", ["autocast", "full"])
@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("name", CONTAINERS)
def test_none_in_a_container_is_seen(name: str, examples: bool, policy: str) -> None:
    function, calls = CONTAINERS[name]
    model = Net(function)
    if function is of_a_flag and not examples:
        with pytest.raises(fxamp.CaptureError, match="depends on a tensor value"):
            fxamp.convert(model)
        return
    names = list(inspect.signature(function).parameters)[1:]
    for first in calls:
        amp = fxamp.convert(model, dtype=BF16, example_inputs=first if examples else None, policy=policy)
        for args in (first, *calls, first):
            with torch.autocast("cpu", BF16, enabled=policy == "autocast"):
                expected = model(*args)
            assert_same(amp(*args), expected)
            assert_same(amp(**dict(zip(names, args, strict=False))), expected)
        assert_same(copy.deepcopy(amp)(*first), amp(*first))


def test_none_in_an_object_that_nothing_is_known_of_is_an_error_at_least() -> None:
    for function in (of_attributes, of_an_asking_object):
        model = Net(function)
        amp = fxamp.convert(model, dtype=BF16)
        for first, second in ((None, X), (X, None)):
            amp = fxamp.convert(model, dtype=BF16)
            equal_in([torch.enable_grad], amp, model, Bag(X, first))
            with pytest.raises(fxamp.CaptureError, match=r"goes another way.*the graph was made for (None|a value)"):
                amp(Bag(X, second))


class Counting(nn.Module):
    """Cannot be traced into, and gives what it is asked for."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.calls, self.result = 0, result

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.result(x)


def asks_a_part(m: Any, x: Tensor) -> Tensor:
    out = m.inner(m.fc(x))
    return out[0] if out[1] is None else out[0] * 2


def asks_a_nested_part(m: Any, x: Tensor) -> Tensor:
    out = m.inner(m.fc(x))
    return out[0] if out[1]["aux"] is None else out[0] * 2


def asks_the_whole(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    return y if m.inner(y) is None else y * 2


def asks_for_nothing(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    m.inner(y)
    return y.relu()


RESULTS: list[tuple[Any, Any, Any]] = [
    (asks_a_part, lambda x: (x, x), lambda x: (x, None)),
    (asks_a_nested_part, lambda x: (x, {"aux": x}), lambda x: (x, {"aux": None})),
    (asks_the_whole, lambda x: x, lambda x: None),
]


@pytest.mark.parametrize(("function", "full", "empty"), RESULTS)
def test_none_from_an_opaque_call_is_an_error_or_known_from_examples(function: Any, full: Any, empty: Any) -> None:
    model, x = Net(function, inner=Counting(full)), rows()
    for examples in (None, (x,)):
        amp = fxamp.convert(copy.deepcopy(model), dtype=BF16, example_inputs=examples)
        equal_in([torch.enable_grad], amp, model, x)
        amp.inner.result = empty
        with pytest.raises(
            fxamp.CaptureError, match=r"at `.*` \(test_capture_state.py:\d+\) the graph was made for a va"
        ):
            amp(x)
    model = Net(function, inner=Counting(empty))
    equal_in([torch.enable_grad], fxamp.convert(copy.deepcopy(model), dtype=BF16, example_inputs=(x,)), model, x)


def test_an_opaque_call_that_nobody_asks_may_give_none() -> None:
    for examples in (None, (rows(),)):
        model = Net(asks_for_nothing, inner=Counting(lambda x: None))
        amp = fxamp.convert(copy.deepcopy(model), dtype=BF16, example_inputs=examples)
        equal_in([torch.enable_grad], amp, model, rows())


class Halves(torch.autograd.Function):
    """Gives None for its second half."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x * 2, None

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2


def asks_a_function(m: Any, x: Tensor) -> Tensor:
    out = Halves.apply(m.fc(x))
    return out[0] if out[1] is None else out[0] * 2


def test_none_from_a_function_of_the_users_is_an_error_or_known_from_examples() -> None:
    model, x = Net(asks_a_function), rows()
    with pytest.raises(fxamp.CaptureError, match="the graph was made for a value, found None"):
        fxamp.convert(model, dtype=BF16)(x)


# -- autocast that is switched by hand -------------------------------------------------------------------


def switched_off(m: Any, x: Tensor) -> Tensor:
    before = torch.is_autocast_enabled("cpu")
    torch.set_autocast_enabled("cpu", False)
    y = torch.mm(x.float(), m.w)
    torch.set_autocast_enabled("cpu", before)
    return m.fc(y)


def switched_by_an_imported_name(m: Any, x: Tensor) -> Tensor:
    set_autocast_enabled("cpu", False)
    y = torch.mm(x.float(), m.w)
    set_autocast_enabled("cpu", True)
    return m.fc(y)


def other_dtype(m: Any, x: Tensor) -> Tensor:
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16 if before == BF16 else BF16)
    y = torch.mm(x.float(), m.w).float()
    torch.set_autocast_dtype("cpu", before)
    return m.fc(y)


def without_cache(m: Any, x: Tensor) -> Tensor:
    torch.set_autocast_cache_enabled(False)
    y = torch.mm(x.float(), m.w) @ m.w
    torch.set_autocast_cache_enabled(True)
    return y


def emptied_cache(m: Any, x: Tensor) -> Tensor:
    y = torch.mm(x.float(), m.w)
    torch.clear_autocast_cache()
    return y @ m.w


def emptied_in_a_region(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", BF16):
        y = torch.mm(x.float(), m.w)
        clear_autocast_cache()
        return y @ m.w


def without_gradients(m: Any, x: Tensor) -> Tensor:
    torch._C._set_grad_enabled(False)
    y = torch.mm(x.float(), m.w)
    torch._C._set_grad_enabled(True)
    return m.fc(y) + y


SWITCHES = [
    switched_off,
    switched_by_an_imported_name,
    other_dtype,
    without_cache,
    emptied_cache,
    emptied_in_a_region,
    without_gradients,
]


@pytest.mark.parametrize("function", SWITCHES)
def test_autocast_switched_by_hand_is_refused_or_stays_a_call(function: Any) -> None:
    state = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
    with pytest.raises(fxamp.CaptureError, match=r"(without a `with`|the cache of autocast), which a graph would forg"):
        fxamp.convert(Net(function))
    now = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
    assert now == state
    assert torch.is_grad_enabled()
    model = nn.Sequential(nn.Linear(8, 8), Net(function), nn.Linear(8, 8))
    if function in (emptied_cache, emptied_in_a_region):
        check_against_autocast(model, rows(), calls=1)
    else:
        with pytest.raises(fxamp.CaptureError, match="without a `with`"):
            fxamp.convert(model)


def regions_of_its_device(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    with torch.autocast(x.device.type, enabled=False):
        y = y.float() @ m.w
    with torch.amp.autocast(device_type=y.device.type):
        return m.fc(y)


def asks_about_its_device(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    if torch.is_autocast_enabled(x.device.type):
        y = y.to(torch.get_autocast_dtype(x.device.type)) * 2
    return y


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("function", [regions_of_its_device, asks_about_its_device])
def test_the_device_of_a_traced_value_is_the_one_of_the_rules(function: Any, examples: bool) -> None:
    check_against_autocast(Net(function), rows(), examples=examples)
    with cuda_rules():
        check_against_autocast(Net(function), rows(), examples=examples, rules="cuda", modes=(True,))


def test_a_region_of_the_device_of_a_traced_value_is_found_anew_for_another_device() -> None:
    amp = fxamp.convert(Net(regions_of_its_device), dtype=BF16)
    assert [decision.reason for decision in amp.plan].count("region enabled=False") == 2
    moved = amp.replan(fxamp.Policy.of("autocast").resolved("cuda", BF16))
    assert [decision.reason for decision in moved.plan].count("region enabled=False") == 2


def test_autocast_that_is_left_switched_is_refused() -> None:
    class Leaves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.set_autocast_enabled("cpu", False)
            return x

    def switches_for_a_submodule(m: Any, x: Tensor) -> Tensor:
        torch.set_autocast_enabled("cpu", False)
        return m.fc(x)

    for model in (nn.Sequential(Leaves(), nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8), Leaves())):
        with pytest.raises(fxamp.CaptureError, match="without a `with`"):
            fxamp.convert(model)
    with pytest.raises(fxamp.CaptureError, match="without a `with`"):
        fxamp.convert(Net(switches_for_a_submodule))
    assert not torch.is_autocast_enabled("cpu")


# -- what changes after the conversion -------------------------------------------------------------------


def layered() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Identity()), nn.Linear(8, 8, bias=False))


@pytest.mark.parametrize("path", ["0", "1", "1.0", "1.1"])
@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda module, args, out: out * 2),
        lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] * 3,)),
        lambda m: m.register_full_backward_hook(lambda module, into, out: (into[0] * 2,)),
    ],
)
def test_a_hook_that_is_registered_later_runs(path: str, register: Any) -> None:
    model, x = layered(), rows()
    amp = fxamp.convert(copy.deepcopy(model), dtype=BF16)
    amp(x)
    handles = [register(owner.get_submodule(path)) for owner in (model, amp)]
    compare_gradients(amp, model, x)
    compare_gradients(amp.eval(), model.eval(), x)
    for handle in handles:
        handle.remove()
    compare_gradients(amp, model, x)


def compare_gradients(amp: nn.Module, model: nn.Module, x: Tensor) -> None:
    for owner in (amp, model):
        owner.zero_grad()
    found = run(amp, (x,), {}, nullcontext())
    expected = run(model, (x,), {}, torch.autocast("cpu", BF16))
    assert_same(found, expected)


@pytest.mark.parametrize("path", ["0", "1.0", "1.1", "1"])
def test_a_submodule_that_is_replaced_later_is_an_error(path: str) -> None:
    amp = fxamp.convert(layered(), dtype=BF16)
    owner, _, name = path.rpartition(".")
    setattr(amp.get_submodule(owner), name, nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(fxamp.CaptureError) as raised:
        amp(rows())
    assert f"submodule '{path}' was replaced after fxamp.convert" in str(raised.value)
    assert str(raised.value).endswith("hint: replace it in the model, and convert that")


def test_a_submodule_that_stays_a_call_may_be_replaced() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 8)), rows()
    amp = fxamp.convert(copy.deepcopy(model), dtype=BF16)
    for owner in (model, amp):
        owner.get_submodule("")._modules["1"] = nn.ReLU()
    compare_gradients(amp, model, x)


def test_a_parameter_that_was_not_there_is_found() -> None:
    model, x = layered(), rows()
    amp = fxamp.convert(copy.deepcopy(model), dtype=BF16)
    model[2].bias = nn.Parameter(torch.ones(8))
    amp.get_submodule("2").bias = nn.Parameter(torch.ones(8))
    compare_gradients(amp, model, x)


def widening(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.w, m.fc(x)])


@pytest.mark.parametrize("dtype", [BF16, torch.float64, torch.float32])
@pytest.mark.parametrize("policy", ["autocast", "full"])
def test_weights_of_another_dtype_that_are_assigned(dtype: torch.dtype, policy: str) -> None:
    model, x = Net(widening), rows()
    amp = fxamp.convert(copy.deepcopy(model), dtype=BF16, policy=policy)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    for owner in (model, amp):
        owner.load_state_dict(state, assign=True)
    context = nullcontext() if policy == "full" else torch.autocast("cpu", BF16)
    same_outcome(amp, model, x, context)
    same_outcome(amp, model, x.detach().to(dtype), context)
    same_outcome(amp.eval(), model.eval(), x.detach().to(dtype), context)


def same_outcome(amp: nn.Module, model: nn.Module, x: Tensor, context: Any) -> None:
    try:
        expected = run(model, (x,), {}, context)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            amp(x)
        return
    assert_same(run(amp, (x,), {}, nullcontext()), expected)


@pytest.mark.parametrize("change", [nn.Module.bfloat16, nn.Module.double])
@pytest.mark.parametrize("part", ["", "fc"])
def test_a_dtype_that_the_original_is_given_is_followed(change: Any, part: str) -> None:
    model, x = Net(widening), rows()
    amp = fxamp.convert(model, dtype=BF16)
    amp(x)
    change(model.get_submodule(part))
    same_outcome(amp, model, x, torch.autocast("cpu", BF16))
    if not part:
        same_outcome(amp.eval(), model.eval(), x.detach().double(), torch.autocast("cpu", BF16))


def test_a_dtype_that_the_original_is_given_leaves_buffers_behind() -> None:
    model = Net(lambda m, x: torch.cat([m.table, m.fc(x)]), table=torch.ones(8, 8))
    amp = fxamp.convert(model, dtype=BF16)
    model.bfloat16()
    with pytest.raises(fxamp.CaptureError) as raised:
        amp(rows())
    assert str(raised.value) == (
        "Net was given another dtype after fxamp.convert: its buffer 'table' is torch.bfloat16, expected torch.float32 "
        "as in the converted module, which shares its parameters\n\nhint: call .to(), .bfloat16() and the like on the "
        "converted module, or convert again"
    )
    x = rows()
    equal_in([torch.enable_grad], amp.bfloat16(), model, x)


def test_a_part_of_the_converted_module_is_given_another_dtype() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)), rows()
    amp = fxamp.convert(copy.deepcopy(model), dtype=BF16)
    for owner in (model, amp):
        owner.get_submodule("2").bfloat16()
    compare_gradients(amp, model, x)


def test_a_frozen_module_keeps_its_footing() -> None:
    model, x = layered(), rows()
    amp = fxamp.convert(model, dtype=BF16).eval()
    frozen = amp.freeze()
    code = frozen.code
    assert_same(frozen(x), amp(x))
    assert frozen.to("cpu").code == code


# -- containers of Python's that are written to ----------------------------------------------------------


class Filling(nn.Module):
    """Stays a call, for it counts; what it makes it leaves in the container that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(8, 8), 0

    def forward(self, x: Tensor, found: Any) -> Tensor:
        y = self.fc(x)
        if isinstance(found, dict):
            found["h"] = y
        else:
            found.append(y)
        self.calls += 1
        return y * self.calls


def fills_a_dict(m: Any, x: Tensor) -> Any:
    found = {"h": x}
    return m.part(x, found) + found["h"]


def asks_with_a_default(m: Any, x: Tensor) -> Any:
    found: dict[str, Tensor] = {}
    return m.part(x, found=found) + found.get("h", 0)


def asks_for_the_length(m: Any, x: Tensor) -> Any:
    found = [x]
    return m.part(x, found) * len(found)


def hands_it_out(m: Any, x: Tensor) -> Any:
    found: dict[str, Tensor] = {}
    return m.part(x, found), found


def fills_a_nested_list(m: Any, x: Tensor) -> Any:
    found: list[Tensor] = []
    m.part(x, found)
    return {"found": (found,)}


@pytest.mark.parametrize("policy", ["autocast", "full"])
@pytest.mark.parametrize(
    "function", [fills_a_dict, asks_with_a_default, asks_for_the_length, hands_it_out, fills_a_nested_list]
)
def test_an_opaque_part_that_writes_to_a_container_is_an_error(function: Any, policy: str) -> None:
    amp = fxamp.convert(Net(function, part=Filling()), dtype=BF16).replan(policy)
    with pytest.raises(fxamp.CaptureError, match=r"^Filling changes the (dict|list) that it is given, which a graph"):
        amp(rows())


@pytest.mark.parametrize("policy", ["autocast", "full"])
def test_an_opaque_part_may_read_a_container(policy: str) -> None:
    class Reading(Filling):
        def forward(self, x: Tensor, found: Any) -> Tensor:
            self.calls += 1
            return self.fc(found["h"][0]) * x

    def gives_one(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x)
        return m.part(y, {"h": [y, None]})

    check_against_autocast(Net(gives_one, part=Reading()), rows(), policy=policy, calls=1)


def test_a_container_that_the_caller_gives_is_not_filled_by_a_trace() -> None:
    def remembers(m: Any, x: Tensor, cache: Any) -> Tensor:
        cache["h"] = m.fc(x)
        return cache["h"] @ m.w

    for cache in ({}, {"h": torch.ones(8)}):
        with pytest.raises(fxamp.CaptureError, match="puts something into the dict it is given, which a graph would"):
            fxamp.convert(Net(remembers), example_inputs=(rows(), cache))


COUNTS = {"calls": 0, "scale": 2.0}


class CountsOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        COUNTS["calls"] += 1
        return self.fc(x) * COUNTS["calls"]


def test_what_a_forward_counts_in_a_dict_of_its_file_is_refused_and_put_back() -> None:
    with pytest.raises(fxamp.CaptureError, match="counts in a dict of a global"):
        fxamp.convert(CountsOutside())
    assert COUNTS == {"calls": 0, "scale": 2.0}


DRAWN: dict[str, Any] = {
    "random.Random": (lambda: random.Random(0), lambda drawn: drawn.random()),
    "numpy's generator": (lambda: np.random.default_rng(0), lambda drawn: float(drawn.random())),
    "numpy's old one": (lambda: np.random.RandomState(0), lambda drawn: float(drawn.rand())),
    "itertools": (lambda: itertools.count(1), next),
    "a generator": (lambda: (float(i) for i in range(1, 9)), next),
}


class Draws(nn.Module):
    def __init__(self, drawn: Any, draw: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.drawn, self.draw = nn.Linear(4, 4), drawn, draw

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.draw(self.drawn)


@pytest.mark.parametrize("name", DRAWN)
def test_what_moves_on_when_it_is_asked_is_refused_or_stays_a_call(name: str) -> None:
    make, draw = DRAWN[name]
    drawn = make()
    with pytest.raises(fxamp.CaptureError, match=r"changes self.drawn|takes the next item of an iterator"):
        fxamp.convert(Draws(drawn, draw))
    assert draw(drawn) == draw(make())  # the user's own has not moved
    amp, x = fxamp.convert(nn.Sequential(Draws(make(), draw)), dtype=torch.bfloat16), torch.ones(2, 4)
    eager = Draws(make(), draw)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            expected = eager(x)
        assert torch.equal(amp(x), expected)


class Hands(nn.Module):
    """Hands a value on by an attribute, which it takes back."""

    found: Any = None

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.alpha, self.busy, self.use = nn.Linear(4, 4), None, False, use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def hands_on(m: Any, x: Tensor) -> Tensor:
    assert m.alpha is None
    m.alpha = m.fc(x).softmax(-1)
    y: Tensor = m.alpha * x
    m.alpha = None
    return m.fc(y)


def marks(m: Any, x: Tensor) -> Tensor:
    m.busy = True
    y = m.fc(x) * 2 if m.busy else x
    m.busy = False
    return y


def hands_on_of_the_class(m: Any, x: Tensor) -> Tensor:
    m.found = m.fc(x) if m.found is None else m.found
    y: Tensor = m.found + 1
    m.found = None
    return y


@pytest.mark.parametrize("use", [hands_on, marks, hands_on_of_the_class])
@pytest.mark.parametrize("inside", [False, True])
def test_what_a_forward_puts_back_is_no_state(use: Any, inside: bool) -> None:
    model = nn.Sequential(Hands(use), nn.Linear(4, 4)) if inside else Hands(use)
    amp = check_against_autocast(model, torch.randn(3, 4), calls=3)
    assert amp.report().totals["opaque"] == 0


def test_a_call_in_between_finds_what_was_set() -> None:
    class Reads(nn.Module):
        def __init__(self, owner: list[Any]) -> None:
            super().__init__()
            self.owner, self.calls = owner, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1  # so that it stays a call
            return x * self.owner[0].factor

    class Sets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.factor, self.reads = nn.Linear(4, 4), 1, None

        def forward(self, x: Tensor) -> Tensor:
            self.factor = 3
            y: Tensor = self.inner(self.fc(x))
            self.factor = 1
            return y

    model, x = Sets(), torch.randn(3, 4)
    model.inner = Reads([model])
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    with pytest.raises(fxamp.CaptureError, match=r"sets self\.factor"):
        fxamp.convert(model)
    with torch.autocast("cpu", torch.bfloat16):
        amp = fxamp.convert(nn.Sequential(model), dtype=torch.bfloat16)
    assert_same(amp(x), expected)


def forgets_to(m: Any, x: Tensor) -> Tensor:
    y = marks(m, x)
    m.busy = not m.busy
    return y


def puts_back_another(m: Any, x: Tensor) -> Tensor:
    m.alpha = m.fc(x)
    y: Tensor = m.alpha if m.alpha is not None else x
    m.alpha = 0
    return y


@pytest.mark.parametrize(("use", "line"), [(forgets_to, "m.busy = not m.busy"), (puts_back_another, "m.alpha = 0")])
def test_what_is_not_put_back_is_refused_with_its_line(use: Any, line: str) -> None:
    with pytest.raises(fxamp.CaptureError) as raised:
        fxamp.convert(Hands(use))
    assert f"cannot trace {use.__name__} (test_capture_state.py:" in str(raised.value)
    assert f"`{line}` " in str(raised.value)
