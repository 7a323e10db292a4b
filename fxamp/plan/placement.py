"""In which dtype does each call run that could run in either, so that the fewest bytes move?

Reads a graph and what autocast's rules decide about it. Operators of the fast table are free to run in float32 or in
the low dtype; so is an operator of rule ``lower`` when its time in both is known. Everything else stays as it was
decided, and is given what it was given. A minimum cut finds what costs least; that becomes which inputs are cast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import fx

from fxamp.capture import AutocastState
from fxamp.dtypes import abbreviate
from fxamp.plan.calls import argument_nodes
from fxamp.plan.computing import stay_float32
from fxamp.plan.cut import HIGH, LOW, NEVER, Problem
from fxamp.plan.decision import Decision
from fxamp.plan.flow import Flow, Value
from fxamp.plan.freedom import Freedom, Step
from fxamp.plan.precise import Precise
from fxamp.plan.protocols import Costs
from fxamp.policy.fast import MOST_ROWS, adds_up_rows, fast_kinds
from fxamp.policy.flow import output_kind

__all__ = ["Moved", "Placed", "place"]


class Placed(NamedTuple):
    """Where a call runs: the dtype that each input is wanted in, None where it is as it is; and why."""

    wants: tuple[torch.dtype | None, ...]
    rule: str
    reason: str


class Moved:
    """Bytes: what a cast reads and writes, and what an operator does; a cast of its own is a call beside."""

    CALL: Final = 1 << 14

    def cast(self, size: int, *, weight: bool) -> int:
        return 6 * size + (0 if weight else self.CALL)

    def moved(self, size: int, width: int) -> int:
        return size * width

    def call(self, node: fx.Node, decision: Decision) -> tuple[int, int] | None:
        return None


def place(
    steps: Sequence[Step],
    state: AutocastState,
    device_type: str,
    *,
    attribute: Callable[[str], Any],
    size_of: Callable[[fx.Node], int | None],
    costs: Costs,
) -> dict[str, Placed]:
    """Name of a call to where it runs, for each that is to run otherwise than it was decided.

    Args:
        steps: the graph, in order.
        state: of autocast, outside of regions.
        device_type: whose kernels run.
        attribute: path to the parameter, buffer, tensor or module of that name.
        size_of: how many elements a value has, or None when that is not known.
        costs: of casts and calls.
    """
    kinds = fast_kinds(device_type)  # a backward may follow in eval mode too
    precise = Precise(attribute, state.dtype, device_type)
    freedom = Freedom(steps, state, kinds, precise, costs.call)
    return _Placer(freedom, state.dtype, device_type, costs, size_of).placed()


class _Placer:
    def __init__(
        self,
        freedom: Freedom,
        dtype: torch.dtype,
        device_type: str,
        costs: Costs,
        size_of: Callable[[fx.Node], int | None],
    ) -> None:
        self._freedom = freedom
        self._low = dtype
        self._device_type = device_type
        self._costs = costs
        self._known_size = size_of

    # -- what it costs -----------------------------------------------------------------------------

    def placed(self) -> dict[str, Placed]:
        """Where each call runs that is to run otherwise than it was decided."""
        problem = Problem()
        for node, kind in self._freedom.free.items():
            problem.call(node.name, *self._call_costs(node, kind))
            if self._freedom.takes_a_part(node):
                problem.tie(node.name, node.all_input_nodes[0].name)
        for step in self._freedom.steps.values():
            for source, wanted in self._needs(step):
                producer = self._producer(source)
                if producer is not None and (producer in problem.costs or wanted in problem.costs):
                    weight = source.op == "get_attr"
                    problem.value(producer, self._costs.cast(self._size_of(source), weight=weight), wanted, source.name)
        sides = problem.solve() if problem.costs else {}
        return dict(self._outcome({**sides, HIGH: HIGH, LOW: LOW}))

    def _size_of(self, node: fx.Node) -> int:
        return self._known_size(node) or _NOMINAL_SIZE

    def _call_costs(self, node: fx.Node, kind: str) -> tuple[int, int]:
        """In float32, and in the low dtype."""
        if kind == "view":
            return 0, 0
        decision = self._freedom.steps[node].decision
        found = self._freedom.times.get(node) or self._costs.call(node, decision)
        if found is None:
            flows = zip(argument_nodes(node), decision.inputs, strict=True)
            size = self._size_of(node) + sum(
                self._size_of(source) for source, flow in flows if self._freedom.side(flow)
            )
            found = self._costs.moved(size, 4), self._costs.moved(size, 2)
        return (found[0], NEVER) if self._adds_up_too_much(node, decision.aten) else found

    def _adds_up_too_much(self, node: fx.Node, aten: str) -> bool:
        """Whether the gradients of an operator's weights would be added up in the low dtype, over too many rows."""
        if not adds_up_rows(aten, self._device_type):
            return False
        sizes = [self._known_size(source) for source in argument_nodes(node)[:2]]
        return len(sizes) == 2 and None not in sizes and sizes[0] > MOST_ROWS * sizes[1]  # type: ignore[operator]

    def _producer(self, node: fx.Node) -> str | None:
        """Where a value comes from: a free call, or a side."""
        if node in self._freedom.free:
            return node.name
        output = self._freedom.steps[node].decision.output
        if node in self._freedom.forced:
            return HIGH if self._freedom.side(output) else None
        return self._freedom.side(output) if isinstance(output, Value) else None

    def _needs(self, step: Step) -> Iterator[tuple[fx.Node, str]]:
        """Each input that must be in the dtype of a call, or of a side."""
        node, decision = step.node, step.decision
        if node in self._freedom.free:
            slots = zip(argument_nodes(node), decision.inputs, self._stay_float32(node), strict=True)
            yield from (
                (source, node.name) for source, flow, stays in slots if not stays and self._freedom.is_one(flow)
            )
            return
        for source, wanted in zip(argument_nodes(node), self._wanted(step), strict=True):
            if wanted is not None:
                yield source, HIGH if wanted == torch.float32 else LOW

    def _stay_float32(self, node: fx.Node) -> list[bool]:
        return stay_float32(node, self._freedom.steps[node].decision.aten, self._device_type)

    def _wanted(self, step: Step) -> list[torch.dtype | None]:
        """The dtypes that a call which is not free wants its inputs in."""
        decision = step.decision
        if step.node in self._freedom.forced:
            return [torch.float32 if self._freedom.is_one(flow) else None for flow in decision.inputs]
        if decision.how in _BY_ITSELF or (step.call is not None and step.call.steering):
            return [None] * len(decision.inputs)
        if step.node.op == "output":
            flows = zip(argument_nodes(step.node), decision.inputs, strict=True)
            return [flow.dtype if self._is_given_out(source, flow) else None for source, flow in flows]  # type: ignore[union-attr]
        casts = {cast.slot: cast.dtype for cast in decision.casts}
        return [
            casts.get(slot, flow.dtype) if isinstance(flow, Value) and self._freedom.is_one(flow) else None
            for slot, flow in enumerate(decision.inputs)
        ]

    def _is_given_out(self, source: fx.Node, flow: Flow) -> bool:
        """Whether an output is to have the dtype that autocast gives it; what is not safe in that stays as it is."""
        return self._freedom.is_one(flow) and source not in self._freedom.forced

    # -- what comes of it --------------------------------------------------------------------------

    def _outcome(self, sides: Mapping[str, str]) -> Iterator[tuple[str, Placed]]:
        for step in self._freedom.steps.values():
            node, decision = step.node, step.decision
            sources = argument_nodes(node)
            if not sources or (step.call is not None and step.call.steering):
                continue
            given = [self._dtype_of(self._producer(source), sides) for source in sources]
            chosen = node in self._freedom.free or node in self._freedom.forced
            wants = self._chosen(step, sides.get(node.name, HIGH), given) if chosen else self._wanted(step)
            needed = {i: want for i, want in enumerate(wants) if want is not None and given[i] not in (None, want)}
            as_decided = needed == {cast.slot: cast.dtype for cast in decision.casts} and decision.how == "call"
            by_itself = decision.how in _BY_ITSELF and sides.get(node.name) != LOW
            if self._is_against_its_rule(node, decision, sides) or (
                not as_decided and not by_itself and (chosen or self._is_to_be_restored(step, given))
            ):
                yield node.name, Placed(tuple(wants), *self._words(step, sides, needed))

    def _is_against_its_rule(self, node: fx.Node, decision: Decision, sides: Mapping[str, str]) -> bool:
        side = sides[node.name] if node in self._freedom.free else None
        return side == {"lower": HIGH, "fp32": LOW}.get(decision.rule, "follows")

    def _is_to_be_restored(self, step: Step, given: Sequence[torch.dtype | None]) -> bool:
        """Whether a call that goes by what it is given is given other dtypes than it was decided for."""
        inplace = step.call is not None and step.call.inplace
        if step.decision.rule in ("lower", "fp32") or step.decision.how == "promote" or inplace:
            return False
        flows = zip(given, step.decision.inputs, strict=True)
        return any(now is not None and isinstance(flow, Value) and now != flow.dtype for now, flow in flows)

    def _dtype_of(self, producer: str | None, sides: Mapping[str, str]) -> torch.dtype | None:
        if producer is None:
            return None
        return torch.float32 if sides[producer] == HIGH else self._low

    def _chosen(self, step: Step, side: str, given: Sequence[torch.dtype | None]) -> list[torch.dtype | None]:
        node, inputs = step.node, step.decision.inputs
        if self._freedom.takes_a_part(node):
            return [None] * len(inputs)
        if side == HIGH:
            if self._promotes(step, given):
                return [None] * len(inputs)
            return [torch.float32 if self._freedom.is_one(flow) else None for flow in inputs]
        slots = zip(inputs, self._stay_float32(node), strict=True)
        return [self._low if self._freedom.is_one(flow) and not stays else None for flow, stays in slots]

    def _promotes(self, step: Step, given: Sequence[torch.dtype | None]) -> bool:
        """Whether the operator itself computes in float32 when one of its inputs is."""
        assert step.call is not None
        if output_kind(step.call.aten, step.node.target, step.node.args, step.node.kwargs) not in _PROMOTING:
            return False
        flows = zip(given, step.decision.inputs, strict=True)
        return any(dtype == torch.float32 and isinstance(flow, Value) and flow.scalar is False for dtype, flow in flows)

    def _words(self, step: Step, sides: Mapping[str, str], needed: Mapping[int, torch.dtype]) -> tuple[str, str]:
        """The rule and the reason, for the report."""
        decision = step.decision
        low = abbreviate(self._low)
        if step.node in self._freedom.forced:
            dangerous = self._freedom.is_dangerous(step.node)
            return ("fp32", f"not safe in {low}") if dangerous else ("follow", "keeps float32")
        kind = self._freedom.free.get(step.node)
        if kind is None:
            return decision.rule, decision.reason
        if kind == "lower":
            return ("fp32", "faster in f32") if sides[step.node.name] == HIGH else (decision.rule, decision.reason)
        if decision.rule in ("fp32", "fp32_dtype") and sides[step.node.name] == LOW:
            return "follow", "float32 inside" if kind == "inside" else "fewest bytes"
        return "follow", "fewest bytes" if needed else "input dtype"


_NOMINAL_SIZE: Final = 1 << 20  # elements of a value of which nothing is known
_BY_ITSELF: Final = ("dtype", "dtype if castable")  # how an operator computes in float32 without a cast
_PROMOTING: Final = ("promote", "float_promote")
