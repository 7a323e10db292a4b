"""Does a call write to the lists and dicts that it is given?

These are Python's own, so nothing in a graph says that they changed, or hands the change to whoever made them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

__all__ = ["Contents"]

_SEQUENCES = (tuple, list, deque, set)


class Contents:
    """The containers in some values, with what they hold now.

    Args:
        values: any values; containers in containers count too.
    """

    def __init__(self, *values: Any) -> None:
        self._before = [(each, each.copy()) for value in values for each in _containers(value)]

    def changed(self) -> Any:
        """The first one that holds something else now, or None."""
        return next((each for each, before in self._before if not _same(each, before)), None)

    def gained(self) -> Any:
        """The first one that holds something that it did not hold, or None."""
        for each, before in self._before:
            known = set(map(id, _items(before)))
            if any(id(item) not in known for item in _items(each)):
                return each
        return None

    def restore(self) -> None:
        """Gives each what it held."""
        for each, before in self._before:
            if not _same(each, before):
                each.clear()
                (each.extend if isinstance(each, list | deque) else each.update)(before)


def _containers(value: Any) -> Iterator[Any]:
    if not isinstance(value, (*_SEQUENCES, dict)):
        return
    if not isinstance(value, tuple):
        yield value
    for item in _items(value):
        yield from _containers(item)


def _items(value: Any) -> Any:
    return list(value.values()) if isinstance(value, dict) else list(value)


def _same(now: Any, before: Any) -> bool:
    keys = list(now) == list(before) if isinstance(now, dict) else True
    ours, theirs = _items(now), _items(before)
    return keys and len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))
