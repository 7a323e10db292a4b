"""May a value have been written to since it was cast?

Each value sees a set of places in memory: its own, and that of everything it may be a view of. A write marks places,
and two casts may share their result only when none of the places that their value sees was marked in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

from fxamp.plan.calls import nodes_in

__all__ = ["Writes", "storage_of"]

# Two inputs may be one tensor, and an input may be a parameter or buffer of the model.
_INPUTS: Final = "inputs"
_ATTRIBUTES: Final = "attributes"
_GROUPS: Final = frozenset({_INPUTS, _ATTRIBUTES})


def storage_of(tensor: Tensor) -> object:
    """What tensors that share their memory have in common."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


class Writes:
    """Counts the writes to each place while a graph is read from its start."""

    def __init__(self) -> None:
        self._sources: dict[fx.Node, Sequence[fx.Node]] = {}
        self._storages: dict[fx.Node, object] = {}
        self._count: Counter[object] = Counter()

    def define(self, node: fx.Node, *, fresh: bool, storage: object = None) -> None:
        """A value comes to be.

        Args:
            node: the value.
            fresh: it is sure to share no memory with its inputs.
            storage: of a parameter or buffer, as ``storage_of`` tells it.
        """
        self._sources[node] = () if fresh else node.all_input_nodes
        if storage is not None:
            self._storages[node] = storage

    def join(self, owner: fx.Node, parts: Iterable[fx.Node]) -> None:
        """A value holds others from now on."""
        self._sources[owner] = [*self._sources.get(owner, ()), *parts]

    def _places(self, node: fx.Node) -> tuple[set[object], set[object]]:
        """The places that a value sees, and those that are marked when it is written to."""
        seen: set[object] = set()
        marked: set[object] = set()
        met, waiting = {node}, [node]
        while waiting:
            each = waiting.pop()
            own = self._own(each)
            seen |= own[0]
            marked |= own[1]
            further = [source for source in self._sources.get(each, ()) if source in self._sources]
            waiting.extend(source for source in further if source not in met)
            met.update(further)
        return seen, marked

    def _own(self, node: fx.Node) -> tuple[set[object], set[object]]:
        storage = self._storages.get(node)
        if node.op == "placeholder" and node in self._sources:
            return {node, _INPUTS, _ATTRIBUTES}, {node, _INPUTS}
        if storage is not None:
            return {storage, _INPUTS}, {storage, _ATTRIBUTES}
        return {node}, {node}

    def write(self, target: Any) -> None:
        """Every value in a nested argument is written to, and with it whatever it may be a view of."""
        for node in nodes_in(target):
            self._count.update(self._places(node)[1])

    def touch(self, storages: Iterable[object]) -> None:
        """A module writes to its own tensors."""
        self._count.update(storages)

    def version(self, node: fx.Node, *, guessed: bool = True) -> int:
        """Grows with every write that the value may see; ``guessed``: also where it might be another input's memory."""
        if not self._count:
            return 0  # as in most graphs, of which nothing has to be looked at then
        places = self._places(node)[0]
        return sum(self._count[place] for place in (places if guessed else places - _GROUPS))
