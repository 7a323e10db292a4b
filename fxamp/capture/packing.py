"""How is a graph pickled?

torch.fx pickles the generated code and traces it again, which loses what each node was stamped with. A
packed graph is plain data: one record a node, functions by their qualified name.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx
from torch.fx.node import _get_qualified_name

from fxamp.capture.arguments import map_leaves

__all__ = ["Record", "pack_callable", "pack_graph", "unpack_callable", "unpack_graph"]


@dataclass(frozen=True)
class _Reference:
    """A node argument: the number of the record it stands for."""

    index: int


@dataclass(frozen=True)
class _Named:
    """A function that can be imported."""

    path: str


class Record(NamedTuple):
    """One node, without references to others."""

    op: str
    target: Any
    args: Any
    kwargs: Any
    name: str
    meta: dict[str, Any]


def pack_graph(graph: fx.Graph) -> tuple[Record, ...]:
    """The graph as picklable data."""
    index = {node: i for i, node in enumerate(graph.nodes)}
    records = []
    for node in graph.nodes:
        args, kwargs = map_leaves((node.args, node.kwargs), fx.Node, lambda n: _Reference(index[n]))
        # torch.fx's own stamp names the classes of modules, and that of a converted one cannot be imported.
        meta = {key: value for key, value in node.meta.items() if key != "nn_module_stack"}
        records.append(Record(node.op, pack_callable(node.target), args, kwargs, node.name, meta))
    return tuple(records)


def unpack_graph(records: Sequence[Record]) -> fx.Graph:
    """The graph that was packed, with the same node names and metadata."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for record in records:
        args, kwargs = map_leaves((record.args, record.kwargs), _Reference, lambda ref: nodes[ref.index])
        node = graph.create_node(record.op, unpack_callable(record.target), args, kwargs, record.name)
        node.meta = dict(record.meta)
        nodes.append(node)
    return graph


def pack_callable(target: Any) -> Any:
    """The importable name of a function, or the target itself when it has none."""
    if not callable(target):
        return target
    try:
        named = _Named(_get_qualified_name(target))
        return named if unpack_callable(named) is target else target
    except Exception:
        return target


def unpack_callable(target: Any) -> Any:
    """The function that ``pack_callable`` packed."""
    if not isinstance(target, _Named):
        return target
    parts = target.path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    return getattr(importlib.import_module("builtins"), target.path)
