"""What surrounds a trace: the modes it is made in, and what it must not leave behind."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Final, TypeAlias
from unittest import mock

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

from fxamp.capture.patches import mode_of, python_state, set_mode
from fxamp.capture.regions import autocast_as

__all__ = ["Ambient", "autocast_answers", "caches_emptied", "changed_modules", "check_root", "modes", "purged"]

Ambient: TypeAlias = tuple[str, torch.dtype] | None

_QUESTIONS: Final = tuple(
    name
    for name in (
        "is_autocast_enabled",
        "get_autocast_dtype",
        "is_autocast_cpu_enabled",
        "get_autocast_cpu_dtype",
        "get_autocast_gpu_dtype",
    )
    if hasattr(torch, name)
)


@contextmanager
def modes(modules: Mapping[str, nn.Module], training: Mapping[str, bool]) -> Iterator[None]:
    """The ``training`` flags that a trace is made with; the modules get theirs back."""
    before = {module: mode_of(module) for module in modules.values()}
    try:
        for path, module in modules.items():
            set_mode(module, training.get(path, mode_of(module)))
        yield
    finally:
        for module, flag in before.items():
            set_mode(module, flag)


@contextmanager
def autocast_answers(ambient: Ambient) -> Iterator[set[str]]:
    """Autocast switched on for whoever asks.

    Args:
        ambient: device type and dtype of the autocast that a model is traced for, or None.

    Yields:
        The questions that were asked: what is traced then is right for this autocast only.
    """
    asked: set[str] = set()

    def noting(name: str) -> Callable[..., Any]:
        question = getattr(torch, name)

        def answer(*args: Any) -> Any:
            asked.add(name)
            return question(*args)

        return answer

    answers: dict[str, Any] = {name: noting(name) for name in _QUESTIONS}
    switched_on = nullcontext() if ambient is None else autocast_as(*ambient, enabled=True)
    with switched_on, mock.patch.multiple(torch, **answers):
        yield asked


def changed_modules(modules: Mapping[str, nn.Module], before: Mapping[str, Any]) -> dict[str, str]:
    """Path of each module whose Python state is not as before, and what was changed."""
    now = {path: python_state(module) for path, module in modules.items()}
    return {
        path: f"changes self.{name}, which a graph cannot carry to the next call"
        for path in modules
        for name in now[path]
        if now[path][name] != before[path].get(name)
    }


def check_root(changed: Mapping[str, str], drawn: torch.Tensor) -> None:
    """Raises TraceError when the model itself changed its state, or torch's random numbers were drawn."""
    if "" in changed:
        raise TraceError(changed[""])
    if not torch.equal(torch.get_rng_state(), drawn):
        raise TraceError("draws random numbers on its own, which a graph would freeze")


@contextmanager
def caches_emptied(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Empties ``functools.lru_cache`` of functions at hand afterwards: traced values must not stay in them."""
    try:
        yield
    finally:
        purged(modules)
        for value in _outside(modules):
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()


def purged(modules: Iterable[nn.Module]) -> bool:
    """Takes traced values out of global and class variables; whether there were any."""
    found = False
    for value in _outside(modules):
        if type(value) is dict:
            for key in [key for key, item in value.items() if isinstance(item, fx.Proxy)]:
                found = True
                del value[key]
        elif type(value) is list and any(isinstance(item, fx.Proxy) for item in value):
            found = True
            value[:] = [item for item in value if not isinstance(item, fx.Proxy)]
    return found


def _outside(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """The variables of the classes and files that the modules are written in, torch's left out."""
    seen: set[int] = set()
    for kind in {kind for module in modules for kind in type(module).__mro__}:
        if kind.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        space = getattr(inspect.unwrap(vars(kind).get("forward", _outside)), "__globals__", {})
        for namespace in (vars(kind), space):
            if id(namespace) not in seen:
                seen.add(id(namespace))
                yield from list(namespace.values())
