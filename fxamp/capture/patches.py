"""What must be patched, while a model is traced, for plain torch.fx not to lose it?

torch.fx freezes tensors that are made from nothing, replaces the backward of an autograd function by that of
its forward's operators, and forgets attributes that a forward sets. Each context here undoes
its patches when it ends.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode
from torch.utils import _device

from fxamp.capture.calls import AutogradFunctionCall

__all__ = ["autograd_functions", "check_python_state", "factories", "modules_watched"]

Record = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def factories(record: Record) -> Iterator[None]:
    """Records tensors made from nothing, such as ``torch.arange(4)`` and ``torch.rand(x.shape[0], 1)``."""
    made = _device._device_constructors()

    def taking_proxies(factory: Any) -> Any:
        # A traced size among several would not get past the factory's own argument parser.
        def call(*args: Any, **kwargs: Any) -> Any:
            return record(factory, args, kwargs) if _has_proxy(args, kwargs) else factory(*args, **kwargs)

        return call

    class Recording(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return record(func, args, kwargs or {}) if func in made else func(*args, **(kwargs or {}))

    names = (getattr(factory, "__name__", "") for factory in made)
    named = {name: getattr(torch, name) for name in names if getattr(torch, name, None) in made}
    with mock.patch.multiple(torch, **{name: taking_proxies(f) for name, f in named.items()}), Recording():
        yield


@contextmanager
def autograd_functions(record: Record) -> Iterator[None]:
    """Records ``Function.apply`` as one call, so that its own backward is kept."""
    apply: Any = vars(torch.autograd.Function)["apply"].__func__

    def apply_function(function: Any, *args: Any, **kwargs: Any) -> Any:
        if _has_proxy(args, kwargs):
            return record(AutogradFunctionCall(function), args, kwargs)
        return apply(function, *args, **kwargs)

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(apply_function)):
        yield


@contextmanager
def modules_watched(
    paths: Mapping[int, str],
    read_training: Callable[[str, bool], None],
    set_attribute: Callable[[nn.Module, str, Any], None],
) -> Iterator[None]:
    """Tells when a module's ``training`` is read and when an attribute of it is set.

    Args:
        paths: identity of each module that counts, to its path.
        read_training: called with the path and the flag.
        set_attribute: called in place of the assignment.
    """
    set_module = nn.Module.__setattr__

    def set_watched(module: nn.Module, name: str, value: Any) -> None:
        (set_attribute if id(module) in paths else set_module)(module, name, value)

    def training(module: nn.Module) -> bool:
        flag = bool(module.__dict__["training"])
        if id(module) in paths:
            read_training(paths[id(module)], flag)
        return flag

    def set_training(module: nn.Module, flag: bool) -> None:
        if id(module) in paths and module.__dict__.get("training") is not flag:
            raise TraceError("switches the mode of a module")
        module.__dict__["training"] = flag

    with (
        mock.patch.object(nn.Module, "training", property(training, set_training), create=True),
        mock.patch.object(nn.Module, "__setattr__", set_watched),
    ):
        yield


def check_python_state(module: nn.Module, drawn: Any) -> None:
    """Refuses what a graph would silently freeze: Python's random numbers, values kept in containers.

    Args:
        module: whose forward was traced.
        drawn: the state of ``random`` before that.

    Raises:
        TraceError: when the forward drew a number or put a traced value into a container of the module.
    """
    if random.getstate() != drawn:
        random.setstate(drawn)
        raise TraceError("draws from Python's random module, which a graph would freeze")
    for name, value in module.__dict__.items():
        if not name.startswith("_") and isinstance(value, list | dict | set) and _holds_proxy(value):
            raise TraceError(f"keeps a traced value in self.{name}")


def _has_proxy(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))


def _holds_proxy(container: Any) -> bool:
    values = container.values() if isinstance(container, dict) else container
    return any(
        isinstance(value, fx.Proxy) or (isinstance(value, list | dict) and _holds_proxy(value)) for value in values
    )
