"""Which dtypes do calls give back, as it was told when the graph was captured?"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx

from fxamp.capture.arguments import map_leaves
from fxamp.capture.dynamo_graph import Told
from fxamp.dtypes import is_castable
from fxamp.plan.decision import Decision
from fxamp.plan.flow import NOT_A_TENSOR, Flow, Value
from fxamp.plan.trials import check_numbers
from fxamp.policy import Policy

__all__ = ["RecordedObserver"]


class RecordedObserver:
    """Tells what Dynamo found.

    Args:
        policy: that is planned for.
        under_autocast: whether the graph was captured under the autocast of the policy. If not, or if the policy
            decides otherwise than autocast, only what comes in is told.
    """

    def __init__(self, policy: Policy, *, under_autocast: bool) -> None:
        self._exact = under_autocast and policy.name == "autocast" and not policy.ops and not policy.modules
        self._forgotten = False

    def flow(self, node: fx.Node, decision: Decision) -> Flow | None:
        """The flow of the node's value, or None when it was not told."""
        _check_numbers(node, decision)
        if "told" not in node.meta or not (node.op == "placeholder" or (self._exact and not self._forgotten)):
            return None
        return _flow_of(node.meta["told"])

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """Not told."""
        return None

    def forget(self, node: fx.Node) -> None:
        """The value of a node is not to be told, nor what follows from it."""
        self._forgotten = True


def _check_numbers(node: fx.Node, decision: Decision) -> None:
    """As for fake tensors, with what flows into the call in their place."""
    if decision.how != "call" or not decision.aten or not all(map(_is_known, decision.inputs)):
        return
    casts = {cast.slot: cast.dtype for cast in decision.casts}
    slots = itertools.count()

    def argument(source: fx.Node) -> Any:
        slot = next(slots)
        flow = decision.inputs[slot]
        if not isinstance(flow, Value):
            return None
        assert flow.dtype is not None
        dtype = casts.get(slot, flow.dtype) if is_castable(flow.dtype) else flow.dtype
        return torch.empty((1,) * (flow.rank or 0), dtype=dtype, device="meta")

    check_numbers(node, decision, *map_leaves((node.args, node.kwargs), fx.Node, argument))


def _is_known(flow: Flow) -> bool:
    return not isinstance(flow, Value) or (flow.dtype is not None and flow.rank is not None)


def _flow_of(found: Any) -> Flow:
    if isinstance(found, Told):
        return Value(found.dtype, found.rank == 0, found.rank)
    flows = tuple(_flow_of(item) for item in found)
    return flows if any(flow != NOT_A_TENSOR for flow in flows) else NOT_A_TENSOR
