"""How does a converted graph run, and what surrounds it?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx

from fxamp.policy import DEVICE_TYPES
from fxamp.runtime.weights import HELD, Held

__all__ = ["around_a_call", "inner_backend", "without_autocast"]


def inner_backend(inner: str | Callable[..., Any], mode: str | None) -> Callable[..., Callable[..., Any]]:
    """What makes a function of a converted graph: a backend of torch.compile, or nothing but the graph itself."""
    if inner == "eager":
        return lambda gm, example_inputs: gm.forward
    found = _looked_up(inner) if mode is None else functools.partial(_inductor, mode=mode)

    def compiling(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        # What traces the graph now must not see autocast; and knows no identity of tensors but ``is``.
        HELD.append(Held({}, {}, []))
        try:
            with _switched(DEVICE_TYPES, enabled=False):
                run: Callable[..., Any] = found(gm, list(example_inputs))
                return run
        finally:
            HELD.pop()

    return compiling


def _looked_up(name: str | Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend  # to import Dynamo takes a second

    return lookup_backend(name)


def _inductor(gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str) -> Any:
    from torch import _inductor

    return _inductor.compile(gm, list(example_inputs), options=_inductor.list_mode_options(mode))


def without_autocast(run: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """What runs a graph that has its casts."""

    def running(*args: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return run(*args)

    return running


@contextmanager
def around_a_call(device_types: Sequence[str], dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast on, for what Dynamo leaves to Python; and each weight cast once, whichever graphs use it."""
    HELD.append(Held({}, {}))
    try:
        with _switched(device_types, dtype):
            yield
    finally:
        HELD.pop()


@contextmanager
def _switched(device_types: Sequence[str], dtype: torch.dtype | None = None, *, enabled: bool = True) -> Iterator[None]:
    with ExitStack() as stack:
        for device_type in device_types:
            if device_type == "cpu" or torch.cuda.is_available():
                stack.enter_context(torch.autocast(device_type, dtype, enabled))
        yield
