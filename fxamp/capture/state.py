"""What does a module keep in Python, in a form that tells whether it changed?"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType
from typing import Any, Final

import torch
from torch import nn

from fxamp.capture.clone import draws

__all__ = ["kept_objects", "python_state"]


def python_state(module: nn.Module) -> dict[str, Any]:
    """What a module keeps by each name, in a form that can be compared; a scripted one is not traced into."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    kept = module.__dict__
    state = {name: _comparable(value, 3) for name, value in kept.items() if name not in _NOT_ITSELF}
    for table in _TABLES:
        state.update({name: _comparable(value, 3) for name, value in kept[table].items()})
    return state


_TABLES: Final = ("_parameters", "_buffers", "_modules")
_NOT_ITSELF: Final = frozenset({*_TABLES, "training"})


class _Itself:
    """An object that is compared by identity. It is kept, so that no other gets its address."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    __hash__ = object.__hash__


@contextmanager
def kept_objects(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gives the objects of the user's own that modules keep, such as a config, their attributes back afterwards."""
    found = {id(value): value for module in modules for value in module.__dict__.values() if _is_plain(value)}
    before = [(value, dict(value.__dict__)) for value in found.values()]
    try:
        yield
    finally:
        for value, attributes in before:
            if value.__dict__ != attributes:
                value.__dict__.clear()
                value.__dict__.update(attributes)


def _is_plain(value: Any) -> bool:
    """An object of the user's own that may hold state, such as a config."""
    kind = type(value)
    return kind.__module__ not in ("builtins", "torch", "functools", "collections") and not (
        callable(value) or isinstance(value, nn.Module | torch.Tensor) or not hasattr(value, "__dict__")
    )


# Most of what modules keep: it is what the rules below make of it.
_BY_VALUE: Final = frozenset({bool, int, float, str})
_TABLE_KINDS: Final = frozenset({dict, OrderedDict})
_BY_IDENTITY: Final = frozenset({type(None), torch.Tensor, nn.Parameter})


def _comparable(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind in _BY_VALUE:
        return kind, value
    if kind in _BY_IDENTITY:
        return _Itself(value)
    if kind in _TABLE_KINDS and not value and depth:
        return []
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
