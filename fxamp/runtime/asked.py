"""What did the user ask for, and what do the model's modules and tensors make of it?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxamp.capture import Ambient, Layout, Program, Setting, Traced, grad_mode
from fxamp.dtypes import check_low_dtype
from fxamp.errors import CaptureError, PolicyError, nearest
from fxamp.plan import PrecisionPlan
from fxamp.policy import DEVICE_TYPES, Policy

__all__ = ["Asked", "Stages", "ambient_of", "base_layout", "dtypes_of", "mode_of"]

MAX_STARS = 4


class Stages(NamedTuple):
    """The stages after capture.

    ``plan`` decides about what was traced, and ``rewrite`` makes a graph of that; ``report`` shows them; ``freeze``
    folds the weights of a conversion into the low dtype, and tells which keep a low copy beside them. ``insert`` is
    ``rewrite`` without what is done for training to the casts of weights, which ``freeze`` has to find one by one.
    """

    plan: Callable[..., PrecisionPlan]
    rewrite: Callable[[Traced, PrecisionPlan], fx.Graph]
    report: Callable[..., Any]
    freeze: Callable[..., dict[str, tuple[str, torch.dtype]]]
    insert: Callable[[Traced, PrecisionPlan], fx.Graph]

    def for_inference(self) -> Stages:
        """The stages of a conversion that will be frozen."""
        return self._replace(rewrite=self.insert)


@dataclass(frozen=True)
class Asked:
    """What the user asked for; None where fxamp chooses."""

    policy: Policy
    device_type: str | None = None
    dtype: torch.dtype | None = None

    @staticmethod
    def of(policy: str | Policy, device_type: str | None, dtype: torch.dtype | None) -> Asked:
        """What was asked for, once it is known to exist.

        Raises:
            PolicyError: for an unknown policy, device type or dtype.
        """
        if device_type is not None and device_type not in DEVICE_TYPES:
            close = nearest(str(device_type).partition(":")[0], DEVICE_TYPES) or "cpu"
            raise PolicyError(
                f"unknown device_type {device_type!r}: expected one of {', '.join(DEVICE_TYPES)}",
                hint=f"write device_type={close!r}",
            )
        if dtype is not None:
            check_low_dtype(dtype)
        return Asked(Policy.of(policy), device_type, dtype)

    def resolve(self, tree: nn.Module) -> Policy:
        """The policy for the device that the model is on, unless one was asked for."""
        device_type = self.device_type or self.policy.device_type or _device_type(tree)
        return self.policy.resolved(device_type, self.dtype)


def base_layout(program: Program, mode: str, policy: Policy) -> Layout:
    """The layout to begin with; how many ``*args`` there are is tried out, until a call tells."""
    failed: CaptureError | None = None
    for stars in range(1, MAX_STARS + 1) if program.signature.starred else ():
        layout = program.signature.base_layout(stars)
        try:
            program.trace(layout, Setting(program.flags(mode), ambient_of(policy), grad_mode()))
        except CaptureError as error:
            failed = failed or error
        else:
            return layout
    if failed is not None:
        raise failed
    return program.signature.base_layout()


def ambient_of(policy: Policy) -> Ambient:
    """The autocast of a policy; None when it has none."""
    if policy.name == "full" or policy.device_type is None or policy.dtype is None:
        return None
    return policy.device_type, policy.dtype


def mode_of(tree: nn.Module) -> str:
    """What the flags of the modules come to."""
    flags = {module.training for module in tree.modules() if hasattr(module, "training")}
    if len(flags) > 1:
        return "as_is"
    return "train" if flags.pop() else "eval"


def dtypes_of(tree: nn.Module) -> tuple[torch.dtype, ...]:
    """The dtypes of the parameters and buffers, in order."""
    return tuple(tensor.dtype for tensor in (*tree.parameters(), *tree.buffers()))


def _device_type(tree: nn.Module) -> str:
    tensors = (*tree.parameters(), *tree.buffers())
    found = tensors[0].device.type if tensors else "cpu"
    return found if found in ("cuda", "cpu") else "cpu"
