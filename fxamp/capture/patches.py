"""What must be patched, while a model is traced, for plain torch.fx not to lose it?

torch.fx freezes tensors that are made from nothing, replaces the backward of an autograd function by that of
its forward's operators, and forgets attributes that a forward sets. Each context here undoes
its patches when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest import mock

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode, get_ignored_functions, is_tensor_method_or_property
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
from fxamp.capture.failures import HiddenError
from fxamp.capture.proxy import MAY_BE_NONE

__all__ = [
    "autograd_functions",
    "compiled_functions",
    "mode_of",
    "random_calls",
    "refusals",
    "set_mode",
    "switches_plainly",
    "tensor_calls",
]

Record = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

# Torch makes these tables once, when it is asked first: not while functions of it are replaced, which they would keep.
get_ignored_functions()
is_tensor_method_or_property(torch.Tensor.add)


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
                raise HiddenError(f"sets the attribute '{func.__self__.__name__}' of a tensor")
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


_SWITCHING: Final = ("train", "children", "named_children", "named_modules", "__getattr__", "__setattr__")


def switches_plainly(module: nn.Module) -> bool:
    """Whether ``train()`` of the module gives it and all below it the mode, and does nothing else."""
    kind = type(module)
    ours = all(getattr(kind, name) is getattr(nn.Module, name) for name in _SWITCHING) and "training" in vars(module)
    return ours and not hasattr(kind, "training") and vars(module).keys().isdisjoint(_SWITCHING)


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


def _has_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    values = pytree.tree_leaves((args, kwargs))
    return any(isinstance(value, torch.Tensor) for value in values) and not any(isinstance(v, fx.Proxy) for v in values)


def _has_proxy(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
