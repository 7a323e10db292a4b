"""What is refused of a loss and of a scale?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

import torch

from fxamp.dtypes import LOW_DTYPES, abbreviate
from fxamp.errors import FxampError

__all__ = ["check_loss", "checked_bounds", "checked_scale", "widened"]

MIN_SCALE: Final = 2.0**-14  # the smallest normal float16, see GradScaler
MAX_SCALE: Final = 2.0**24  # apex's cap, see GradScaler


def checked_bounds(min_scale: float | None, max_scale: float | None, init_scale: float) -> tuple[float, float]:
    """The floor and the cap, by default such that ``init_scale`` is between.

    Raises:
        FxampError: when it is not.
    """
    least = min(MIN_SCALE, init_scale) if min_scale is None else float(min_scale)
    most = max(MAX_SCALE, init_scale) if max_scale is None else float(max_scale)
    if not 0.0 <= least <= init_scale:
        raise FxampError(
            f"min_scale={min_scale} is not a floor for init_scale={init_scale}: "
            f"expected a number from 0 to {init_scale}",
            hint="lower min_scale, or leave it out",
        )
    if not most >= init_scale:
        raise FxampError(
            f"max_scale={max_scale} is not a cap for init_scale={init_scale}: expected {init_scale} or more",
            hint="raise max_scale, or leave it out",
        )
    return least, most


def checked_scale(new_scale: Any) -> Any:
    """A new scale as torch takes it: a float, or what it checks itself.

    Raises:
        FxampError: when it is a number that no gradient can be divided by.
    """
    if new_scale is None:
        return None
    if isinstance(new_scale, torch.Tensor):
        return new_scale.reshape(()) if new_scale.numel() == 1 else new_scale
    if isinstance(new_scale, int | float) and math.isfinite(new_scale) and new_scale > 0:
        return float(new_scale)
    raise FxampError(
        f"update({new_scale!r}) sets no scale: expected a positive finite number or a tensor with one",
        hint="call update() without an argument to let the scale follow the gradients",
    )


def widened(outputs: Any) -> Any:
    """The same in which no low number on its own is left: a scale of 65536 is beyond float16.

    Source: the type promotion of torch; a 0-dim low tensor times a 0-dim float32 one is float32, but not so one of
    shape ``(1,)``.
    """
    if isinstance(outputs, torch.Tensor):
        alone = outputs.numel() == 1 and outputs.dim() > 0
        return outputs.float() if alone and outputs.dtype in LOW_DTYPES else outputs
    if isinstance(outputs, list | tuple):
        return type(outputs)(map(widened, outputs))
    return map(widened, outputs) if isinstance(outputs, Iterable) else outputs


def check_loss(loss: object) -> None:
    """Refuses what is not one real floating-point number.

    Raises:
        FxampError: when it is not.
    """
    if not isinstance(loss, torch.Tensor):
        found = f"found {_article(type(loss).__name__)}"
        hint = "pass the tensor that the loss function returned"
        if isinstance(loss, tuple | list):
            hint = "unpack it first: loss, output = amp(...)"
    elif loss.numel() != 1:
        found = f"found {_describe(loss)} with {loss.numel()} elements"
        hint = "reduce it to one number, for example loss.mean()"
    elif not loss.dtype.is_floating_point:
        found = f"found {_describe(loss)}"
        hint = "take a real number of it, for example loss.abs()"
        if not loss.dtype.is_complex:
            hint = "compute the loss from floating-point outputs; an integer has no gradient"
    else:
        return
    raise FxampError(
        f"cannot run backward on this loss: {found}, expected a tensor with one real floating-point element",
        hint=hint,
    )


def _describe(tensor: torch.Tensor) -> str:
    return f"{abbreviate(tensor.dtype)}{list(tensor.shape)}"


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
