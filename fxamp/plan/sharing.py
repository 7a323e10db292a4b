"""Which casts are one cast?

autocast keeps the low copy of a leaf of autograd (a parameter, or an input that is one) until the outermost
region ends, so all its uses add up their gradients in the low dtype; anything else is cast anew for
each use. A parameter that is read directly is one cast for the whole graph. What may be a leaf only at run
time (an input, a view, a part of a dict) is looked up by identity then. "fast" shares every value's cast.
A write to a value ends sharing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import fx, nn

from fxamp.capture import AutocastState, assign
from fxamp.capture.calls import enter_inference_mode, exit_inference_mode, has_hooks, set_objects
from fxamp.dtypes import is_castable
from fxamp.plan.aliasing import Writes, storage_of
from fxamp.plan.calls import Call, argument_nodes
from fxamp.plan.decision import Cast, Decision
from fxamp.plan.flow import Flow, tensors_in
from fxamp.plan.results import USER_CASTS
from fxamp.policy.flow import output_kind

__all__ = ["SWITCHES", "Sharing"]

# What may give back its argument itself, or a part of a container: only so is a result a leaf. A view is none.
_MAY_RETURN_ITSELF: Final = frozenset(USER_CASTS) | frozenset(
    "getitem getattr contiguous cpu cuda dropout alpha_dropout feature_dropout flatten ravel reshape reshape_as "
    "atleast_1d atleast_2d atleast_3d real conj resolve_conj resolve_neg positive broadcast_tensors broadcast_to "
    "sum_to_size to_dense as_tensor chunk split unbind".split()
)
SWITCHES: Final = frozenset({torch._C._set_grad_enabled, enter_inference_mode, exit_inference_mode})
_MAKES_LEAVES: Final = frozenset({"requires_grad", "detach"})


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
        self._may_be: dict[fx.Node, frozenset[object]] = {}  # the leaves that a value may be
        self._leaves: dict[str, frozenset[object]] = {}  # the same, by the name of the node
        self._ambient_leaves: set[object] = set()
        self._given: frozenset[object] = frozenset()  # to calls that are not seen into, which may keep them
        self._grad_modes = 0  # how often the grad mode was switched
        self._first_dtype: dict[tuple[object, int], torch.dtype] = {}

    def define(self, node: fx.Node, call: Call | None = None, *, from_table: bool = False) -> None:
        """A value comes to be; ``from_table``: out of an operator of the table, so it is a new tensor."""
        if call is None:
            value = self._attribute(str(node.target)) if node.op == "get_attr" else None
            storage = storage_of(value) if isinstance(value, torch.Tensor) else None
            self._writes.define(node, fresh=True, storage=storage)
            self._may_be[node] = self._named(node)
            return
        self._grad_modes += node.target in SWITCHES
        hands_on = call.inplace or call.holds or call.aten in _MAY_RETURN_ITSELF
        self._writes.define(node, fresh=from_table or not (hands_on or _may_be_a_view(node, call)))
        for owner in set_objects(node):
            self._writes.join(owner, node.all_input_nodes)
        if not call.steering and (not call.aten or call.aten in _MAKES_LEAVES):
            self._may_be[node] = frozenset({node.name}) | self._handed_on(node, call)
        elif hands_on:
            self._may_be[node] = frozenset().union(*(self._may_be[n] for n in node.all_input_nodes))
        else:
            self._may_be[node] = frozenset()
        if call.writes:
            self._writes.write(call.writes)
        for module in self._modules(node) if node.target is not assign else ():
            self._writes.touch(storage_of(tensor) for tensor in (*module.parameters(), *module.buffers()))

    def _handed_on(self, node: fx.Node, call: Call) -> frozenset[object]:
        """The leaves that a call which is not seen into may give back: any that such calls got, or that it has."""
        modules = self._modules(node)
        if call.aten or (modules and all(_is_torchs(module) for module in modules)):
            return frozenset()
        self._given |= {id(p) for module in modules for p in module.parameters()}
        self._given |= frozenset().union(*(self._may_be[source] for source in node.all_input_nodes))
        return self._given

    def cast(self, cast: Cast, source: fx.Node, state: AutocastState, *, share: bool) -> Cast:
        """The cast with the key under which it is shared, or marked to be looked up at run time."""
        value = self._attribute(str(source.target)) if source.op == "get_attr" else None
        weight = isinstance(value, nn.Parameter)
        trained = weight and value.requires_grad  # type: ignore[union-attr]
        if not share:
            return replace(cast, weight=weight, epoch=state.epoch)
        version = self._writes.version(source, guessed=False)
        cast = replace(cast, weight=weight, epoch=state.epoch, version=version)
        if not self._everything and (cast.dtype != state.dtype or not state.cache_enabled):
            return cast
        # autocast has one copy of a weight with gradients; whether another tensor is one with it, nobody would tell.
        version = version if trained else self._writes.version(source)
        key = f"{source.name}:{cast.dtype}:{version}:{state.epoch}"
        if self._everything:
            # A cast that was made without gradients does not serve a use with them; that of a weight always has them.
            return replace(cast, share=key if weight else f"{key}:{self._grad_modes}")
        self._leaves[source.name] = self._may_be[source]
        for leaf in self._may_be[source]:
            # The cache of autocast has one copy of a leaf, whatever its dtype: two dtypes are left to it.
            if self._first_dtype.setdefault((leaf, state.epoch), cast.dtype) != cast.dtype:
                self._ambient_leaves.add(leaf)
        if isinstance(value, torch.Tensor):
            static = value.dtype == torch.float32 if weight else not value.requires_grad
            return replace(cast, share=key) if static else replace(cast, leaf_only=not weight)
        return replace(cast, leaf_only=bool(self._leaves[source.name]))

    def is_written(self, node: fx.Node) -> bool:
        """Whether the memory of a value, or what may be the same memory, is written to so far."""
        return self._writes.version(node) > 0

    def note_ambient(self, node: fx.Node, inputs: tuple[Flow, ...]) -> None:
        """Remembers the leaves that a call left to autocast may cast."""
        for source, flow in zip(argument_nodes(node), inputs, strict=True):
            if any(value.dtype is None or is_castable(value.dtype) for value in tensors_in(flow)):
                self._ambient_leaves |= self._may_be[source]
        for module in self._modules(node):
            self._ambient_leaves.update(map(id, module.parameters()))

    def _modules(self, node: fx.Node) -> list[nn.Module]:
        """The modules that a call runs, or is given."""
        sources = [source for source in node.all_input_nodes if source.op == "get_attr"]
        if node.op == "call_module":
            sources.insert(0, node)
        values = [self._attribute(str(source.target)) for source in sources]
        return [value for value in values if isinstance(value, nn.Module)]

    def with_ambient(self, decisions: list[Decision]) -> list[Decision]:
        """Leaves to autocast's own cache whatever an opaque call uses too, so that it is cast once."""
        found = dict(enumerate(decisions))
        while True:
            moved = [i for i, d in found.items() if d.how == "call" and self._ambient_leaves & self._cached(d)]
            if not moved:
                return _looked_up(list(found.values()))
            for i in moved:
                self._ambient_leaves |= self._cached(found[i])
                reason = f"{found[i].reason}, shared with an opaque call"
                found[i] = replace(found[i], how="ambient", casts=(), reason=reason)

    def _cached(self, decision: Decision) -> set[object]:
        casts = (cast for cast in decision.casts if cast.share or cast.leaf_only)
        return {leaf for cast in casts for leaf in self._leaves.get(cast.value, ())}

    def _named(self, node: fx.Node) -> frozenset[object]:
        """What stands for an input or a tensor that is read: a parameter's identity, the name of any other."""
        if node.op != "get_attr":
            return frozenset({node.name})
        value = self._attribute(str(node.target))
        is_leaf = isinstance(value, torch.Tensor) and value.requires_grad
        return frozenset({id(value)} if is_leaf else ())


def _may_be_a_view(node: fx.Node, call: Call) -> bool:
    if call.aten and _gives_new_tensors(call.aten):
        return False
    kind = output_kind(call.aten, node.target, node.args, node.kwargs) if call.aten else None
    return kind in (None, "first")


@functools.cache
def _gives_new_tensors(aten: str) -> bool:
    """Whether no overload of an operator gives a view, by its schema; one made of others may give an input back."""
    packet = getattr(torch.ops.aten, aten, None)
    every = [getattr(packet, name) for name in packet.overloads()] if packet is not None else []
    overloads = [overload for overload in every if torch._C._dispatch_has_kernel(overload.name())]
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(overloads) and not any(
        overload.has_kernel_for_dispatch_key(composite)
        or any(result.alias_info is not None and not result.alias_info.is_write for result in overload._schema.returns)
        for overload in overloads
    )


def _is_torchs(module: nn.Module) -> bool:
    """Whether a module, with all that it calls, is one of torch's own, which make new tensors."""
    return all(m.__class__.__module__.startswith("torch.nn.") and not has_hooks(m) for m in module.modules())


def _looked_up(decisions: list[Decision]) -> list[Decision]:
    """The decisions; a single cast of what may be a leaf has nothing to share with, and is a plain one."""
    casts = [cast for decision in decisions for cast in decision.casts]
    if sum(cast.leaf_only for cast in casts) != 1 or any(cast.share for cast in casts if cast.leaf_only):
        return decisions
    alone = next(cast for cast in casts if cast.leaf_only)
    if alone.value not in {decision.name for decision in decisions if decision.op == "placeholder"}:
        return decisions
    return [
        replace(d, casts=tuple(replace(cast, leaf_only=False) for cast in d.casts)) if alone in d.casts else d
        for d in decisions
    ]
