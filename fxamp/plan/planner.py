"""Which dtype does each call run in, and which of its inputs are cast for that?

Reads a traced graph and a policy and makes a ``PrecisionPlan``; changes nothing. The rule of a call comes
from ``rules``, what is shared from ``sharing``, what it gives back from ``results``.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import BuiltinFunctionType
from typing import Any, Final

import torch
from torch import fx, nn

from fxamp.capture import AutocastState, Region, assign, state_of
from fxamp.capture.tracer import THIS
from fxamp.dtypes import is_castable, promotable
from fxamp.plan.calls import Call, argument_nodes, read_call
from fxamp.plan.computing import castable, casts_to, computed_with, computes_in, eligible, gives_dtype
from fxamp.plan.decision import Cast, Decision, PrecisionPlan
from fxamp.plan.flow import NOT_A_TENSOR, UNKNOWN, Flow, Value, of_object, tensors_in
from fxamp.plan.freedom import Step
from fxamp.plan.placement import Moved, Placed, place
from fxamp.plan.protocols import Costs, Observer
from fxamp.plan.results import result_of
from fxamp.plan.rules import Rules, banned, unexpected
from fxamp.plan.sharing import Sharing
from fxamp.policy import Policy, Ruling
from fxamp.policy.operators import FORWARDS_TO

__all__ = ["make_plan"]

# What an operator gives that autocast decides about inside: the loss comes out of nll_loss, in float32.
_AUTOCAST_GIVES: Final = {"cross_entropy_loss": torch.float32}
# ``n / x`` of a number and a tensor is ``x.reciprocal() * n``.
_REFLECTED: Final[Mapping[Any, str]] = {operator.truediv: "reciprocal", operator.sub: "rsub"}


def make_plan(
    graph: fx.Graph,
    attribute: Callable[[str], Any],
    policy: Policy,
    rulings: Mapping[str, Ruling],
    *,
    mode: str = "train",
    observer: Observer | None = None,
    costs: Costs | None = None,
) -> PrecisionPlan:
    """The plan for one traced graph.

    Args:
        graph: as traced; it is only read.
        attribute: path to the parameter, buffer, tensor or module of that name.
        policy: with its device type and dtype resolved.
        rulings: module path to the override that decides for it.
        mode: "train" or "eval", kept in the plan.
        observer: when given, says what each call gives back.
        costs: for "fast", of casts and calls; None: the bytes that they move.

    Raises:
        PlanError: when the graph has an operator that autocast refuses to run.
    """
    attribute = functools.cache(attribute)  # nothing is put in the place of another while a plan is made
    unsure: frozenset[str] = frozenset()
    placed: Mapping[str, Placed] = {}
    while True:
        planner = _Planner(attribute, policy, rulings, observer, unsure, placed)
        decisions = [planner.decide(node) for node in graph.nodes]
        found = frozenset(planner.reassigned(graph))
        if not found <= unsure:
            unsure |= found
        elif policy.name == "fast" and not placed:
            placed = planner.placed(costs or Moved())
            if not placed:
                break
        else:
            break
    return PrecisionPlan(policy, mode, tuple(planner.sharing.with_ambient(decisions)))


class _Planner:
    def __init__(
        self,
        attribute: Callable[[str], Any],
        policy: Policy,
        rulings: Mapping[str, Ruling],
        observer: Observer | None,
        unsure: frozenset[str],
        placed: Mapping[str, Placed],
    ) -> None:
        assert policy.device_type is not None
        assert policy.dtype is not None
        self.sharing = Sharing(attribute, everything=policy.name == "fast")
        self._attribute = attribute
        self._rules = Rules(policy, rulings)
        self._observer = observer
        self._unsure = unsure  # attributes that the model itself gives another dtype
        self._placed = placed
        self._calls: dict[fx.Node, tuple[Call | None, Decision]] = {}
        self._device_type = policy.device_type
        self._ambient = AutocastState(policy.dtype, enabled=policy.name != "full")
        self._flows: dict[fx.Node, Flow] = {}
        self._states: dict[tuple[Region, ...], AutocastState] = {}

    def decide(self, node: fx.Node) -> Decision:
        if node.op in ("placeholder", "get_attr", "output"):
            blank = Decision(node.name, node.op, module=node.meta["module"], source=node.meta["source"])
            call, decision = None, self._boundary(node, blank)
            self.sharing.define(node)
        else:
            call = read_call(node, self._attribute)
            decision = self._decide_call(node, call)
            self.sharing.define(node, call, from_table=decision.reason == "op table")
        if self._observer is not None:
            decision = decision.but(output=self._observed(self._observer, node, decision))
        self._flows[node] = decision.output
        self._calls[node] = call, decision
        return decision

    def placed(self, costs: Costs) -> dict[str, Placed]:
        """Where calls are to run otherwise than it was decided, so that it costs least."""
        written = self.sharing.is_written
        steps = [Step(node, call, decision, written(node)) for node, (call, decision) in self._calls.items()]
        options: Any = {"attribute": self._attribute, "size_of": self._size_of, "costs": costs}
        return place(steps, self._ambient, self._device_type, **options)

    def _size_of(self, node: fx.Node) -> int | None:
        """How many elements a value has, when that is known."""
        shape = self._observer.shape(node) if self._observer is not None else None
        value = self._attribute(str(node.target)) if node.op == "get_attr" else None
        if shape is not None:
            return math.prod(shape)
        if isinstance(value, torch.Tensor):
            return value.numel()
        flow = self._flows[node]
        return 1 if isinstance(flow, Value) and flow.scalar else None

    def _observed(self, observer: Observer, node: fx.Node, decision: Decision) -> Flow:
        if self._is_unsure(node):
            observer.forget(node)
            return decision.output
        found = observer.flow(node, decision)
        return decision.output if found is None else found

    def reassigned(self, graph: fx.Graph) -> Iterator[str]:
        """The attributes that the model sets to a value of another dtype, which the next call finds there."""
        read = {str(node.target): node for node in graph.nodes if node.op == "get_attr"}
        for node in graph.nodes:
            if node.target is assign:
                owner, name, value = node.args
                if not isinstance(value, fx.Node) or owner.op != "get_attr":
                    continue  # what the model puts back, or an object of its own
                path = name if owner.target == THIS else f"{owner.target}.{name}"
                if path in read and _dtype_of(self._flows[read[path]]) != _dtype_of(self._flows[value]):
                    yield path

    def _is_unsure(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and node.target in self._unsure

    def _boundary(self, node: fx.Node, blank: Decision) -> Decision:
        if node.op == "placeholder":
            return blank.but(output=UNKNOWN, reason="model input")
        if node.op == "get_attr":
            value = self._attribute(str(node.target))
            if self._is_unsure(node):
                return blank.but(output=UNKNOWN)
            return blank.but(output=NOT_A_TENSOR if isinstance(value, nn.Module) else of_object(value))
        blank = blank.but(inputs=tuple(self._flows[n] for n in argument_nodes(node)), state=self._ambient)
        placed = self._placed.get(node.name)
        return blank.but(casts=self._chosen_casts(node, blank, placed.wants), state=None) if placed else blank

    def _decide_call(self, node: fx.Node, call: Call) -> Decision:
        inputs = tuple([self._flows[n] for n in argument_nodes(node)])
        if node.target in _REFLECTED and inputs[0] == NOT_A_TENSOR:
            call = replace(call, aten=_REFLECTED[node.target])
        where: Any = {"module": node.meta["module"], "source": node.meta["source"], "inputs": inputs}
        if call.steering:
            return Decision(node.name, call.op, call.aten, output=UNKNOWN if call.holds else NOT_A_TENSOR, **where)
        if not tensors_in(inputs) and (call.aten or isinstance(node.target, BuiltinFunctionType)):
            output = self._result(node, call, inputs, ())  # nothing that could be cast
            return Decision(node.name, call.op, call.aten, output=output, **where)
        state = self._state(node.meta["regions"])
        ruling = self._rules.ruling(node, call, state)
        decision = Decision(node.name, call.op, call.aten, ruling.rule, ruling.reason, state=state, **where)
        if node.name in self._placed:
            return self._as_placed(node, call, decision, self._placed[node.name])
        if ruling.rule == "opaque" or (not call.aten and self._rules.overridden(node) and not call.inplace):
            return self._ambient_call(node, decision)
        if ruling.rule == "banned":
            raise banned(decision)
        if ruling.rule == "fp32_dtype":
            return self._through_dtype(node, call, decision)
        return self._through_casts(node, call, decision)

    def _as_placed(self, node: fx.Node, call: Call, decision: Decision, placed: Placed) -> Decision:
        """The call with its inputs in the dtypes that were chosen."""
        opaque = decision.rule == "opaque"
        if opaque:
            decision = self._ambient_call(node, decision)
        casts = self._chosen_casts(node, decision, placed.wants, share=not call.views)
        decision = decision.but(rule=placed.rule, reason=placed.reason, casts=casts)
        if opaque:
            return decision
        cast_inputs = computed_with(decision, casts)
        targets = {cast.slot: cast.dtype for cast in casts}
        inputs = tuple(
            replace(flow, dtype=targets[slot]) if slot in targets and isinstance(flow, Value) else flow
            for slot, flow in enumerate(decision.inputs)
        )
        output = self._result(node, call, inputs, cast_inputs)
        return decision.but(runs_in=computes_in(None, cast_inputs, output), output=output)

    def _chosen_casts(
        self, node: fx.Node, decision: Decision, wants: Sequence[torch.dtype | None], *, share: bool = True
    ) -> tuple[Cast, ...]:
        """The casts of the inputs that are wanted in another dtype than they have."""
        chosen = [(slot, target) for slot, target in enumerate(wants) if target is not None]
        found = (self._casts(node, target, decision, share=share, slots=(slot,)) for slot, target in chosen)
        return tuple(cast for casts in found for cast in casts)

    def _state(self, regions: tuple[Region, ...]) -> AutocastState:
        if regions not in self._states:
            self._states[regions] = state_of(regions, self._device_type, self._ambient)
        return self._states[regions]

    def _ambient_call(self, node: fx.Node, decision: Decision) -> Decision:
        """A call that cannot be seen into: autocast decides inside it, at run time."""
        assert decision.state is not None
        enabled = decision.rule not in ("fp32", "follow")
        casts = self._casts(node, torch.float32, decision, share=False) if decision.rule == "fp32" else ()
        if enabled:
            self.sharing.note_ambient(node, decision.inputs)
        output = Value(_AUTOCAST_GIVES.get(decision.aten)) if enabled else UNKNOWN
        state = replace(decision.state, enabled=enabled)
        return decision.but(how="ambient" if enabled else "call", casts=casts, state=state, output=output)

    def _through_dtype(self, node: fx.Node, call: Call, decision: Decision) -> Decision:
        """Float32 through the operator's own ``dtype=``, where it may be cast and the user gives none."""
        first = next((flow for flow in decision.inputs if tensors_in(flow)), NOT_A_TENSOR)
        dtype = first.dtype if isinstance(first, Value) else None
        decision = decision.but(rule="fp32")
        if not gives_dtype(node):
            if dtype is None:
                return decision.but(how="dtype if castable", output=UNKNOWN)
            if is_castable(dtype):
                return decision.but(how="dtype", runs_in=torch.float32, output=Value(torch.float32))
        else:
            decision = decision.but(rule="follow", reason="its own dtype=")
        output = self._result(node, call, decision.inputs, tensors_in(decision.inputs))
        return decision.but(runs_in=output.dtype if isinstance(output, Value) else None, output=output)

    def _through_casts(self, node: fx.Node, call: Call, decision: Decision) -> Decision:
        target, how = self._target(node, decision)
        casts = self._casts(node, target, decision, share=not call.views) if target is not None else ()
        cast_inputs = computed_with(decision, casts)
        output = self._result(node, call, decision.inputs, cast_inputs)
        runs_in = computes_in(target, cast_inputs, output)
        return decision.but(casts=casts, how=how, runs_in=runs_in, output=output)

    def _target(self, node: fx.Node, decision: Decision) -> tuple[torch.dtype | None, str]:
        """The dtype that all tensor inputs are cast to, or None for no casts, and how to call."""
        assert decision.state is not None
        low = decision.state.dtype
        if decision.rule == "lower":
            return low, "call"
        if decision.rule == "fp32":
            return torch.float32, "call"
        promotes = decision.rule == "promote"
        dtypes = eligible(node, decision) if promotes else castable(tensors_in(decision.inputs))
        if not promotes and not (len(set(dtypes)) > 1 and self._rules.may_meet(decision)):
            return None, "call"
        if promotes and decision.reason == "op table" and None not in dtypes and not promotable(dtypes, low):
            if decision.aten not in FORWARDS_TO[self._device_type]:
                raise unexpected(decision, dtypes)
            return None, "promote"  # where it does not come to that, nothing is refused
        if torch.float32 in dtypes and (promotes or None not in dtypes):
            return torch.float32, "call"
        return (low, "call") if set(dtypes) <= {low} else (None, "promote")

    def _casts(
        self,
        node: fx.Node,
        target: torch.dtype,
        decision: Decision,
        *,
        share: bool = True,
        slots: Sequence[int] | None = None,
    ) -> tuple[Cast, ...]:
        """The casts of the inputs of a call, or of some of them, to one dtype."""
        assert decision.state is not None
        casts = []
        for slot, (source, flow) in enumerate(zip(argument_nodes(node), decision.inputs, strict=True)):
            if slots is not None and slot not in slots:
                continue
            wanted = [v.dtype for v in tensors_in(flow) if v.dtype is None or casts_to(v.dtype, target)]
            if wanted:
                soft = None in wanted or not isinstance(flow, Value)
                cast = Cast(slot, source.name, target, soft)
                casts.append(self.sharing.cast(cast, source, decision.state, share=share))
        return tuple(casts)

    def _result(self, node: fx.Node, call: Call, inputs: tuple[Flow, ...], cast_inputs: tuple[Value, ...]) -> Flow:
        return result_of(node, call.aten, inputs, cast_inputs, self._flows.__getitem__)


def _dtype_of(flow: Flow) -> torch.dtype | None:
    return flow.dtype if isinstance(flow, Value) else None
