"""What did the user ask for, and what does that come to on the device that the model is on?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fxamp.policy import Policy

__all__ = ["Asked"]


@dataclass(frozen=True)
class Asked:
    """What the user asked for; None where fxamp chooses."""

    policy: Policy
    device_type: str | None = None
    dtype: torch.dtype | None = None

    def resolve(self, tree: nn.Module) -> Policy:
        """The policy for the device that the model is on, unless one was asked for."""
        device_type = self.device_type or self.policy.device_type or _device_type(tree)
        return self.policy.resolved(device_type, self.dtype)


def _device_type(tree: nn.Module) -> str:
    tensors = (*tree.parameters(), *tree.buffers())
    found = tensors[0].device.type if tensors else "cpu"
    return found if found in ("cuda", "cpu") else "cpu"
