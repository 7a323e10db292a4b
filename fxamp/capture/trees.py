"""What is in an argument that is a container?

Tensors and numbers in it are placeholders of a graph. What only tells the program where to go (None, a bool, a
string) is a constant of it: a container with another pattern of these gets a graph of its own.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

__all__ = ["Tree", "is_constant"]

_CONSTANTS: Final = (type(None), bool, str, bytes, torch.dtype, torch.device, torch.layout, enum.Enum)


def is_constant(value: Any, *, numbers: bool) -> bool:
    """Whether a value only tells where to go; ``numbers``: those are to be counted in."""
    return isinstance(value, _CONSTANTS) or (numbers and isinstance(value, int | float))


@dataclass(frozen=True)
class Tree:
    """The structure of a container, and its leaves that are constants: place, type and value."""

    spec: pytree.TreeSpec
    constants: tuple[tuple[int, type, Any], ...]

    @staticmethod
    def of(value: Any, *, numbers: bool = False) -> tuple[Tree | None, list[Any]]:
        """The structure of a value, or None when it is no container; and its leaves that are no constants.

        Args:
            value: tuples, lists, dicts, dataclasses and what torch knows as a container, nested.
            numbers: whether numbers are constants too.
        """
        leaves, spec = _flattened(value)
        if spec.is_leaf():
            return None, leaves
        constants = [(i, type(leaf), leaf) for i, leaf in enumerate(leaves) if is_constant(leaf, numbers=numbers)]
        rest = [leaf for leaf in leaves if not is_constant(leaf, numbers=numbers)]
        return Tree(spec, tuple(constants)), rest

    @property
    def count(self) -> int:
        """How many placeholders it has."""
        return self.spec.num_leaves - len(self.constants)

    def leaves(self, value: Any) -> list[Any]:
        """The values of the placeholders, for a container of this structure."""
        fixed = {i for i, _, _ in self.constants}
        return [leaf for i, leaf in enumerate(_flattened(value)[0]) if i not in fixed]

    def built(self, leaves: Iterable[Any]) -> Any:
        """A container of this structure."""
        fixed, rest = {i: value for i, _, value in self.constants}, iter(leaves)
        return pytree.tree_unflatten(
            [fixed[i] if i in fixed else next(rest) for i in range(self.spec.num_leaves)], self.spec
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """As an empty container: the structure itself does not pickle."""
        return _rebuilt, (self.built([0.0] * self.count), self.constants)


def _rebuilt(value: Any, constants: tuple[tuple[int, type, Any], ...]) -> Tree:
    return Tree(_flattened(value)[1], constants)


@dataclass(frozen=True)
class _Fields:
    """A dataclass in a form that can be taken apart; put together, it is the user's again."""

    kind: type
    names: tuple[str, ...]
    values: tuple[Any, ...]


def _flattened(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    leaves, spec = pytree.tree_flatten(value)
    if not any(map(_is_dataclass, leaves)):
        return leaves, spec
    return _flattened(pytree.tree_map_only(_is_dataclass, _opened, value))


def _is_dataclass(value: Any) -> bool:
    return hasattr(type(value), "__dataclass_fields__") and not isinstance(value, _Fields)


def _opened(value: Any) -> _Fields:
    names = {**dict.fromkeys(field.name for field in dataclasses.fields(value)), **getattr(value, "__dict__", {})}
    return _Fields(type(value), tuple(names), tuple(getattr(value, name) for name in names))


def _closed(values: Iterable[Any], context: tuple[type, tuple[str, ...]]) -> Any:
    kind, names = context
    new: Any = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(new, name, value)
    return new


pytree.register_pytree_node(_Fields, lambda fields: (list(fields.values), (fields.kind, fields.names)), _closed)
