"""What must be patched, while a model is traced, for plain torch.fx not to lose it?

torch.fx freezes tensors that are made from nothing, replaces the backward of an autograd function by that of
its forward's operators, and forgets attributes that a forward sets. Each context here undoes
its patches when it ends.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest import mock

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils import _device
from torch.utils import _pytree as pytree

from fxamp.capture.calls import (
    AutogradFunctionCall,
    forked_states,
    get_rng_state,
    manual_seed,
    restore_states,
    set_rng_state,
)

__all__ = [
    "autograd_functions",
    "check_random_state",
    "modules_watched",
    "python_state",
    "random_calls",
    "random_state",
    "refusals",
    "tensor_calls",
]

Record = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def tensor_calls(
    record: Record, record_method: Callable[[str, tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[None]:
    """Records what torch.fx would compute now and freeze: tensors made from nothing, and work on real tensors.

    Args:
        record: called with a function of torch and its arguments.
        record_method: called with the name of a method or attribute of a tensor and the arguments.
    """
    made = _device._device_constructors() | {torch.normal}

    def taking_proxies(factory: Any) -> Any:
        # A traced size among several would not get past the factory's own argument parser.
        def call(*args: Any, **kwargs: Any) -> Any:
            return record(factory, args, kwargs) if _has_proxy(args, kwargs) else factory(*args, **kwargs)

        return call

    class Recording(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in made:
                return record(func, args, kwargs)
            name = getattr(func, "__name__", "")
            if name == "__get__":  # an attribute, such as ``p.data``
                attribute = func.__self__.__name__
                return record(getattr, (args[0], attribute), {}) if attribute in _VIEWS else func(*args)
            if name in ("__set__", "__delete__"):
                raise TraceError(f"sets the attribute '{func.__self__.__name__}' of a tensor")
            if name in _FACTS or not _has_tensor(args, kwargs):
                return func(*args, **kwargs)
            if is_tensor_method_or_property(func):
                return record_method(name, args, kwargs)
            return record(func, args, kwargs)

    names = (getattr(factory, "__name__", "") for factory in made)
    named = {name: getattr(torch, name) for name in names if getattr(torch, name, None) in made}
    with mock.patch.multiple(torch, **{name: taking_proxies(f) for name, f in named.items()}), Recording():
        yield


# What may be asked of a real tensor while tracing: it is the same at every call.
_FACTS: Final = frozenset(
    "size dim ndimension numel nelement element_size stride storage_offset is_contiguous is_floating_point is_complex "
    "is_signed get_device is_pinned is_inference has_names __len__ __hash__ __repr__ __format__ is_same_size "
    "__deepcopy__ __reduce_ex__ untyped_storage data_ptr __setstate__".split()
)
_VIEWS: Final = frozenset({"data", "T", "mT", "H", "mH", "real", "imag", "grad"})


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


@contextmanager
def refusals() -> Iterator[None]:
    """Refuses what changes torch itself for a while, which a graph would forget."""
    names = (
        (torch.nn.attention, "_sdpa_kernel", "chooses attention kernels"),
        (torch, "set_default_dtype", "changes the default dtype"),
    )

    def refusing(what: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            raise TraceError(f"{what}, which a graph would forget")

        return call

    with ExitStack() as stack:
        for owner, name, what in names:
            stack.enter_context(mock.patch.object(owner, name, refusing(what)))
        yield


@contextmanager
def random_calls(record: Record) -> Iterator[None]:
    """Records what a forward does with the state of torch's random numbers."""

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: record(function, args, kwargs)

    @contextmanager
    def fork(devices: Any = None, enabled: bool = True, **kwargs: Any) -> Iterator[None]:
        states = record(forked_states, (), {}) if enabled else None
        try:
            yield
        finally:
            if enabled:
                record(restore_states, (states,), {})

    recorded: Any = {call.__name__: recording(call) for call in (get_rng_state, manual_seed, set_rng_state)}
    with mock.patch.multiple(torch, **recorded), mock.patch.multiple(torch.random, fork_rng=fork, **recorded):
        yield


def random_state() -> tuple[Any, ...]:
    """The states of Python's and numpy's random numbers."""
    numpy = sys.modules.get("numpy.random")
    state = numpy.get_state() if numpy is not None else ()
    return random.getstate(), tuple(part if isinstance(part, str | int | float) else part.tobytes() for part in state)


def python_state(module: nn.Module) -> Any:
    """What a module keeps in Python containers and plain objects, in a form that can be compared."""
    own = {name: value for name, value in module.__dict__.items() if name not in _MODULE_STATE}
    return {
        name: _comparable(value, 3) for name, value in own.items() if isinstance(value, _CONTAINERS) or _is_plain(value)
    }


def check_random_state(before: tuple[Any, ...]) -> None:
    """Refuses a forward that drew random numbers of Python's or numpy's, and puts them back.

    Raises:
        TraceError: when the state is not the one before.
    """
    now = random_state()
    if now == before:
        return
    random.setstate(before[0])
    if now[0] == before[0]:
        raise TraceError("draws from numpy's random numbers, which a graph would freeze")
    raise TraceError("draws from Python's random module, which a graph would freeze")


_CONTAINERS: Final = (list, dict, set)
_MODULE_STATE: Final = frozenset(nn.Module().__dict__)


def _is_plain(value: Any) -> bool:
    """An object of the user's own that may hold state, such as a config."""
    kind = type(value)
    return kind.__module__ not in ("builtins", "torch", "functools", "collections") and not (
        callable(value) or isinstance(value, nn.Module | torch.Tensor) or not hasattr(value, "__dict__")
    )


def _comparable(value: Any, depth: int) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    if depth == 0:
        return id(value)
    if isinstance(value, dict):
        return [(repr(key), _comparable(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, list):
        return [_comparable(item, depth - 1) for item in value]
    return _comparable(value.__dict__, depth - 1) if _is_plain(value) else id(value)


def _has_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    values = pytree.tree_leaves((args, kwargs))
    return any(isinstance(value, torch.Tensor) for value in values) and not any(isinstance(v, fx.Proxy) for v in values)


def _has_proxy(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
