"""Model and loss to a graph of calls that each reach one ATen operator."""

from fxamp.capture.calls import AutogradFunctionCall, assign
from fxamp.capture.program import Program
from fxamp.capture.regions import AutocastState, Region, state_of
from fxamp.capture.setting import Ambient, Setting, Traced, grad_mode
from fxamp.capture.signature import CallSignature, Layout, Slot, values_of

__all__ = [
    "Ambient",
    "AutocastState",
    "AutogradFunctionCall",
    "CallSignature",
    "Layout",
    "Program",
    "Region",
    "Setting",
    "Slot",
    "Traced",
    "assign",
    "grad_mode",
    "state_of",
    "values_of",
]
