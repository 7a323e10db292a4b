"""Which calls may run in either dtype, and which must run in float32?

Operators of the fast table are free where nothing else decides: no override, no region of the user's, no write to what
they give, nobody who asks for the dtype of it. Dangerous ones are not, nor one that is given what must not be rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import fx

from fxamp.capture import AutocastState
from fxamp.plan.calls import Call
from fxamp.plan.cut import HIGH, LOW
from fxamp.plan.decision import Decision
from fxamp.plan.flow import Flow, Value, tensors_in
from fxamp.plan.precise import Precise
from fxamp.plan.results import USER_CASTS
from fxamp.policy.fast import is_choice, moves_only

__all__ = ["Freedom", "Step"]


class Step(NamedTuple):
    """A node, what it calls, and what autocast's rules decide about it."""

    node: fx.Node
    call: Call | None
    decision: Decision
    written: bool  # whether its memory may be written to: no copy may stand for it


class Freedom:
    """What each call of a graph may do.

    Args:
        steps: the graph, in order.
        state: of autocast, outside of regions.
        kinds: of the operators in the fast table.
        precise: tells what must not be rounded.
        time_of: an operator of rule "lower" in float32 and in the low dtype, when that is known.

    Attributes:
        free: calls that run in either dtype, by their kind: one of the table's, "view" or "lower".
        forced: calls that run in float32.
        times: what ``time_of`` told.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        state: AutocastState,
        kinds: Mapping[str, str],
        precise: Precise,
        time_of: Callable[[fx.Node, Decision], tuple[int, int] | None],
    ) -> None:
        self.steps = {step.node: step for step in steps}
        self.free: dict[fx.Node, str] = {}
        self.forced: set[fx.Node] = set()
        self.times: dict[fx.Node, tuple[int, int]] = {}
        self._state = state
        self._kinds = kinds
        self._precise = precise
        self._time_of = time_of
        for step in steps:
            self._read(step)
        self._drop_torn_tuples()

    def is_dangerous(self, node: fx.Node) -> bool:
        """Whether a call runs in float32 for what it is, and not for what it is given."""
        return self._kind(self.steps[node]) == "fp32"

    def _read(self, step: Step) -> None:
        kind = self._kind(step)
        self._precise.read(step.node, step.call, step.decision, kind)
        if kind == "lower" or (kind not in (None, "fp32") and not self._keeps_float32(step, str(kind))):
            self.free[step.node] = str(kind)
        elif kind is not None and step.decision.rule in ("follow", "promote"):
            self.forced.add(step.node)

    def _keeps_float32(self, step: Step, kind: str) -> bool:
        precise = step.node in self._precise or self._precise.comes_in(step.node, step.decision)
        return precise or self._precise.has_number_out_of_range(step.node, kind)

    def _kind(self, step: Step) -> str | None:
        """What a call is when its dtype may be chosen: one of the table's kinds, "view" or "lower"."""
        node, call, decision, written = step
        if call is None or call.steering or call.inplace or call.holds or written or decision.state != self._state:
            return None
        if any(self._takes_it_as_it_is(user, node) for user in node.users):
            return None
        if decision.reason not in ("op table", "input dtype") or not is_choice(node.args, node.kwargs):
            return None
        if not all(map(self._is_either, decision.inputs)) or not self._is_either(decision.output):
            return None
        if not any(map(self.side, decision.inputs)) or self.side(decision.output) is None:
            return None
        if decision.rule == "lower":
            times = self._time_of(node, decision)
            if times is not None:
                self.times[node] = times
            return "lower" if times is not None else None
        by_index = call.aten == "getitem" and len(node.all_input_nodes) > 1
        found = self._kinds.get("index" if by_index else call.aten)
        if found is not None or by_index:
            return found
        return "view" if call.aten in _VIEWS or moves_only(call.aten) else None

    def _takes_it_as_it_is(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether a use of a value is told its dtype, or is a write, of which nothing is cast."""
        call = self.steps[user].call
        if call is not None and call.steering:
            return user.target in _DTYPE_READS or (user.target is getattr and user.args[1] in _DTYPE_NAMES)
        return call is not None and (call.inplace or (call.aten in USER_CASTS and user.args[0] is not node))

    def _is_either(self, flow: Flow) -> bool:
        """Whether a value can be cast from one of the two dtypes to the other, or is not touched by casts."""
        return all(
            value.dtype in (torch.float32, self._state.dtype) or (value.dtype and not value.dtype.is_floating_point)
            for value in tensors_in(flow)
        )

    def side(self, flow: Flow) -> str | None:
        """The side that a value is on, when it is a tensor, or tensors, of one of the two dtypes."""
        found = {value.dtype for value in tensors_in(flow)} & {torch.float32, self._state.dtype}
        if len(found) != 1:
            return None
        return HIGH if found.pop() == torch.float32 else LOW

    def _drop_torn_tuples(self) -> None:
        """A tuple cannot be cast: it is free when all its parts are, which then are on its side."""
        for node in [node for node in self.free if not isinstance(self.steps[node].decision.output, Value)]:
            calls = [(user, call) for user in node.users if (call := self.steps[user].call) and not call.steering]
            if not all(user in self.free and call.aten == "getitem" for user, call in calls):
                del self.free[node]
        for node in list(self.free):
            if self.takes_a_part(node) and node.all_input_nodes[0] not in self.free:
                del self.free[node]

    def takes_a_part(self, node: fx.Node) -> bool:
        """Whether it is ``values[i]`` of a tuple."""
        step = self.steps[node]
        inputs = step.decision.inputs
        return step.call is not None and step.call.aten == "getitem" and not isinstance(inputs[0], Value)

    def is_one(self, flow: Flow) -> bool:
        """Whether a value is one tensor of one of the two dtypes."""
        return isinstance(flow, Value) and self.side(flow) is not None


_DTYPE_READS: Final = frozenset(
    {torch.finfo, torch.can_cast, torch.is_floating_point, torch.promote_types, torch.result_type}
) | {"element_size", "is_floating_point"}
_DTYPE_NAMES: Final = frozenset({"dtype", "itemsize", "nbytes"})
# Views by the argument's kind, or that copy only when they have to.
_VIEWS: Final = frozenset("getitem alias contiguous reshape flatten detach chunk split unbind".split())
