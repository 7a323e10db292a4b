"""Did any rank find a gradient that is not finite? All ranks of a group get one answer, and have one scale."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal

import torch
from torch import distributed
from torch.distributed.algorithms.join import Joinable, JoinHook, _JoinConfig
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fxamp.errors import FxampError

__all__ = ["Group", "Joining", "agree", "alone", "group_of", "has_uneven_inputs", "spans_the_world"]

Group = Any  # a torch.distributed.ProcessGroup; builds without torch.distributed have no such name

_ALONE: Final = _JoinConfig.construct_disabled_join_config()  # type: ignore[no-untyped-call]
_WRAPPERS: Final[weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.WeakSet[DistributedDataParallel]]] = (
    weakref.WeakKeyDictionary()
)


def group_of(given: Group | Literal[False] | None) -> Group | None:
    """The group to agree with: the given one, the world if it is initialised, or None for a rank on its own."""
    if given is False or not distributed.is_available() or not distributed.is_initialized():
        return None
    group = given if given is not None else distributed.group.WORLD
    # A rank that is not in the group it made has a number for it.
    return None if group is None or isinstance(group, int) or group.size() == 1 else group


def spans_the_world(group: Group | None) -> bool:
    """Whether all ranks are in it."""
    return group is not None and group.size() == distributed.get_world_size()


def agree(flags: dict[torch.device, torch.Tensor], groups: Iterable[Group]) -> None:
    """Makes each flag the largest of all of them on all ranks of the groups, one collective a group.

    Nothing waits for the device where the backend does not, as NCCL does not.

    Args:
        flags: 0 or 1, one element each, at least one.
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


def alone() -> AbstractContextManager[Any]:
    """A context in which this rank talks to no other: it may be the only one that came here.

    Raises:
        FxampError: inside, when something needs the other ranks, as ``SyncBatchNorm`` does.
    """
    together = distributed.is_available() and distributed.is_initialized()
    return _Alone() if together else nullcontext()  # type: ignore[no-untyped-call]


class _Alone(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise FxampError(f"{func.name()} needs the other ranks")
        return func(*args, **(kwargs or {}))


def has_uneven_inputs(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a ``DistributedDataParallel`` with these parameters is, or was, in a ``Join`` context.

    A rank that is out of inputs there takes part in the reductions of gradients, and in no other collective. These tell
    all ranks of what is not finite, too.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return False
    if optimizer not in _WRAPPERS:  # nothing leads from a parameter to its wrapper, so they are looked for, once
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        # There may be millions of objects: this runs no Python code for each, as isinstance would.
        objects, kinds = gc.get_objects(), {id(kind) for kind in _with_subclasses(DistributedDataParallel)}
        found = itertools.compress(objects, map(kinds.__contains__, map(id, map(type, objects))))
        wrappers = (module for module in found if not owned.isdisjoint(map(id, module.parameters())))
        _WRAPPERS[optimizer] = weakref.WeakSet(wrappers)
    return any(module._join_config.enable for module in _WRAPPERS[optimizer])


def _with_subclasses(kind: type[Any]) -> Iterator[type]:
    yield kind
    for below in kind.__subclasses__():
        yield from _with_subclasses(below)


class Joining(Joinable):
    """What lets a scaler be in ``with Join([ddp, scaler]):``, after which all ranks have the scale of the last one."""

    process_group: Group | Literal[False] | None = None
    _joined: bool = False  # like that of torch's modules it stays after the context
    _device: str
    _scale: torch.Tensor | None
    _growth_tracker: torch.Tensor | None

    @property
    def _join_config(self) -> Any:
        return _ALONE

    @_join_config.setter
    def _join_config(self, config: Any) -> None:
        if config.enable and config.is_first_joinable:
            raise FxampError(
                "a scaler comes first in Join([...]), and tells no rank when another makes its step",
                hint="put the module before it: with Join([ddp, scaler]):",
            )
        self._joined = config.enable

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What a rank that is out of inputs does: nothing, until all are."""
        return _SameScale(self)

    @property
    def join_device(self) -> torch.device:
        """Where the scale is."""
        return self._scale.device if self._scale is not None else torch.device(self._device)

    @property
    def join_process_group(self) -> Group:
        """The group that the scaler agrees with.

        Raises:
            FxampError: when it decides on its own.
        """
        if self.process_group is False:
            raise FxampError("a scaler with process_group=False joins no other rank", hint="leave process_group out")
        return self.process_group if self.process_group is not None else distributed.group.WORLD


class _SameScale(JoinHook):
    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler

    def post_hook(self, is_last_joiner: bool) -> None:
        """Gives all ranks the scale of one that had the most inputs."""
        scaler, group = self._scaler, self._scaler.join_process_group
        if not scaler.is_enabled():
            return
        if scaler._scale is None:
            scaler._lazy_init_scale_growth_tracker(scaler.join_device)
        device = _device_for(group, scaler._scale.device)
        last = torch.tensor(distributed.get_rank(group) if is_last_joiner else -1, device=device)
        distributed.all_reduce(last, op=distributed.ReduceOp.MAX, group=group)
        for state in (scaler._scale, scaler._growth_tracker):
            sent = state.to(device)
            distributed.broadcast(sent, group=group, group_src=int(last))
            state.copy_(sent)


def _device_for(group: Group, wanted: torch.device) -> torch.device:
    """Where a collective of this group can take place: NCCL has none on the CPU."""
    possible = [device.type for device in group._device_types]
    if wanted.type in possible:
        return wanted
    return torch.device("cpu") if possible[0] == "cpu" else torch.device(torch.accelerator.current_device_index())
