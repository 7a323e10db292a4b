"""State: what one call leaves for the next, and what surrounds a call, is followed, or refused; never frozen."""

from __future__ import annotations

import functools
from collections import deque
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxamp
from tests.helpers import check_against_autocast

BF16 = torch.bfloat16


class Net(nn.Module):
    """A module around a function of (module, inputs), with a linear layer and a weight at hand."""

    def __init__(self, function: Any, **attributes: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(8, 8))
        self.function = function
        for name, value in attributes.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(self, *inputs, **named)


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


@pytest.mark.parametrize("function", [in_a_global, counting_in_a_global, in_the_class])
def test_variables_that_a_forward_sets_are_refused_and_put_back(function: Any) -> None:
    with pytest.raises(fxamp.CaptureError, match="sets the global or class variable"):
        fxamp.convert(ClassDefault(function))
    assert (KEPT, CALLS, ClassDefault.h) == (None, 0, None)


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
