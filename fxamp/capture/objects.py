"""How does an object of Python's get into a graph?

torch.fx knows tuples, lists, dicts and numbers, makes a plain dict of every mapping, and calls the class of a
dataclass anew. Here a container is made again at every call as ``copy.copy`` would make it, around
the values of that call, and what holds no traced value is handed on as it is.
"""

from __future__ import annotations

import collections
import copyreg
import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, Final

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.fx.node import base_types
from torch.fx.proxy import TraceError

from fxamp.capture.reach import reachable
from fxamp.errors import describe

__all__ = ["Rebuilt", "is_literal", "is_remade", "parts_of", "refuse_what_is_traced"]

_PLAIN_KEYS: Final = (str, int, bool, type(None))
_VALUES: Final = (str, int, float, complex)
_CONTAINERS: Final = (dict, tuple, list, set, frozenset, collections.deque)


@dataclass(frozen=True)
class Rebuilt:
    """Makes an object of a class, out of what its own ``__reduce_ex__`` took it apart into."""

    kind: type
    make: Callable[..., Any]

    @property
    def __name__(self) -> str:
        return self.kind.__name__

    def __call__(self, args: Any, state: Any = None, items: Any = (), pairs: Any = ()) -> Any:
        new = self.make(self.kind, *args) if self.make in _OF_A_CLASS else self.make(*args)
        if state is not None:
            _set_state(new, state)
        for item in items:
            new.append(item)
        for key, value in pairs:
            new[key] = value
        return new


_OF_A_CLASS: Final = (copyreg.__newobj__, tuple.__new__)  # type: ignore[attr-defined]


def parts_of(value: Any) -> tuple[Rebuilt, tuple[Any, ...]]:
    """The call that makes ``value`` again, and its arguments.

    Raises:
        TraceError: when the object cannot be taken apart.
    """
    kind = type(value)
    if isinstance(value, tuple):  # whatever its own __new__ would make of these
        return Rebuilt(kind, tuple.__new__), ([tuple(value)], getattr(value, "__dict__", None) or None)
    try:
        make, args, state, items, pairs = (*value.__reduce_ex__(4), None, None, None)[:5]
    except Exception as error:
        raise TraceError(f"hands on {describe(value)}, which cannot be made again at every call") from error
    args = list(args[1:] if make in _OF_A_CLASS else args)
    return Rebuilt(kind, make), (args, state, list(items or ()), [list(pair) for pair in pairs or ()])


def is_literal(value: Any) -> bool:
    """Whether torch.fx takes a value for what it is, and can print it."""
    kind = type(value)
    if isinstance(value, fx.Proxy | fx.Node) or kind in (list, tuple, slice, range, torch.Size):
        return True
    if isinstance(value, dict):
        return kind is dict and all(type(key) in _PLAIN_KEYS for key in value)
    if isinstance(value, enum.Enum) or (isinstance(value, _VALUES) and kind not in _VALUES and kind is not bool):
        return False  # a number of numpy's, a string of a class of its own
    known = isinstance(value, (*base_types, torch._ops.OpOverload, torch._ops.HigherOrderOperator))
    return known or value is None or value is ... or kind.__module__ == "torch.return_types"


def is_remade(value: Any) -> bool:
    """Whether an object is what it holds, so that every call has one of its own."""
    return isinstance(value, _CONTAINERS) or (is_dataclass(value) and not isinstance(value, type))


def refuse_what_is_traced(value: Any) -> None:
    """Refuses an object that is handed on as it is and holds what belongs to one trace only.

    Raises:
        TraceError: when a traced value or a module is found in it, or when it is an iterator.
    """
    if isinstance(value, Iterator):
        raise TraceError(f"hands on {describe(value)}, which can be used up only once")
    for _, part in reachable({"": value}, variables_of_modules=False):
        if isinstance(part, fx.Proxy | FakeTensor | nn.Module):  # a fake one stands for a value, too
            what = "a module" if isinstance(part, nn.Module) else "traced values"
            raise TraceError(f"hands on {describe(value)}, which uses {what} in a way that a graph cannot")


def _set_state(new: Any, state: Any) -> None:
    if hasattr(new, "__setstate__"):
        new.__setstate__(state)
        return
    own, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    if own:
        new.__dict__.update(own)
    for name, value in (slots or {}).items():
        object.__setattr__(new, name, value)  # also of a frozen class
