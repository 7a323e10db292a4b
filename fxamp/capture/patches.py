"""What must be patched, while a model is traced, for plain torch.fx not to lose it?

torch.fx freezes tensors that are made from nothing, replaces the backward of an autograd function by that of
its forward's operators, and forgets attributes that a forward sets. Each context here undoes
its patches when it ends.
"""

from __future__ import annotations

import importlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any, Final
from unittest import mock

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils import _device
from torch.utils import _pytree as pytree

from fxamp.capture.builtins import standing_for
from fxamp.capture.calls import (
    AutogradFunctionCall,
    ScriptedCall,
    forked_states,
    get_rng_state,
    manual_seed,
    restore_states,
    set_rng_state,
)
from fxamp.capture.clone import draws
from fxamp.capture.proxy import MAY_BE_NONE

__all__ = [
    "autograd_functions",
    "check_random_state",
    "compiled_functions",
    "mode_of",
    "python_state",
    "random_calls",
    "random_state",
    "refusals",
    "set_mode",
    "tensor_calls",
]

Record = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def tensor_calls(
    record: Record,
    record_method: Callable[[str, tuple[Any, ...], dict[str, Any]], Any],
    answer: Callable[[torch.Tensor, str], Any],
) -> Iterator[None]:
    """Records what torch.fx would compute now and freeze: tensors made from nothing, and work on real tensors.

    Args:
        record: called with a function of torch and its arguments.
        record_method: called with the name of a method or attribute of a tensor and the arguments.
        answer: called with a real tensor and the name of an attribute that may be another one at a later call.
    """
    made = _device._device_constructors() | {torch.normal}

    def taking_proxies(factory: Any) -> Any:
        # A traced size among several would not get past the factory's own argument parser.
        def call(*args: Any, **kwargs: Any) -> Any:
            return record(factory, args, kwargs) if _has_proxy(args, kwargs) else factory(*args, **kwargs)

        return standing_for(factory, call)

    class Recording(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in made:
                return record(func, args, kwargs)
            name = getattr(func, "__name__", "")
            if name == "__get__":  # an attribute, such as ``p.data``
                attribute = func.__self__.__name__
                if attribute in _CHANGING:
                    with torch._C.DisableTorchFunctionSubclass():
                        return answer(args[0], attribute)
                return record(getattr, (args[0], attribute), {}) if attribute in _VIEWS else func(*args)
            if name in ("__set__", "__delete__"):
                raise TraceError(f"sets the attribute '{func.__self__.__name__}' of a tensor")
            if name in _FACTS or not _has_tensor(args, kwargs):
                return func(*args, **kwargs)
            if is_tensor_method_or_property(func):
                found = record_method(name, args, kwargs)
                return bool(found) if name == "__bool__" else found
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
_VIEWS: Final = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
_CHANGING: Final = frozenset({"requires_grad", "is_leaf", "dtype", "device", *MAY_BE_NONE})


@contextmanager
def compiled_functions(record: Record) -> Iterator[None]:
    """Records a call of what ``torch.jit.script`` made of a function: there is no Python in it to trace."""
    call: Any = torch.jit.ScriptFunction.__call__

    def call_scripted(function: Any, *args: Any, **kwargs: Any) -> Any:
        if _has_proxy(args, kwargs):
            return record(ScriptedCall(function), args, kwargs)
        return call(function, *args, **kwargs)

    with mock.patch.object(torch.jit.ScriptFunction, "__call__", call_scripted):
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


def mode_of(module: nn.Module) -> bool:
    """The ``training`` flag; a scripted module keeps it elsewhere, or has none once it is frozen."""
    if not isinstance(module, torch.jit.ScriptModule):
        return bool(module.__dict__.get("training", False))
    compiled = module._c
    return bool(compiled.hasattr("training") and compiled.getattr("training"))


def set_mode(module: nn.Module, flag: bool) -> None:
    """Sets the ``training`` flag of one module, and nothing else."""
    if not isinstance(module, torch.jit.ScriptModule):
        module.__dict__["training"] = flag
    elif module._c.hasattr("training"):
        module._c.setattr("training", flag)


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

    plain = torch.Generator

    class Recorded(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return record(plain, args, kwargs)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, plain)

    class Generator(metaclass=Recorded):
        """``torch.Generator``: one that a forward makes is made at every call."""

        __fxamp_stands_for__ = plain

    recorded: Any = {call.__name__: recording(call) for call in (get_rng_state, manual_seed, set_rng_state)}
    with (
        mock.patch.multiple(torch, Generator=Generator, **recorded),
        mock.patch.multiple(torch.random, fork_rng=fork, **recorded),
    ):
        yield


def random_state() -> tuple[Any, ...]:
    """The states of Python's and numpy's random numbers."""
    try:
        numpy = importlib.import_module("numpy.random")  # now, for fake tensors would do it while a model is traced
    except ImportError:
        numpy = None
    state = numpy.get_state() if numpy is not None else ()
    return random.getstate(), tuple(part if isinstance(part, str | int | float) else part.tobytes() for part in state)


def python_state(module: nn.Module) -> dict[str, Any]:
    """What a module keeps by each name, in a form that can be compared; a scripted one is not traced into."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    tables = ("_parameters", "_buffers", "_modules")
    own = {name: value for name, value in module.__dict__.items() if name not in (*tables, "training")}
    for table in tables:
        own.update(module.__dict__[table])
    return {name: _comparable(value, 3) for name, value in own.items()}


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


@dataclass(frozen=True, eq=False)
class _Itself:
    """An object that is compared by identity. It is kept, so that no other gets its address."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    __hash__ = object.__hash__


def _is_plain(value: Any) -> bool:
    """An object of the user's own that may hold state, such as a config."""
    kind = type(value)
    return kind.__module__ not in ("builtins", "torch", "functools", "collections") and not (
        callable(value) or isinstance(value, nn.Module | torch.Tensor) or not hasattr(value, "__dict__")
    )


def _comparable(value: Any, depth: int) -> Any:
    if isinstance(value, bool | int | float | str):
        return type(value), value
    if draws(value):
        return _drawn(value)
    if depth == 0:
        return _Itself(value)
    if isinstance(value, dict):
        return [(repr(key), _comparable(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque):
        return [_comparable(item, depth - 1) for item in value]
    if isinstance(value, set):
        return {id(item) for item in value}
    if isinstance(value, FunctionType):
        return [_comparable(_contents(cell), depth - 1) for cell in value.__closure__ or ()], _Itself(value)
    return _comparable(value.__dict__, depth - 1) if _is_plain(value) else _Itself(value)


def _drawn(value: Any) -> str:
    """How far a generator of random numbers has come."""
    if isinstance(value, random.Random):
        return str(value.getstate())
    inside = getattr(value, "bit_generator", value)
    return str(inside.get_state() if hasattr(inside, "get_state") else inside.state)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


def _has_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    values = pytree.tree_leaves((args, kwargs))
    return any(isinstance(value, torch.Tensor) for value in values) and not any(isinstance(v, fx.Proxy) for v in values)


def _has_proxy(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
