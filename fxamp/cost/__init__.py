"""How long do calls take on this device, in either dtype?"""

from fxamp.cost.clock import measurable
from fxamp.cost.probe import Probe
from fxamp.cost.spec import Spec

__all__ = ["Probe", "Spec", "measurable"]
