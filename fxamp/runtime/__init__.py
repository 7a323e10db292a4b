"""What lives in a converted module."""

from fxamp.runtime.amp_module import AmpModule, inspect
from fxamp.runtime.asked import Asked
from fxamp.runtime.conversion import Conversion, Stages
from fxamp.runtime.inspection import Inspection
from fxamp.runtime.scaler import GradScaler
from fxamp.runtime.variant import Variant

__all__ = ["AmpModule", "Asked", "Conversion", "GradScaler", "Inspection", "Stages", "Variant", "inspect"]
