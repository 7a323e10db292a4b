"""Mixed precision as a torch.fx pass: decide a dtype for every operation, insert the casts, show why."""

from fxamp.backend import backend, reports
from fxamp.convert import convert
from fxamp.errors import CaptureError, FxampError, PlanError, PolicyError, VerifyError
from fxamp.insight import Report
from fxamp.policy import Policy
from fxamp.runtime import AmpModule, GradScaler, inspect

__version__ = "0.1.0"

__all__ = [
    "AmpModule",
    "CaptureError",
    "FxampError",
    "GradScaler",
    "PlanError",
    "Policy",
    "PolicyError",
    "Report",
    "VerifyError",
    "backend",
    "convert",
    "inspect",
    "reports",
]
