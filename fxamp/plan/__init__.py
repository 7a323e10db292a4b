"""Graph and policy to a ``PrecisionPlan``; nothing here changes a graph."""

from fxamp.plan.calls import Call, argument_keys, argument_nodes, nodes_in, read_call
from fxamp.plan.decision import Cast, Decision, PrecisionPlan
from fxamp.plan.flow import NOT_A_TENSOR, UNKNOWN, Flow, Tensors, Value, of_object, tensors_in
from fxamp.plan.planner import make_plan
from fxamp.plan.protocols import Observer

__all__ = [
    "NOT_A_TENSOR",
    "UNKNOWN",
    "Call",
    "Cast",
    "Decision",
    "Flow",
    "Observer",
    "PrecisionPlan",
    "Tensors",
    "Value",
    "argument_keys",
    "argument_nodes",
    "make_plan",
    "nodes_in",
    "of_object",
    "read_call",
    "tensors_in",
]
