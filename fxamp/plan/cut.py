"""Which of two dtypes for every value, so that it costs least?

Each call runs in one of two dtypes, which costs what it costs; a value that is needed in the other one is cast once,
however many need it. That is a minimum cut of a graph between a source, float32, and a sink, the low dtype: a call on
the source's side runs in float32. A value has at most two auxiliary nodes, one for each direction of its cast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final

__all__ = ["HIGH", "LOW", "NEVER", "Problem"]

HIGH: Final = "float32"
LOW: Final = "low"
# More than any sum of costs, and an integer: sums of these are exact.
NEVER: Final = 1 << 60


@dataclass
class Problem:
    """Calls, what they cost in each dtype, and the casts between them. All costs are integers, in one unit.

    ``HIGH`` and ``LOW`` stand for whatever runs in this dtype in any case.
    """

    costs: dict[str, tuple[int, int]] = field(default_factory=dict)  # of a call: in float32, in the low dtype
    casts: dict[str, tuple[int, dict[str, None]]] = field(default_factory=dict)  # of a value: cost, and who needs it
    ties: list[tuple[str, str]] = field(default_factory=list)  # calls that run in the same dtype

    def call(self, name: str, high: int, low: int) -> None:
        """A call that is free to run in either dtype, for these costs."""
        self.costs[name] = (high, low)

    def value(self, producer: str, cost: int, consumer: str, key: str) -> None:
        """A value, by its ``key``, of a call (or ``HIGH``, or ``LOW``) is needed by another in that one's dtype."""
        self.casts.setdefault(f"{key}\n{producer}", (cost, {}))[1][consumer] = None

    def tie(self, one: str, other: str) -> None:
        """Two calls run in the same dtype."""
        self.ties.append((one, other))

    def cost(self, labels: Mapping[str, str]) -> int:
        """What it costs when each call runs in this dtype; ties must hold."""
        of = {**labels, HIGH: HIGH, LOW: LOW}
        total = sum(low if of[name] is LOW else high for name, (high, low) in self.costs.items())
        for key, (cost, consumers) in self.casts.items():
            total += cost * any(of[consumer] != of[_producer(key)] for consumer in consumers)
        return total

    def solve(self) -> dict[str, str]:
        """For each call the dtype that makes the sum least; where it makes no difference, float32.

        By ``networkx``, for each part of the problem that hangs together. That nothing else costs less is the theorem
        of minimum cut and maximum flow.
        """
        found: dict[str, str] = {}
        for edges in self._parts():
            found.update(_sides(edges))
        return {name: found.get(name, HIGH) for name in self.costs}

    def _edges(self) -> Iterator[tuple[str, str, int]]:
        """(from, to, cost when the first runs in float32 and the second in the low dtype)."""
        for name, (high, low) in self.costs.items():
            yield HIGH, name, low
            yield name, LOW, high
        for one, other in self.ties:
            yield one, other, NEVER
            yield other, one, NEVER
        for key, (cost, consumers) in self.casts.items():
            producer = _producer(key)
            if len(consumers) == 1:
                (consumer,) = consumers
                yield producer, consumer, cost
                yield consumer, producer, cost
            else:
                down, up = f"down\n{key}", f"up\n{key}"  # whether a low copy is needed, and one in float32
                yield producer, down, cost
                yield up, producer, cost
                yield from chain.from_iterable(
                    ((down, consumer, NEVER), (consumer, up, NEVER)) for consumer in consumers
                )

    def _parts(self) -> Iterator[list[tuple[str, str, int]]]:
        """The edges of each set of calls that hang together, not through what runs in one dtype in any case."""
        edges = [
            edge for edge in self._edges() if edge[2] and edge[0] != edge[1] and edge[0] != LOW and edge[1] != HIGH
        ]
        root: dict[str, str] = {}

        def find(name: str) -> str:
            while root.setdefault(name, name) != name:
                root[name] = name = root[root[name]]
            return name

        for one, other, _ in edges:
            if one != HIGH and other != LOW:
                root[find(one)] = find(other)
        parts: dict[str, list[tuple[str, str, int]]] = {}
        for edge in edges:
            if edge[:2] != (HIGH, LOW):
                parts.setdefault(find(edge[0] if edge[0] != HIGH else edge[1]), []).append(edge)
        yield from parts.values()


def _producer(key: str) -> str:
    return key.rpartition("\n")[2]


def _sides(edges: list[tuple[str, str, int]]) -> dict[str, str]:
    """The side of each node of a minimum cut: the one with most nodes in float32, which is but one."""
    import networkx  # type: ignore[import-untyped]  # torch brings it, and imports it no earlier

    graph: Any = networkx.DiGraph()
    graph.add_nodes_from((HIGH, LOW))
    for one, other, cost in edges:
        if graph.has_edge(one, other):
            graph[one][other]["capacity"] += cost
        else:
            graph.add_edge(one, other, capacity=cost)
    _, (high, low) = networkx.minimum_cut(graph, HIGH, LOW)
    return {**dict.fromkeys(high, HIGH), **dict.fromkeys(low, LOW)}
