"""What torch finds under the name "fxamp" among its backends; it imports this when the name is first asked for."""

from fxamp.backend import for_name, hand_on_calls

__all__ = ["for_name"]

hand_on_calls()
