"""What lives in a converted module."""

from fxamp.runtime.amp_module import AmpModule, inspect
from fxamp.runtime.asked import Asked, Stages
from fxamp.runtime.conversion import Conversion
from fxamp.runtime.inspection import Inspection
from fxamp.runtime.variant import Variant
from fxamp.scaling import GradScaler

__all__ = ["AmpModule", "Asked", "Conversion", "GradScaler", "Inspection", "Stages", "Variant", "inspect"]
