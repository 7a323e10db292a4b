"""Which casts are one cast?

autocast keeps the low copy of a leaf of autograd (a parameter, or an input that is one) until the outermost
region ends, so all its uses add up their gradients in the low dtype; anything else is cast anew for
each use. This is where that is followed, and where "fast" shares more. A write to a value ends sharing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import fx, nn

from fxamp.capture import AutocastState
from fxamp.dtypes import is_castable
from fxamp.plan.aliasing import Writes
from fxamp.plan.calls import Call, argument_nodes
from fxamp.plan.decision import Cast, Decision
from fxamp.plan.flow import Flow, tensors_in
from fxamp.plan.results import USER_CASTS
from fxamp.policy.flow import output_kind

__all__ = ["Sharing"]

# ``x.float()`` of a float32 tensor is x itself, and so has its place in autocast's cache.
_MAY_RETURN_ITSELF: Final = frozenset(USER_CASTS) | frozenset(
    "positive resolve_conj resolve_neg contiguous dropout alpha_dropout feature_dropout requires_grad".split()
)


class Sharing:
    """Follows the values of a graph from its start.

    Args:
        attribute: path to the parameter, buffer, tensor or module of that name.
        everything: share the casts of every value, as "fast" does, and not only of leaves.
    """

    def __init__(self, attribute: Callable[[str], Any], *, everything: bool) -> None:
        self._attribute = attribute
        self._everything = everything
        self._writes = Writes()
        self._origins: dict[fx.Node, fx.Node] = {}  # the value that a call may hand on as it is
        self._leaves: dict[str, object] = {}  # what stands for a leaf, by the name of the node cast
        self._ambient_leaves: set[object] = set()

    def define(self, node: fx.Node, call: Call | None = None, *, from_table: bool = False) -> None:
        """A value comes to be; ``from_table``: out of an operator of the table, so it is a new tensor."""
        if call is None:
            self._writes.define(node, fresh=True)
            return
        kind = output_kind(call.aten, node.target, node.args, node.kwargs) if call.aten else None
        if call.aten in _MAY_RETURN_ITSELF:
            kind = None
            for first in node.all_input_nodes[:1]:
                self._origins[node] = self._origins.get(first, first)
        fresh = from_table or kind not in (None, "first")
        self._writes.define(node, fresh=fresh and not call.inplace)
        unseen = [] if call.aten or call.steering else [n for n in node.all_input_nodes if n.op != "get_attr"]
        for target in (*call.writes, *unseen):
            self._writes.write(target)

    def shared(self, cast: Cast, source: fx.Node, state: AutocastState) -> Cast:
        """The cast with the key under which it is shared, if it is."""
        origin = self._origins.get(source, source)
        value = self._attribute(str(origin.target)) if origin.op == "get_attr" else None
        weight = isinstance(value, nn.Parameter)
        self._leaves[source.name] = self._leaf(source)
        is_leaf = origin.op == "placeholder" or (
            isinstance(value, torch.Tensor) and ((weight and value.dtype == torch.float32) or not value.requires_grad)
        )
        cached = cast.dtype == state.dtype and state.cache_enabled and is_leaf
        if not (self._everything or cached):
            return replace(cast, weight=weight)
        held = source if self._everything else origin
        key = f"{held.name}:{cast.dtype}:{self._writes.version(held)}:{state.epoch}"
        leaf_only = not self._everything and (origin.op == "placeholder" or origin is not source)
        return replace(cast, share=key, leaf_only=leaf_only, weight=weight)

    def note_ambient(self, node: fx.Node, inputs: tuple[Flow, ...]) -> None:
        """Remembers the leaves that a call left to autocast may cast."""
        modules = [self._attribute(str(node.target))] if node.op == "call_module" else []
        for source, flow in zip(argument_nodes(node), inputs, strict=True):
            if any(value.dtype is None or is_castable(value.dtype) for value in tensors_in(flow)):
                self._ambient_leaves.add(self._leaf(source))
            value = self._attribute(str(source.target)) if source.op == "get_attr" else None
            modules += [value] if isinstance(value, nn.Module) else []
        for module in modules:
            self._ambient_leaves.update(map(id, module.parameters()))

    def with_ambient(self, decisions: list[Decision]) -> list[Decision]:
        """Leaves to autocast's own cache whatever an opaque call uses too, so that it is cast once."""
        found = dict(enumerate(decisions))
        while True:
            moved = [i for i, d in found.items() if d.how == "call" and self._ambient_leaves & self._cached(d)]
            if not moved:
                return list(found.values())
            for i in moved:
                self._ambient_leaves |= self._cached(found[i])
                reason = f"{found[i].reason}, shared with an opaque call"
                found[i] = replace(found[i], how="ambient", casts=(), reason=reason)

    def _cached(self, decision: Decision) -> set[object]:
        return {self._leaves[cast.value] for cast in decision.casts if cast.share}

    def _leaf(self, node: fx.Node) -> object:
        """What stands for the leaf that a value may be: a parameter's identity, an input's name."""
        origin = self._origins.get(node, node)
        return id(self._attribute(str(origin.target))) if origin.op == "get_attr" else origin.name
