"""What does planning ask of others?"""

from __future__ import annotations

from typing import Protocol

from torch import fx

from fxamp.plan.decision import Decision
from fxamp.plan.flow import Flow

__all__ = ["Costs", "Observer"]


class Observer(Protocol):
    """Runs a planned call on fake tensors, so that dtypes are known and not derived."""

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """The shape of a node's value, when it is one tensor and known."""

    def flow(self, node: fx.Node, decision: Decision) -> Flow | None:
        """The flow of the node's value, or None when it could not be told."""

    def forget(self, node: fx.Node) -> None:
        """Tell nothing of the node's value."""


class Costs(Protocol):
    """What things cost, in whole numbers of one unit."""

    def cast(self, size: int, *, weight: bool) -> int:
        """A cast of so many elements; those of weights are few calls for all."""

    def moved(self, size: int, width: int) -> int:
        """An operator that reads and writes so many elements of so many bytes each."""

    def call(self, node: fx.Node, decision: Decision) -> tuple[int, int] | None:
        """An operator of rule "lower" in float32 and in the low dtype, or None when it is not known."""
