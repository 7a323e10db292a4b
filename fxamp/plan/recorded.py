"""Which dtypes do calls give back, as it was told when the graph was captured?"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxamp.capture.dynamo_graph import Told
from fxamp.plan.decision import Decision
from fxamp.plan.flow import NOT_A_TENSOR, Flow, Value

__all__ = ["RecordedObserver"]


class RecordedObserver:
    """Tells what Dynamo found.

    Args:
        exact: whether it looked under the autocast that is planned for; else only what comes in is told.
    """

    def __init__(self, *, exact: bool) -> None:
        self._exact = exact
        self._forgotten = False

    def flow(self, node: fx.Node, decision: Decision) -> Flow | None:
        """The flow of the node's value, or None when it was not told."""
        if "told" not in node.meta or not (node.op == "placeholder" or (self._exact and not self._forgotten)):
            return None
        return _flow_of(node.meta["told"])

    def forget(self, node: fx.Node) -> None:
        """The value of a node is not to be told, nor what follows from it."""
        self._forgotten = True


def _flow_of(found: Any) -> Flow:
    if isinstance(found, Told):
        return Value(found.dtype, found.rank == 0, found.rank)
    flows = tuple(_flow_of(item) for item in found)
    return flows if any(flow != NOT_A_TENSOR for flow in flows) else NOT_A_TENSOR
