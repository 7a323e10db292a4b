"""What was decided for each call of a graph, as plain values.

A ``PrecisionPlan`` is made by planning and read by the rewriter, the verifier and the report; none of
them decides anything on its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any, Final

import torch

from fxamp.capture.regions import AutocastState
from fxamp.dtypes import abbreviate
from fxamp.errors import PlanError, nearest
from fxamp.plan.flow import NOT_A_TENSOR, Flow
from fxamp.policy import Policy

__all__ = ["Cast", "Decision", "PrecisionPlan"]


@dataclass(frozen=True, slots=True)
class Cast:
    """One input of a call that must be in another dtype.

    Attributes:
        slot: which of the call's node arguments, counted through args and kwargs in order.
        value: name of the node whose value is cast.
        dtype: what it becomes.
        soft: the value's dtype is not known: it is cast when autocast would cast it, else passed on.
        share: casts with the same non-empty key are one cast.
        leaf_only: look up at run time whether the same leaf of autograd was cast, as autocast's cache does.
        weight: the value is a parameter.
        epoch: which outermost autocast region it is in; nothing is shared between two.
        version: grows with every write that the value may have seen; nothing is shared between two.
    """

    slot: int
    value: str
    dtype: torch.dtype
    soft: bool = False
    share: str = ""
    leaf_only: bool = False
    weight: bool = False
    epoch: int = -1
    version: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """What one call of the graph does about precision.

    Attributes:
        name: the node.
        op: the call in the user's words.
        aten: the ATen operator it reaches; "" when there is none, or none is known.
        rule: "lower", "fp32", "promote", "follow", "opaque", or "" where none applies.
        reason: why, in the words of the report.
        module, source: where the call was made.
        inputs: the tensors it is given, before casts.
        runs_in: the dtype it computes in, or None when not known or not one.
        output: what it gives back.
        casts: the inputs to cast.
        how: "call" as it is, "dtype" with ``dtype=torch.float32`` added, "dtype if castable" when that
            depends on an unknown dtype, "promote" when the widest input is not known, "ambient" under
            ``torch.autocast`` with ``state``.
        seconds: what the call takes in float32 and in the low dtype, where "fast" measured it; with gradients in
            train mode.
    """

    name: str
    op: str = ""
    aten: str = ""
    rule: str = ""
    reason: str = ""
    module: str = ""
    source: str = ""
    inputs: tuple[Flow, ...] = ()
    runs_in: torch.dtype | None = None
    output: Flow = NOT_A_TENSOR
    casts: tuple[Cast, ...] = ()
    how: str = "call"
    state: AutocastState | None = None
    seconds: tuple[float, float] | None = None

    def but(self, **changes: Any) -> Decision:
        """The same with other values: ``dataclasses.replace`` without its questions, for there are many decisions."""
        return Decision(**{**dict(zip(_FIELDS, _values_of(self), strict=True)), **changes})

    def __str__(self) -> str:
        dtype = f" in {abbreviate(self.runs_in)}" if self.runs_in is not None else ""
        casts = "".join(f", casts {cast.value} to {abbreviate(cast.dtype)}" for cast in self.casts)
        return f"{self.name}: {self.op} {self.rule or 'has no rule'}{dtype} ({self.reason or 'no tensors'}){casts}"


_FIELDS: Final = tuple(field.name for field in fields(Decision))
_values_of: Final = attrgetter(*_FIELDS)


@dataclass(frozen=True)
class PrecisionPlan:
    """The decisions for one graph, in graph order.

    Example::

        >>> import fxamp
        >>> plan = fxamp.convert(torch.nn.Linear(4, 4), dtype=torch.bfloat16).plan
        >>> plan["linear"].rule, plan["linear"].reason
        ('lower', 'op table')
    """

    policy: Policy
    mode: str
    decisions: tuple[Decision, ...]

    def __getitem__(self, name: str) -> Decision:
        """The decision for the node of that name.

        Raises:
            PlanError: when the graph has no such node.
        """
        found = self._by_name.get(name)
        if found is not None:
            return found
        close = nearest(name, (decision.name for decision in self.decisions))
        hint = f"write '{close}'" if close else "print(amp.report()) lists the names"
        raise PlanError(f"the plan has no node '{name}'", hint=hint)

    @functools.cached_property
    def _by_name(self) -> dict[str, Decision]:
        return {decision.name: decision for decision in self.decisions}

    def timed(self, seconds: Mapping[str, tuple[float, float]]) -> PrecisionPlan:
        """The same plan, with what calls were measured to take."""
        return replace(self, decisions=tuple(d.but(seconds=seconds.get(d.name)) for d in self.decisions))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_by_name"}

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)
