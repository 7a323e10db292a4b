"""Loss scaling for float16: the scaler, what all ranks agree on, and where an overflow came from."""

from fxamp.scaling.overflow import Overflow
from fxamp.scaling.scaler import GradScaler

__all__ = ["GradScaler", "Overflow"]
