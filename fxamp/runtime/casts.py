"""The functions that a converted graph calls.

A cast whose input dtype is known is plain ``Tensor.to``, and those of weights are in ``weights``. The rest is here:
casts that look at the dtype first, and calls that autocast decides about.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxamp.capture import AutocastState
from fxamp.capture.containers import Contents
from fxamp.capture.packing import pack_callable, unpack_callable
from fxamp.dtypes import promotable
from fxamp.errors import CaptureError
from fxamp.policy.order import casts_last_argument_first

__all__ = [
    "AmbientCall",
    "DtypeCall",
    "ModuleCall",
    "PromoteCall",
    "execution_device_type",
    "soft_cast",
]

_epoch = [-1]  # of the opaque call that ran last


def _castable(value: torch.Tensor) -> bool:
    return value.is_floating_point() and value.dtype != torch.float64


def soft_cast(value: Any, dtype: torch.dtype) -> Any:
    """The value cast as autocast would: floating tensors but float64; also inside lists and tuples.

    Example::

        >>> soft_cast(torch.ones(2), torch.bfloat16).dtype, soft_cast(torch.arange(2), torch.bfloat16).dtype
        (torch.bfloat16, torch.int64)
    """
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if _castable(value) else value
    if isinstance(value, tuple | list):
        items = [soft_cast(item, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def execution_device_type(device_type: str) -> str:
    """Where autocast has to be entered: a graph for the GPU that is run without one runs on the CPU."""
    return "cpu" if device_type == "cuda" and not torch.cuda.is_available() else device_type


class _Packed:
    """Pickles ``call`` by name: some functions of torch cannot be pickled as they are."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "call": pack_callable(self.__dict__["call"])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, call=unpack_callable(state["call"]))


@dataclass(frozen=True)
class AmbientCall(_Packed):
    """A call that runs under ``torch.autocast``, which decides about it at run time.

    ``call`` is a function, the name of a method of the first argument, or None when the first argument
    is the module to call.
    """

    call: Callable[..., Any] | str | None
    device_type: str
    state: AutocastState

    @property
    def __name__(self) -> str:
        return f"autocast_{_call_name(self.call)}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _epoch[0] != self.state.epoch:
            # Another outermost region of the user's: autocast would have emptied its cache in between.
            torch.clear_autocast_cache()
            _epoch[0] = self.state.epoch
        with self._autocast():
            return _apply(self.call, args, kwargs)

    def _autocast(self) -> AbstractContextManager[Any]:
        device_type, state = execution_device_type(self.device_type), self.state
        return torch.autocast(device_type, state.dtype, state.enabled, state.cache_enabled)


@dataclass(frozen=True)
class ModuleCall:
    """A call of a module that is given containers of Python's."""

    @property
    def __name__(self) -> str:
        return "module"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _apply(None, args, kwargs)


@dataclass(frozen=True)
class PromoteCall(_Packed):
    """A call whose tensor arguments become the widest dtype among them, at least ``low``.

    Attributes:
        optional: places and names of arguments that do not count, as autocast has it.
        refused: the call under autocast, for what that refuses: a floating dtype that is neither ``low`` nor float32.
    """

    call: Callable[..., Any] | str
    low: torch.dtype
    optional: frozenset[int | str] = frozenset()
    refused: AmbientCall | None = None

    @property
    def __name__(self) -> str:
        return f"promote_{_call_name(self.call)}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
        counted = [value for key, value in given.items() if key not in self.optional]
        tensors = (leaf for leaf in pytree.tree_leaves(counted) if isinstance(leaf, torch.Tensor))
        dtypes = [tensor.dtype for tensor in tensors if _castable(tensor)]
        if self.refused is not None and not promotable(dtypes, self.low):
            return self.refused(*args, **kwargs)
        widest = functools.reduce(torch.promote_types, dtypes, self.low)
        order = reversed(given) if casts_last_argument_first() else iter(given)
        cast = {key: pytree.tree_map(lambda leaf: soft_cast(leaf, widest), given[key]) for key in order}
        return _apply(self.call, tuple(cast[i] for i in range(len(args))), {key: cast[key] for key in kwargs})


@dataclass(frozen=True)
class DtypeCall(_Packed):
    """A call that computes in float32 through its ``dtype=`` when its first argument may be cast."""

    call: Callable[..., Any] | str

    @property
    def __name__(self) -> str:
        return f"fp32_{_call_name(self.call)}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, torch.Tensor) and _castable(first):
            kwargs = {**kwargs, "dtype": torch.float32}
        return _apply(self.call, args, kwargs)


def _apply(call: Callable[..., Any] | str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(call, str):
        return getattr(args[0], call)(*args[1:], **kwargs)
    if call is not None:
        return call(*args, **kwargs)
    given = Contents(args[1:], kwargs)
    result = args[0](*args[1:], **kwargs)
    if (written := given.changed()) is not None:
        raise CaptureError(
            f"{type(args[0]).__name__} changes the {type(written).__name__} that it is given, which a graph cannot see",
            hint="return what it makes; a list or dict that a module fills reaches only code that is traced",
        )
    return result


def _call_name(call: Callable[..., Any] | str | None) -> str:
    if call is None:
        return "module"
    return call if isinstance(call, str) else getattr(call, "__name__", "call")
