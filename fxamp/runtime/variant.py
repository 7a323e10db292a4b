"""One graph of a converted module, and the calls it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxamp.capture import Traced
from fxamp.plan import PrecisionPlan

__all__ = ["Variant"]


@dataclass
class Variant:
    """One graph: as traced, as planned, as rewritten, as compiled."""

    traced: Traced
    plan: PrecisionPlan
    graph: fx.Graph
    function: Any = None
    code: str = ""
    ambient: bool = False
    guarded: bool = False
    mode_flags: tuple[tuple[nn.Module, bool], ...] = ()
    asked: tuple[int, ...] = ()  # placeholders whose type the model asked for
    observed: tuple[tuple[torch.dtype, bool] | None, ...] = ()  # dtype, and whether 0-dim, of the example inputs
    by_rule: Variant | None = None  # planned without them

    def fits(self, values: Sequence[Any]) -> bool:
        """Whether the dtypes of these inputs are those that it was planned for, when it was planned for some."""
        for value, expected in zip(values, self.observed, strict=False):
            if expected is not None and isinstance(value, torch.Tensor):
                dtype, scalar = expected
                if value.dtype is not dtype or (value.dim() == 0) is not scalar:
                    return False
        return True
