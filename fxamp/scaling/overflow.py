"""What is there to say about a step that was skipped?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import fx

from fxamp.capture.members import find
from fxamp.dtypes import LOW_DTYPES, abbreviate
from fxamp.plan import Decision
from fxamp.scaling.gradients import is_finite, is_spread, named_parameters
from fxamp.scaling.search import origin_of
from fxamp.scaling.sights import Origin
from fxamp.scaling.trail import Call, Trail, trails

__all__ = ["Overflow", "explain"]

_SHOWN_PARAMETERS: Final = 8
_ELSEWHERE: Final = (
    "run again on this rank, all of it is finite: it came from another rank, from a hook, or from code between "
    "backward and step"
)
_HOOK: Final = "the gradients of all calls are finite: a hook on '{}' made it"
_WRITTEN: Final = "\nan input was written to since the call, so this may be another value"
_NOTES: Final = {  # by how the value came about
    "given": "{what} is not finite when it comes in: look at what makes it",
    "made": "{before}",
    "cast": "{what} does not fit when it is cast; {before}",
    "summed": "{before}; the gradients of several uses add up to it, or a hook made it",
}
_SPREAD: Final = "each rank has a part of the parameters, so no rank can run the call again on its own"
_NOTHING: Final = "the gradients of this rank are finite: another rank's were not"
_CLEARED: Final = "non-finite gradients, cleared since: call overflow() between step() and zero_grad()"


@dataclass(frozen=True)
class Overflow:
    """What is known about a step that was skipped; ``print`` it.

    Args:
        parameters: the parameters whose gradient is not finite now, by name where a name is known.
        phase: where the first value appeared that is not finite: in the "forward" or in the "backward" pass; "" when
            that is not known, and then what follows is not known either.
        node: of the converted graph, as in ``amp.report()``.
        op: its call.
        module: where it is made, by its path in the model.
        source: file and line.
        value: "inf" or "nan".
        dtype: of that value.
        largest: the largest finite magnitude among what it was made from.
        overrides: what to give to ``policy.with_modules``, or to ``policy.with_ops`` where the call is in no submodule,
            so that it is made in float32; empty when that would not help, or nothing is known.
        note: the rest, in words.

    Example::

        >>> print(Overflow(("encoder.weight", "head.bias")))
        non-finite gradients in 2 parameters: encoder.weight, head.bias
    """

    parameters: tuple[str, ...] = ()
    phase: str = ""
    node: str = ""
    op: str = ""
    module: str = ""
    source: str = ""
    value: str = ""
    dtype: torch.dtype | None = None
    largest: float | None = None
    overrides: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    note: str = ""

    def __str__(self) -> str:
        return "\n".join(line for line in (self._where(), self.note, self._override(), self._gradients()) if line)

    def __getstate__(self) -> dict[str, Any]:
        # Ranks send their reports to each other, and a mapping proxy cannot be pickled.
        return vars(self) | {"overrides": dict(self.overrides)}

    def _where(self) -> str:
        if not self.phase:
            return ""
        of = f", in {self.module}" if self.module else ""
        at = f", {self.source}" if self.source else ""
        dtype = f" in {abbreviate(self.dtype)}" if self.dtype is not None else ""
        value = f"{self.value}{dtype}" if self.value else "a gradient"
        title = "first non-finite value" if self.value else "the last call whose parameters it reached"
        return f"{title}: {value} in the {self.phase} pass of '{self.node}' ({self.op}{of}{at})"

    def _override(self) -> str:
        if not self.overrides:
            return ""
        method = "with_modules" if self.module else "with_ops"
        return f"to compute it in float32: amp.replan(amp.policy.{method}({dict(self.overrides)}))"

    def _gradients(self) -> str:
        if not self.parameters:
            return "" if self.note or self.phase else _CLEARED
        shown, hidden = self.parameters[:_SHOWN_PARAMETERS], self.parameters[_SHOWN_PARAMETERS:]
        count = f"{len(self.parameters)} parameter{'s' if len(self.parameters) > 1 else ''}"
        more = f" and {len(hidden)} more" if hidden else ""
        return f"non-finite gradients in {count}: {', '.join(shown)}{more}"


def explain(optimizer: torch.optim.Optimizer | None, span: range) -> Overflow:
    """What can be said of the last step of an optimizer, that was skipped, with gradients of these iterations."""
    if optimizer is None:
        return Overflow()
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    known = [trail for trail in trails() if not owned.isdisjoint(map(id, trail.module.parameters()))]
    named = list(named_parameters(optimizer, [trail.module for trail in known]))
    bad = {name: p for name, p in named if p.grad is not None and not is_finite(p.grad)}
    whole = [trail for trail in trails() if not any(map(is_spread, trail.module.parameters()))]
    failures: list[str] = []
    calls = [(trail, call) for trail in whole if trail in known for call in trail.calls_of(span)]
    origins = list(_origins(calls, failures))
    if all(origin.is_outside for origin, *_ in origins) and (origins or not calls):
        others = [(trail, call) for trail in whole if trail not in known for call in trail.calls_of(span)]
        found = _origins((pair for pair in others if _is_between(*pair, calls)), failures)
        origins += [made for made in found if not made[0].is_outside]
    if origins:
        origin, trail, call = _first(origins)
        told = _of_hook(origin, trail, span) if origin.how == "hooked" else _of_call(origin, call.variant)
        return replace(told, parameters=tuple(bad), note=told.note + _WRITTEN * call.was_written_to())
    failed = failures[-1] if failures else ""
    if not bad:
        return Overflow(note=failed or (_NOTHING if any(p.grad is not None for _, p in named) else ""))
    told = _of_parameters(known, span, {id(parameter) for parameter in bad.values()})
    otherwise = _ELSEWHERE if all(trail in whole for trail in known) else _SPREAD
    return replace(told, parameters=tuple(bad), note=failed or (otherwise if told.phase else ""))


def _origins(calls: Iterable[tuple[Trail, Call]], failures: list[str]) -> Iterator[tuple[Origin, Trail, Call]]:
    """Those of these calls, in their order; it ends with the first that a call itself made."""
    for trail, call in sorted(calls, key=lambda pair: pair[1].number):
        try:
            origin = origin_of(trail.module, call)
        except Exception as error:  # of the model's own code, or of tensors that are elsewhere by now
            failures.append(f"the call could not be run again: {type(error).__name__}: {error}".partition("\n")[0])
            continue
        if origin is not None:
            yield origin, trail, call
            if not origin.is_outside:
                return


def _is_between(trail: Trail, call: Call, calls: list[tuple[Trail, Call]]) -> bool:
    """Whether a call of what is not trained may have made it: of the judge of a generator, or of a loss function."""
    if not calls:
        return next(trail.module.parameters(), None) is None
    return any(not call.tasks.isdisjoint(other.tasks) for _, other in calls)


def _first(origins: list[tuple[Origin, Trail, Call]]) -> tuple[Origin, Trail, Call]:
    """The one that a call made; else the first input, or the last output, for gradients come from there."""
    made = [found for found in origins if not found[0].is_outside]
    forward = [found for found in origins if found[0].phase == "forward"]
    return (made or forward or origins[::-1])[0]


def _of_call(origin: Origin, variant: Any) -> Overflow:
    node, how = origin.node, origin.how
    if origin.phase == "backward" and how == "cast":  # the gradient is cast to the dtype of what was cast
        node = node.all_input_nodes[0]
    decision = variant.plan[node.meta.get("for", node.name)]
    place = decision.module or (f"aten::{decision.aten}" if decision.aten else "")
    low = origin.dtype in LOW_DTYPES and how in ("made", "cast", "summed")
    proposes = low and origin.fits is not False and place and decision.rule != "fp32"
    note = _NOTES[how].format(before=_before(origin), what=_what(origin))
    if origin.fits is False:
        note += "\nin float32 it is not finite either: look at what the call computes"
    if low and origin.phase == "backward":
        note += "\na smaller scale may be all it takes, and update() sees to that"
    return Overflow(
        phase=origin.phase,
        **_place(decision),
        value="nan" if origin.nan else "inf",
        dtype=origin.dtype,
        largest=origin.largest,
        overrides=MappingProxyType({place: "fp32"} if proposes else {}),
        note=note,
    )


def _of_hook(origin: Origin, trail: Trail, span: range) -> Overflow:
    parameter = trail.module._root.get_parameter(origin.tensor)
    found = _of_parameters([trail], span, {id(parameter)})
    return replace(found, value="nan" if origin.nan else "inf", dtype=origin.dtype, note=_HOOK.format(origin.tensor))


def _of_parameters(known: Iterable[Trail], span: range, parameters: set[int]) -> Overflow:
    """Of the last call that uses one of these parameters, whose gradients are not finite."""
    for trail in known:
        for call in trail.calls_of(span)[-1:]:
            nodes: dict[fx.Node, None] = {}
            for node in call.variant.traced.graph.nodes:
                if node.op == "get_attr" and id(find(trail.module._root, str(node.target))) in parameters:
                    nodes.update(dict.fromkeys(node.users))
                elif node.op == "call_module":
                    module = find(trail.module._root, str(node.target))
                    if not parameters.isdisjoint(map(id, module.parameters())):
                        nodes[node] = None
            if nodes:
                return Overflow(phase="backward", **_place(call.variant.plan[max(nodes).name]))
    return Overflow()


def _place(decision: Decision) -> Any:
    return {"node": decision.name, "op": decision.op, "module": decision.module, "source": decision.source}


def _before(origin: Origin) -> str:
    ends = ""
    if origin.dtype is not None and origin.dtype.is_floating_point:
        ends = f"; {abbreviate(origin.dtype)} ends at {torch.finfo(origin.dtype).max:g}"
    return f"finite before it: up to {origin.largest:g}{ends}"


def _what(origin: Origin) -> str:
    if origin.how == "cast":
        return "its input" if origin.phase == "forward" else "its gradient"
    if origin.tensor:
        return f"'{origin.tensor}' of the model"
    return "an input of the model" if origin.phase == "forward" else "the gradient of the output"
