"""Which of two dtypes for every value, so that it costs least?

Each call runs in one of two dtypes, which costs what it costs; a value that is needed in the other one is cast once,
however many need it. That is a minimum cut of a graph between a source, float32, and a sink, the low dtype: a call on
the source's side runs in float32. A value has at most two auxiliary nodes, one for each direction of its cast.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
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

        What hangs on one or two others is decided by them, and left out first; the rest is solved by ``networkx``, each
        part that hangs together for itself. That nothing costs less is the theorem of minimum cut and maximum flow.
        """
        core = _Core(self._edges())
        core.reduce()
        sides = core.solve()
        return {name: sides.get(name, HIGH) for name in self.costs}

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


def _producer(key: str) -> str:
    return key.rpartition("\n")[2]


class _Core:
    """The same problem as numbers.

    Attributes:
        more: by how much a node costs more in the low dtype.
        pairs: what it costs when the first node runs in float32 and the second in the low dtype; both ways are there.
        left_out: nodes that were taken out, with their neighbours then, in order.
    """

    def __init__(self, edges: Iterable[tuple[str, str, int]]) -> None:
        self.more: dict[str, int] = {}
        self.pairs: dict[str, dict[str, int]] = {}
        self.left_out: list[tuple[str, int, list[tuple[str, int, int]]]] = []
        for one, other, cost in edges:
            if one in (LOW, other) or other == HIGH or (one, other) == (HIGH, LOW):
                continue
            if one == HIGH:
                self._add(other, cost)
            elif other == LOW:
                self._add(one, -cost)
            else:
                self._join(one, other, cost)

    def _add(self, node: str, more: int) -> None:
        self.more[node] = self.more.get(node, 0) + more
        self.pairs.setdefault(node, {})

    def _join(self, one: str, other: str, cost: int) -> None:
        self._add(one, 0)
        self._add(other, 0)
        self.pairs[one][other] = self.pairs[one].get(other, 0) + cost
        self.pairs[other].setdefault(one, 0)

    def reduce(self) -> None:
        """Takes out nodes with one neighbour or two, for which those pay what the node costs at its best."""
        waiting = [node for node in self.pairs if len(self.pairs[node]) <= _FEW]
        while waiting:
            node = waiting.pop()
            if node not in self.pairs or len(self.pairs[node]) > _FEW:
                continue
            around = [(other, self.pairs[other].pop(node), cost) for other, cost in self.pairs.pop(node).items()]
            self.left_out.append((node, self.more.pop(node), around))
            self._pass_on(*self.left_out[-1][1:])
            waiting.extend(other for other, _, _ in around if len(self.pairs[other]) <= _FEW)

    def _pass_on(self, more: int, around: list[tuple[str, int, int]]) -> None:
        best = {sides: _best(more, around, sides)[0] for sides in itertools.product((HIGH, LOW), repeat=len(around))}
        if len(around) == 1:
            self._add(around[0][0], best[LOW,] - best[HIGH,])
        elif around:
            (one, _, _), (other, _, _) = around
            self._add(one, best[LOW, HIGH] - best[HIGH, HIGH])
            self._add(other, best[LOW, LOW] - best[LOW, HIGH])
            self._join(one, other, best[HIGH, LOW] + best[LOW, HIGH] - best[HIGH, HIGH] - best[LOW, LOW])

    def solve(self) -> dict[str, str]:
        """The side of each node: the one with most in float32, of those that cost least."""
        found: dict[str, str] = {}
        for part in self._parts():
            found.update(self._cut(part))
        for node, more, around in reversed(self.left_out):
            found[node] = _best(more, around, tuple(found[other] for other, _, _ in around))[1]
        return found

    def _parts(self) -> Iterator[list[str]]:
        """The nodes that are left, in parts that hang together."""
        seen: set[str] = set()
        for node in self.pairs:
            part = [] if node in seen else [node]
            seen.add(node)
            for each in part:
                further = [other for other in self.pairs[each] if other not in seen]
                seen.update(further)
                part.extend(further)
            if part:
                yield part

    def _cut(self, part: list[str]) -> dict[str, str]:
        import networkx  # type: ignore[import-untyped]  # torch brings it, and imports it no earlier

        graph: Any = networkx.DiGraph()
        graph.add_nodes_from((HIGH, LOW))
        for node in part:
            more = self.more[node]
            graph.add_edge(*((HIGH, node) if more > 0 else (node, LOW)), capacity=abs(more))
            graph.add_edges_from((node, other, {"capacity": cost}) for other, cost in self.pairs[node].items() if cost)
        fastest = networkx.algorithms.flow.boykov_kolmogorov
        _, (high, low) = networkx.minimum_cut(graph, HIGH, LOW, flow_func=fastest)
        return {**dict.fromkeys(high, HIGH), **dict.fromkeys(low, LOW)}


def _best(more: int, around: list[tuple[str, int, int]], sides: tuple[str, ...]) -> tuple[int, str]:
    """What a node costs at least, and on which side, when its neighbours are on these."""
    high = sum(out for (_, _, out), side in zip(around, sides, strict=True) if side == LOW)
    low = more + sum(into for (_, into, _), side in zip(around, sides, strict=True) if side == HIGH)
    return (high, HIGH) if high <= low else (low, LOW)


_FEW: Final = 2
