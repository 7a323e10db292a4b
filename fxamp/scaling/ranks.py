"""Did any rank find a gradient that is not finite? All ranks of a group get the same answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import distributed

__all__ = ["Group", "agree", "group_of", "spans_the_world"]

Group = Any  # a torch.distributed.ProcessGroup; builds without torch.distributed have no such name


def group_of(given: Group | Literal[False] | None) -> Group | None:
    """The group to agree with: the given one, the world if it is initialised, or None for a rank on its own."""
    if given is False or not distributed.is_available() or not distributed.is_initialized():
        return None
    group = given if given is not None else distributed.group.WORLD
    return group if group is not None and group.size() > 1 else None


def spans_the_world(group: Group | None) -> bool:
    """Whether all ranks are in it."""
    return group is not None and group.size() == distributed.get_world_size()


def agree(flags: dict[torch.device, torch.Tensor], groups: Iterable[Group]) -> None:
    """Makes each flag the largest of all of them on all ranks of the groups, one collective a group.

    Nothing waits for the device where the backend does not, as NCCL does not.

    Args:
        flags: 0-dim or one element each, at least one.
        groups: process groups; all their ranks come here at the same step.
    """
    first, *others = flags.values()
    for group in groups:
        device = _device_for(group, first.device)
        common = first if device == first.device else first.to(device)
        for flag in others:
            common = torch.maximum(common, flag.to(device))
        distributed.all_reduce(common, op=distributed.ReduceOp.MAX, group=group)
        for flag in (first, *others):
            if flag is not common:
                flag.copy_(common)


def _device_for(group: Group, wanted: torch.device) -> torch.device:
    """Where a collective of this group can take place: NCCL has none on the CPU."""
    possible = [device.type for device in group._device_types]
    if wanted.type in possible:
        return wanted
    return torch.device("cpu") if possible[0] == "cpu" else torch.device(torch.accelerator.current_device_index())
