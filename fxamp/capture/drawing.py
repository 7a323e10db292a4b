"""Does a forward draw random numbers of Python's or numpy's, which a graph would freeze?"""

from __future__ import annotations

import functools
import importlib
import random
from collections.abc import Iterable
from typing import Any, Final

from torch import nn
from torch.fx.proxy import TraceError

__all__ = ["RandomState", "may_draw"]


class RandomState:
    """The states of Python's and numpy's random numbers, as they are now."""

    def __init__(self) -> None:
        self._numpy = _numpy_random()
        self._python = random.getstate()
        self._state = self._numpy.get_state() if self._numpy is not None else ()

    def check(self) -> None:
        """Refuses a forward that drew some, and puts the states back.

        Raises:
            TraceError: when the states are not these.
        """
        now = RandomState()
        if now._python == self._python and _as_bytes(now._state) == _as_bytes(self._state):
            return
        self.put_back()
        whose = "numpy's random numbers" if now._python == self._python else "Python's random module"
        raise TraceError(f"draws from {whose}, which a graph would freeze")

    def put_back(self) -> None:
        """Goes back to these."""
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy.set_state(self._state)


def may_draw(module: nn.Module) -> bool:
    """Whether a module is to be looked at itself: most of torch's own draw none, and whoever calls one is looked at."""
    where = getattr(getattr(type(module), "forward", None), "__module__", None) or ""
    return "forward" in module.__dict__ or not where.startswith("torch.nn.modules.") or where in _WITH_FUNCTIONS


# Where torch's own modules run functions of the user's.
_WITH_FUNCTIONS: Final = ("torch.nn.modules.loss", "torch.nn.modules.transformer")


@functools.cache
def _numpy_random() -> Any:
    try:
        return importlib.import_module("numpy.random")  # now, for fake tensors would do it while a model is traced
    except ImportError:
        return None


def _as_bytes(state: Iterable[Any]) -> list[Any]:
    return [part.tobytes() if hasattr(part, "tobytes") else part for part in state]
