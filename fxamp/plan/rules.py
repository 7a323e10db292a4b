"""Which rule does a call get, and why?

The order: in-place calls are left alone; an override of the module; a region the user disabled; an
override of the operator; the operator table; ``follow`` for an operator that autocast does not touch;
``opaque`` for whatever cannot be seen into.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import fx

from fxamp.capture import AutocastState
from fxamp.errors import PlanError, PolicyError
from fxamp.plan.calls import Call
from fxamp.plan.decision import Decision
from fxamp.plan.results import USER_CASTS
from fxamp.policy import Policy, Ruling
from fxamp.policy.operators import is_aten, operator_rules, transparent

__all__ = ["Rules", "banned", "check_overridable", "unexpected"]

# The user's own casts and the parts of a value are what they are, whatever the override.
_EXEMPT: Final = frozenset({"getitem", "getattr", "alias", *USER_CASTS})


class Rules:
    """The rules of one policy.

    Args:
        policy: with its device type resolved.
        rulings: module path to the override that decides for it.
    """

    def __init__(self, policy: Policy, rulings: Mapping[str, Ruling]) -> None:
        assert policy.device_type is not None
        self._policy = policy
        self._rulings = rulings
        self._device_type = policy.device_type
        self._ops = dict(policy.ops)

    def ruling(self, node: fx.Node, call: Call, state: AutocastState) -> Ruling:
        """The rule for a call in an autocast state; "opaque" when autocast has to decide inside it."""
        if call.inplace:
            return self._inplace(node, call)
        if self.overridden(node) and call.aten not in _EXEMPT:
            return self._rulings[node.meta["module"]]
        if node.meta["regions"] and not state.enabled:
            return Ruling("follow", "region enabled=False")
        if not state.enabled and call.aten not in self._ops:
            return Ruling("follow", f"policy {self._policy.name}")
        found = self._policy.operator_ruling(call.aten) if call.aten else None
        if found is not None:
            return found
        if call.aten and (call.aten in _EXEMPT or transparent(call.aten, self._device_type)):
            return Ruling("follow", "input dtype")
        return Ruling("opaque", _why_opaque(node, call))

    def _inplace(self, node: fx.Node, call: Call) -> Ruling:
        """Autocast casts nothing that is written to; but a few kernels call others, about which it decides."""
        inside = is_aten(f"{call.aten}_") and not transparent(f"{call.aten}_", self._device_type)
        if inside and not _writes_out(node):
            return Ruling("opaque", f"{call.aten}_ calls others inside")
        return Ruling("follow", "in-place")

    def overridden(self, node: fx.Node) -> bool:
        """Whether the user has an override for the module that a call was made in."""
        return node.meta["module"] in self._rulings

    def may_meet(self, decision: Decision) -> bool:
        """Whether an override can have brought two dtypes to a call that torch would not promote by itself."""
        overridden = bool(self._policy.ops or self._policy.modules) and decision.reason != "in-place"
        return overridden and operator_rules(self._device_type).get(decision.aten) == "lower"


def _writes_out(node: fx.Node) -> bool:
    return node.kwargs.get("out") is not None or node.target in (operator.setitem, "__setitem__")


def banned(decision: Decision) -> PlanError:
    """The error for an operator that autocast refuses to run."""
    dtype = decision.state.dtype if decision.state is not None else "a low dtype"
    return PlanError(
        f"{_named(decision)} is refused by torch.autocast: its result in {dtype} would not be safe",
        hint="use torch.nn.functional.binary_cross_entropy_with_logits, which takes the value before sigmoid",
    )


def unexpected(decision: Decision, dtypes: Iterable[torch.dtype | None]) -> PlanError:
    """The error for floating dtypes that autocast refuses to promote."""
    found = ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
    low = decision.state.dtype if decision.state is not None else None
    return PlanError(
        f"{_named(decision)} is refused by torch.autocast: it gets {found}, expected {low} and float32 only",
        hint="cast what is in another 16-bit dtype with .float() before it",
    )


def check_overridable(aten: str) -> None:
    """Refuses an override of an operator that no rule decides about.

    Raises:
        PolicyError: with its name.
    """
    if aten in _EXEMPT:
        raise PolicyError(
            f"the override 'aten::{aten}' is for a cast of the model's own or a part of a value: these have no rule, "
            f"they stay as they are",
            hint="override the operator that takes its result",
        )


def _named(decision: Decision) -> str:
    where = f" in module '{decision.module}'" if decision.module else ""
    return f"{decision.op} (node '{decision.name}'{where}, {decision.source})"


def _why_opaque(node: fx.Node, call: Call) -> str:
    if node.op == "call_module":
        return node.meta.get("untraceable") or "module runs as a whole"
    return f"{call.aten} calls others inside" if call.aten else "not an ATen operator"
