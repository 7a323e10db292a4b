"""Does a rewritten graph keep the laws?

Run on every converted graph. Each law is one function that yields what breaks it; a broken law is an
error of fxamp's own, so the message names the node for a report.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from fxamp.dtypes import is_castable
from fxamp.errors import VerifyError
from fxamp.plan import Cast, Decision, PrecisionPlan, argument_nodes, tensors_in
from fxamp.runtime.weights import WeightCasts

__all__ = ["verify"]


def verify(graph: fx.Graph, traced: fx.Graph, plan: PrecisionPlan) -> None:
    """Checks the laws on a rewritten graph.

    Args:
        graph: after rewriting.
        traced: before.
        plan: what was to be done.

    Raises:
        VerifyError: when a law is broken, naming the law and the node.
    """
    for law in _LAWS:
        for name, found in law(graph, traced, plan):
            raise VerifyError(
                f"node '{name}' breaks a law of rewriting: {found}",
                hint="this is a fault of fxamp; please report it with print(amp.graph)",
            )


Finding = tuple[str, str]


def _own_nodes_stay(graph: fx.Graph, traced: fx.Graph, plan: PrecisionPlan) -> Iterator[Finding]:
    """Every call of the model's is there, once and in order; a weight may be read earlier."""
    own = [node for node in graph.nodes if "cast" not in node.meta and not node.meta.get("module_of")]
    kept = [node.name for node in own if node.op != "get_attr"]
    for name, expected in zip(kept, [node.name for node in traced.nodes if node.op != "get_attr"], strict=False):
        if name != expected:
            yield expected, f"found '{name}' in its place"
    if len(own) != len(traced.nodes):
        yield own[-1].name, f"{len(traced.nodes)} calls were traced and {len(own)} are left"


def _casts_as_planned(graph: fx.Graph, traced: fx.Graph, plan: PrecisionPlan) -> Iterator[Finding]:
    """Each argument of a call is what was traced, or the planned cast of it; there is no other cast."""
    nodes = {node.name: node for node in graph.nodes}
    used: set[fx.Node] = set()
    for before in traced.nodes:
        planned = {cast.slot: cast for cast in plan[before.name].casts}
        found = [n for n in argument_nodes(nodes[before.name]) if not n.meta.get("module_of")]
        expected = argument_nodes(before)
        if len(found) != len(expected):
            yield before.name, f"it has {len(found)} arguments, traced were {len(expected)}"
        for slot, (now, then) in enumerate(zip(found, expected, strict=False)):
            used.add(now)
            if slot in planned and not _casts(now, planned[slot]):
                yield before.name, f"'{now.name}' is not the planned cast of '{then.name}' to {planned[slot].dtype}"
            if slot not in planned and now.name != then.name:
                yield before.name, f"found '{now.name}' in place of '{then.name}'"
    for node in graph.nodes:
        if "cast" in node.meta and node not in used:
            yield node.name, "a cast that no planned call uses"


def _casts(node: fx.Node, cast: Cast) -> bool:
    """Whether a node casts what was planned to what was planned, or is the cast that it shares."""
    made = node.meta.get("cast")
    source, dtype = _source_and_dtype(node)
    if made is None or dtype != cast.dtype or made.dtype != cast.dtype:
        return False
    same = isinstance(source, fx.Node) and source.name == cast.value
    return same or (bool(cast.share) and made.share == cast.share)


def _source_and_dtype(node: fx.Node) -> tuple[Any, Any]:
    """What a node casts, and to what."""
    group: Any = node.args[0] if node.target is operator.getitem else None
    if isinstance(group, fx.Node) and isinstance(group.target, WeightCasts):
        index: Any = node.args[1]
        return group.args[index], group.target.dtype
    return node.args[:2] if len(node.args) > 1 else (None, None)  # type: ignore[return-value]


def _only_castable(graph: fx.Graph, traced: fx.Graph, plan: PrecisionPlan) -> Iterator[Finding]:
    """Integer, bool, complex and float64 tensors are never cast, nor what is in its dtype already."""
    for decision in plan:
        for cast in decision.casts:
            for value in tensors_in(decision.inputs[cast.slot]):
                if not cast.soft and (value.dtype is None or not is_castable(value.dtype) or value.dtype == cast.dtype):
                    yield decision.name, f"'{cast.value}' of dtype {value.dtype} is cast to {cast.dtype}"


def _writes_untouched(graph: fx.Graph, traced: fx.Graph, plan: PrecisionPlan) -> Iterator[Finding]:
    """In-place and ``out=`` calls are never cast."""
    for decision in plan:
        if decision.reason == "in-place" and (decision.casts or decision.how != "call"):
            yield decision.name, "an in-place call is cast"


def _full_is_free(graph: fx.Graph, traced: fx.Graph, plan: PrecisionPlan) -> Iterator[Finding]:
    """Policy "full" without overrides has casts only inside regions that the user enabled."""
    if plan.policy.name != "full" or plan.policy.ops or plan.policy.modules:
        return
    for decision in plan:
        if decision.casts and not _in_enabled_region(decision):
            yield decision.name, "policy full has a cast"


def _in_enabled_region(decision: Decision) -> bool:
    return decision.state is not None and decision.state.enabled


_Law = Callable[[fx.Graph, fx.Graph, PrecisionPlan], Iterator[Finding]]
_LAWS: tuple[_Law, ...] = (
    _own_nodes_stay,
    _casts_as_planned,
    _only_castable,
    _writes_untouched,
    _full_is_free,
)
