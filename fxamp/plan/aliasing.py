"""May a value have been written to since it was cast?

Each value has the set of values it may be a view of. A write to one counts for all of these, so two
casts may share their result only when no write lies between them.
"""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["Writes"]


class Writes:
    """Counts the writes to each value while a graph is read from its start."""

    def __init__(self) -> None:
        self._bases: dict[fx.Node, frozenset[fx.Node]] = {}
        self._count: dict[fx.Node, int] = {}

    def define(self, node: fx.Node, *, fresh: bool) -> None:
        """A value comes to be. ``fresh``: it is sure to share no memory with its inputs."""
        bases = {node}
        if not fresh:
            for source in node.all_input_nodes:
                bases |= self.bases(source)
        self._bases[node] = frozenset(bases)

    def write(self, target: Any) -> None:
        """The value, and with it whatever it may be a view of, is written to."""
        if isinstance(target, fx.Node):
            for base in self.bases(target):
                self._count[base] = self._count.get(base, 0) + 1

    def bases(self, node: fx.Node) -> frozenset[fx.Node]:
        """The value itself and all values that it may be a view of, or be."""
        return self._bases.get(node, frozenset({node}))

    def version(self, node: fx.Node) -> int:
        """Grows with every write that the value may see."""
        return sum(self._count.get(base, 0) for base in self.bases(node))
