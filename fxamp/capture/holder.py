"""Which modules does a callable own, that is no module itself?

A function that closes over modules, an object with ``__call__``, a method of such an object: they own what they reach.
What their variables name is there from the start; any other module is adopted when a trace meets it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn

from fxamp.capture.calls import calls_itself
from fxamp.capture.reach import reachable, variables

__all__ = ["Entry", "adopt", "bound_to", "entry_of", "holder_of", "modules_made", "unowned"]

_Bound = tuple[tuple[Any, ...], dict[str, Any]]


class Entry(NamedTuple):
    """A callable that is a call of a module: of which, by which method, with which arguments bound to it."""

    owner: nn.Module
    method: str
    bound: _Bound | None

    def signed(self) -> Any:
        """What has the signature of the callable."""
        if self.bound is None and self.method in ("forward", "__call__"):
            return self.owner
        return bound_to(getattr(self.owner, self.method), self.bound)


def entry_of(model: Any) -> Entry | None:
    """The call of a module that a callable is, or None when it is a function or an object of another kind."""
    bound = (model.args, model.keywords) if isinstance(model, partial) else None
    called = model.func if isinstance(model, partial) else model
    if isinstance(called, nn.Module):
        return Entry(called, "__call__" if calls_itself(called) else "forward", bound)
    if isinstance(called, MethodType) and isinstance(called.__self__, nn.Module):
        return Entry(called.__self__, called.__name__, bound)
    return None


def bound_to(function: Any, bound: _Bound | None) -> Any:
    """The function with these arguments given."""
    return function if bound is None else partial(function, *bound[0], **bound[1])


def holder_of(function: Callable[..., Any]) -> nn.Module:
    """A module that owns the modules and parameters that the variables of a function name, under these names."""
    holder = nn.Module()
    target = _unwrapped(function)
    for name, value in variables(target).items() if isinstance(target, FunctionType) else ():
        if isinstance(value, nn.Module | nn.Parameter):
            _place(holder, name, value)
    return holder


def unowned(holder: nn.Module, function: Callable[..., Any], strangers: Iterable[Any]) -> dict[str, Any]:
    """What a callable owns of the modules and tensors that a trace met, and is not in ``holder`` yet, by path.

    What the callable reaches has the path it is reached by, and comes with the module that it is a part of.
    """
    found: dict[str, Any] = {}
    for stranger in strangers:
        known = (holder, *found.values())
        if any(stranger is part for owner in known for part in _parts_of(owner)):
            continue
        path, owner = _reached(function, stranger) or (type(stranger).__name__.lower(), stranger)
        if isinstance(owner, nn.Module | nn.Parameter):
            found[path if path not in found else f"{path}_{len(found)}"] = owner
    return found


def adopt(holder: nn.Module, found: Mapping[str, Any]) -> None:
    """Adds modules and parameters to what a callable owns."""
    for path, value in found.items():
        _place(holder, path, value)


def _reached(function: Callable[..., Any], stranger: Any) -> tuple[str, Any] | None:
    for target in dict.fromkeys((_unwrapped(function), function)):
        for path, value in reachable({"": target}):
            if value is stranger or (isinstance(value, nn.Module) and any(stranger is p for p in _parts_of(value))):
                return path, value
    return None


def _parts_of(module: nn.Module | torch.Tensor) -> Iterator[Any]:
    if isinstance(module, torch.Tensor):
        yield module
        return
    yield from module.modules()
    yield from module.parameters()
    yield from module.buffers()


def _place(holder: nn.Module, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    owner = holder
    for parent in parents:
        if parent not in owner._modules:
            parent = _free(owner, parent)
            owner.add_module(parent, nn.Module())
        owner = owner.get_submodule(parent)
    setattr(owner, _free(owner, name), value)
    flags = {module.training for module in value.modules()} if isinstance(value, nn.Module) else set()
    if len(flags) == 1 and len({child.training for child in holder.children()} | flags) == 1:
        holder.training = flags.pop()


def _free(owner: nn.Module, name: str) -> str:
    while hasattr(owner, name):
        name += "_"
    return name


def _unwrapped(function: Any) -> Any:
    return inspect.unwrap(function) if isinstance(function, FunctionType) else function


@contextmanager
def modules_made() -> Iterator[list[nn.Module]]:
    """The modules that are made before the block ends: these belong to the call that made them."""
    made: list[nn.Module] = []
    methods = {name: getattr(nn.Module, name) for name in ("__init__", "__setstate__")}

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            made.append(module)
            return method(module, *args, **kwargs)

        return call

    patches: Any = {name: noting(method) for name, method in methods.items()}
    with mock.patch.multiple(nn.Module, **patches):
        yield made
