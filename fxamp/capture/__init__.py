"""Model and loss to a graph of calls that each reach one ATen operator."""

from fxamp.capture.calls import AutogradFunctionCall, assign
from fxamp.capture.program import Program, Traced
from fxamp.capture.regions import AutocastState, Region, state_of
from fxamp.capture.signature import CallSignature, Layout, Slot, values_of

__all__ = [
    "AutocastState",
    "AutogradFunctionCall",
    "CallSignature",
    "Layout",
    "Program",
    "Region",
    "Slot",
    "Traced",
    "assign",
    "state_of",
    "values_of",
]
