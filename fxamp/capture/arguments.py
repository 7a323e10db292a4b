"""Nested arguments of a call, mapped leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["map_leaves"]


def map_leaves(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The value with ``function`` applied to every ``kind`` in its tuples, lists, dicts and slices.

    As ``torch.fx.map_arg``, but into plain containers: those of torch.fx hold nothing but its own arguments.
    """
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple):
        items = [map_leaves(item, kind, function) for item in value]
        return tuple.__new__(type(value), items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_leaves(item, kind, function) for item in value]
    if isinstance(value, dict):
        return {key: map_leaves(item, kind, function) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(map_leaves(item, kind, function) for item in (value.start, value.stop, value.step)))
    return value
