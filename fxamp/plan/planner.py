"""Which dtype does each call run in, and which of its inputs are cast for that?

Reads a traced graph and a policy and makes a ``PrecisionPlan``; changes nothing. For each call the rule is
found in this order: in-place calls are left alone; an override of the module; a region the user
disabled; an override of the operator; the operator table; ``follow`` for an operator that autocast
does not touch; ``opaque`` for whatever cannot be seen into.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import fx, nn

from fxamp.capture import AutocastState, state_of
from fxamp.dtypes import is_castable
from fxamp.errors import PlanError
from fxamp.plan.aliasing import Writes
from fxamp.plan.calls import Call, argument_nodes, read_call
from fxamp.plan.decision import Cast, Decision, PrecisionPlan
from fxamp.plan.flow import NOT_A_TENSOR, UNKNOWN, Flow, Value, of_object, promoted, tensors_in
from fxamp.plan.results import USER_CASTS, result_of
from fxamp.policy import Policy, Ruling
from fxamp.policy.flow import output_kind
from fxamp.policy.operators import operator_rules, transparent

__all__ = ["Observer", "make_plan"]

_OVERRIDE_EXEMPT = frozenset({"getitem", "alias", *USER_CASTS})
# What an operator gives that autocast decides about inside: the loss comes out of nll_loss, which is float32.
_AUTOCAST_GIVES = {"cross_entropy_loss": torch.float32}
# ``x.float()`` of a float32 tensor is x itself, and so has its place in autocast's cache.
_MAY_RETURN_ITSELF = frozenset(
    {"positive", "resolve_conj", "resolve_neg", "contiguous", "dropout", "alpha_dropout", "feature_dropout",
     "requires_grad", *USER_CASTS}
)


class Observer(Protocol):
    """Runs a planned call on fake tensors, so that dtypes are known and not derived."""

    def flow(self, node: fx.Node, decision: Decision) -> Flow | None:
        """The flow of the node's value, or None when it could not be told."""


def make_plan(
    graph: fx.Graph,
    attribute: Callable[[str], Any],
    policy: Policy,
    rulings: Mapping[str, Ruling],
    *,
    mode: str = "train",
    observer: Observer | None = None,
) -> PrecisionPlan:
    """The plan for one traced graph.

    Args:
        graph: as traced; it is only read.
        attribute: path to the parameter, buffer, tensor or module of that name.
        policy: with its device type and dtype resolved.
        rulings: module path to the override that decides for it.
        mode: "train" or "eval", kept in the plan.
        observer: when given, says what each call gives back.

    Raises:
        PlanError: when the graph has an operator that autocast refuses to run.
    """
    planner = _Planner(attribute, policy, rulings, observer)
    decisions = [planner.decide(node) for node in graph.nodes]
    return PrecisionPlan(policy, mode, tuple(planner.share_with_opaque(decisions)))


class _Planner:
    def __init__(
        self,
        attribute: Callable[[str], Any],
        policy: Policy,
        rulings: Mapping[str, Ruling],
        observer: Observer | None,
    ) -> None:
        assert policy.device_type is not None and policy.dtype is not None
        self._attribute = attribute
        self._policy = policy
        self._rulings = rulings
        self._observer = observer
        self._device_type = policy.device_type
        self._ambient = AutocastState(policy.dtype, enabled=policy.name != "full")
        self._flows: dict[fx.Node, Flow] = {}
        self._writes = Writes()
        self._origins: dict[fx.Node, fx.Node] = {}  # the value that a call may hand on as it is
        # What autocast's cache may hold: leaves of autograd, by the name of the node that hands them on.
        self._leaves: dict[str, object] = {}
        self._ambient_leaves: set[object] = set()

    def decide(self, node: fx.Node) -> Decision:
        blank = Decision(node.name, node.op, module=node.meta["module"], source=node.meta["source"])
        if node.op in ("placeholder", "get_attr", "output"):
            decision = self._boundary(node, blank)
        else:
            call = read_call(node, self._attribute)
            decision = self._decide_call(node, call, blank)
            self._note_writes(node, call, decision)
        observed = self._observer.flow(node, decision) if self._observer is not None else None
        if observed is not None:
            decision = replace(decision, output=observed)
        self._flows[node] = decision.output
        return decision

    def _boundary(self, node: fx.Node, blank: Decision) -> Decision:
        self._writes.define(node, fresh=True)
        if node.op == "placeholder":
            return replace(blank, output=UNKNOWN, reason="model input")
        if node.op == "get_attr":
            value = self._attribute(str(node.target))
            return replace(blank, output=NOT_A_TENSOR if isinstance(value, nn.Module) else of_object(value))
        return replace(blank, inputs=tuple(self._flows[n] for n in argument_nodes(node)))

    def _decide_call(self, node: fx.Node, call: Call, blank: Decision) -> Decision:
        inputs = tuple(self._flows[n] for n in argument_nodes(node))
        blank = replace(blank, op=call.op, aten=call.aten, inputs=inputs)
        if call.steering:
            return blank
        state = state_of(node.meta["regions"], self._device_type, self._ambient)
        ruling, how = self._ruling(node, call, state)
        blank = replace(blank, rule=ruling.rule, reason=ruling.reason, state=state)
        if how == "ambient":
            return self._ambient_call(node, blank)
        if not tensors_in(inputs) and call.aten:
            plain = replace(blank, rule="", reason="")
            return replace(plain, output=self._result(node, call, inputs, ()))
        if ruling.rule == "banned":
            raise _banned(call, blank, state)
        if ruling.rule == "fp32_dtype":
            return self._through_dtype(node, call, blank)
        return self._through_casts(node, call, blank)

    # -- rules -------------------------------------------------------------------------------------

    def _ruling(self, node: fx.Node, call: Call, state: AutocastState) -> tuple[Ruling, str]:
        """The rule for a call, and whether it is run as a "call" or left to "ambient" autocast."""
        override = self._rulings.get(node.meta["module"])
        seen_into = bool(call.aten)
        if call.inplace:
            return Ruling("follow", "in-place"), "call"
        if override is not None and call.aten not in _OVERRIDE_EXEMPT:
            return override, "call" if seen_into else "ambient"
        if node.meta["regions"] and not state.enabled:
            return Ruling("follow", "region enabled=False"), "call"
        overridden = dict(self._policy.ops).get(call.aten)
        if overridden is None and not state.enabled:
            return Ruling("follow", "policy full"), "call"
        found = self._policy.operator_ruling(call.aten) if seen_into else None
        if found is not None:
            return found, "call"
        if seen_into and (call.aten in _OVERRIDE_EXEMPT or transparent(call.aten, self._device_type)):
            return Ruling("follow", "input dtype"), "call"
        return Ruling("opaque", _why_opaque(node, call)), "ambient"

    def _ambient_call(self, node: fx.Node, blank: Decision) -> Decision:
        """A call that cannot be seen into: autocast decides inside it, at run time."""
        state, rule = blank.state, blank.rule
        assert state is not None
        enabled = rule not in ("fp32", "follow") and (state.enabled or rule != "opaque")
        casts = self._casts(node, torch.float32, blank.inputs, share=False) if rule == "fp32" else ()
        if enabled:
            self._note_leaves(node, blank.inputs)
        how = "ambient" if enabled else "call"
        output = Value(_AUTOCAST_GIVES.get(blank.aten)) if enabled else UNKNOWN
        return replace(blank, how=how, casts=casts, state=replace(state, enabled=enabled), output=output)

    def _through_dtype(self, node: fx.Node, call: Call, blank: Decision) -> Decision:
        first = next((flow for flow in blank.inputs if tensors_in(flow)), NOT_A_TENSOR)
        rule = replace(blank, rule="fp32")
        dtype = first.dtype if isinstance(first, Value) else None
        if _gives_dtype(node):
            how, runs_in = "call", None
        elif dtype is None:
            how, runs_in = "dtype if castable", None
        elif is_castable(dtype):
            how, runs_in = "dtype", torch.float32
        else:
            how, runs_in = "call", dtype
        given = self._result(node, call, blank.inputs, tensors_in(blank.inputs))
        output = Value(torch.float32, None) if how == "dtype" else (given if how == "call" else UNKNOWN)
        return replace(rule, rule="fp32", how=how, runs_in=runs_in, output=output)

    def _through_casts(self, node: fx.Node, call: Call, blank: Decision) -> Decision:
        target, how = self._target(blank)
        casts = self._casts(node, target, blank.inputs) if target is not None else ()
        cast_inputs = self._after(blank.inputs, casts)
        output = self._result(node, call, blank.inputs, cast_inputs)
        lowered = target if any(value.dtype in (None, target) for value in cast_inputs) else None
        runs_in = lowered or promoted(cast_inputs)
        return replace(blank, casts=casts, how=how, runs_in=runs_in, output=output)

    def _target(self, blank: Decision) -> tuple[torch.dtype | None, str]:
        """The dtype that all tensor inputs are cast to, or None for no casts, and how to call."""
        assert blank.state is not None
        if blank.rule == "lower":
            return blank.state.dtype, "call"
        if blank.rule == "fp32":
            return torch.float32, "call"
        dtypes = {value.dtype for value in tensors_in(blank.inputs) if value.dtype is None or is_castable(value.dtype)}
        if blank.rule != "promote" and not (self._may_meet(blank) and len(dtypes) > 1):
            return None, "call"
        if torch.float32 in dtypes:
            return (torch.float32, "call") if None not in dtypes or blank.rule == "promote" else (None, "promote")
        return (blank.state.dtype, "call") if dtypes <= {blank.state.dtype} else (None, "promote")

    def _may_meet(self, blank: Decision) -> bool:
        """Whether an override can have brought two dtypes to a call that torch would not promote by itself."""
        overridden = bool(self._policy.ops or self._policy.modules)
        return overridden and blank.reason != "in-place" and operator_rules(self._device_type).get(blank.aten) == "lower"

    # -- casts and results -------------------------------------------------------------------------

    def _casts(
        self, node: fx.Node, target: torch.dtype, inputs: tuple[Flow, ...], *, share: bool = True
    ) -> tuple[Cast, ...]:
        casts = []
        for slot, (source, flow) in enumerate(zip(argument_nodes(node), inputs, strict=True)):
            wanted = [v.dtype for v in tensors_in(flow) if v.dtype is None or _casts_to(v.dtype, target)]
            if wanted:
                soft = None in wanted or not isinstance(flow, Value)
                cast = Cast(slot, source.name, target, soft)
                casts.append(self._shared(cast, source, node) if share else cast)
        return tuple(casts)

    def _shared(self, cast: Cast, source: fx.Node, user: fx.Node) -> Cast:
        """The cast with the key under which it is shared, if autocast's cache (or "fast") would share it."""
        origin = self._origins.get(source, source)
        value = self._attribute(str(origin.target)) if origin.op == "get_attr" else None
        weight = isinstance(value, nn.Parameter)
        self._leaves[source.name] = self._leaf(source)
        state = state_of(user.meta["regions"], self._device_type, self._ambient)
        fast = self._policy.name == "fast"
        cached = cast.dtype == state.dtype and state.cache_enabled
        cacheable = isinstance(value, torch.Tensor) and (
            (weight and value.dtype == torch.float32) or not value.requires_grad
        )
        if not (fast or (cached and (cacheable or origin.op == "placeholder"))):
            return replace(cast, weight=weight)
        shared = source if fast else origin
        key = f"{shared.name}:{cast.dtype}:{self._writes.version(shared)}:{state.epoch}"
        leaf_only = not fast and (origin.op == "placeholder" or origin is not source)
        return replace(cast, share=key, leaf_only=leaf_only, weight=weight)

    def _after(self, inputs: tuple[Flow, ...], casts: tuple[Cast, ...]) -> tuple[Value, ...]:
        """The tensors that a call computes with."""
        by_slot = {cast.slot: cast for cast in casts}
        values: list[Value] = []
        for slot, flow in enumerate(inputs):
            for value in tensors_in(flow):
                cast = by_slot.get(slot)
                changed = cast is not None and (value.dtype is None or _casts_to(value.dtype, cast.dtype))
                # A soft cast may find an integer; an operator with a rule computes with floating tensors.
                values.append(Value(cast.dtype, value.scalar) if cast is not None and changed else value)
        return tuple(values)

    def _result(self, node: fx.Node, call: Call, inputs: tuple[Flow, ...], cast_inputs: tuple[Value, ...]) -> Flow:
        return result_of(node, call.aten, inputs, cast_inputs, self._flows.__getitem__)

    # -- memory ------------------------------------------------------------------------------------

    def _note_writes(self, node: fx.Node, call: Call, decision: Decision) -> None:
        kind = output_kind(call.aten, node.target, node.args, node.kwargs) if call.aten and call.aten not in _MAY_RETURN_ITSELF else None
        if call.aten in _MAY_RETURN_ITSELF and node.all_input_nodes:
            first = node.all_input_nodes[0]
            self._origins[node] = self._origins.get(first, first)
        fresh = decision.reason == "op table" or kind not in (None, "first")
        self._writes.define(node, fresh=fresh and not call.inplace)
        for target in call.writes:
            self._writes.write(target)
        if not call.aten and not call.steering:
            for source in node.all_input_nodes:
                if source.op != "get_attr":
                    self._writes.write(source)

    def _leaf(self, node: fx.Node) -> object:
        """What stands for the leaf of autograd that a value may be: a parameter's identity, an input's name."""
        origin = self._origins.get(node, node)
        return id(self._attribute(str(origin.target))) if origin.op == "get_attr" else origin.name

    def _note_leaves(self, node: fx.Node, inputs: tuple[Flow, ...]) -> None:
        """Remembers the leaves that a call left to autocast may cast."""
        for source, flow in zip(argument_nodes(node), inputs, strict=True):
            if any(value.dtype is None or is_castable(value.dtype) for value in tensors_in(flow)):
                self._ambient_leaves.add(self._leaf(source))
            value = self._attribute(str(source.target)) if source.op == "get_attr" else None
            if isinstance(value, nn.Module):
                self._ambient_leaves.update(map(id, value.parameters()))
        if node.op == "call_module":
            self._ambient_leaves.update(map(id, self._attribute(str(node.target)).parameters()))

    def share_with_opaque(self, decisions: list[Decision]) -> list[Decision]:
        """Leaves to autocast's own cache whatever an opaque call uses too, so that it is cast once."""
        found = dict(enumerate(decisions))
        while True:
            moved = [i for i, d in found.items() if d.how == "call" and self._ambient_leaves & self._shared_leaves(d)]
            if not moved:
                return list(found.values())
            for i in moved:
                self._ambient_leaves |= self._shared_leaves(found[i])
                reason = f"{found[i].reason}, shared with an opaque call"
                found[i] = replace(found[i], how="ambient", casts=(), reason=reason)

    def _shared_leaves(self, decision: Decision) -> set[object]:
        return {self._leaves[cast.value] for cast in decision.casts if cast.share}


def _casts_to(dtype: torch.dtype, target: torch.dtype) -> bool:
    return dtype != target and is_castable(dtype)


def _gives_dtype(node: fx.Node) -> bool:
    values = (*node.args, *node.kwargs.values())
    return node.kwargs.get("dtype") is not None or any(isinstance(value, torch.dtype) for value in values)


def _why_opaque(node: fx.Node, call: Call) -> str:
    if node.op == "call_module":
        return node.meta.get("untraceable") or "module runs as a whole"
    return f"{call.aten} calls others inside" if call.aten else "not an ATen operator"


def _banned(call: Call, blank: Decision, state: AutocastState) -> PlanError:
    where = f" in module '{blank.module}'" if blank.module else ""
    return PlanError(
        f"{call.op} (node '{blank.name}'{where}, {blank.source}) is refused by torch.autocast: its result in "
        f"{state.dtype} would not be safe",
        hint="use torch.nn.functional.binary_cross_entropy_with_logits, which takes the value before the sigmoid",
    )
