"""Which tensors are the gradients of an optimizer, what are they called, and how are they unscaled?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxamp.errors import FxampError, GradientError
from fxamp.scaling.sights import look
from fxamp.scaling.trail import trails

__all__ = ["Gradients", "clip_gradients", "is_finite", "is_spread", "named_parameters"]

Optimizer = torch.optim.Optimizer


@dataclass
class Gradients:
    """What the backward pass left in the parameters of one optimizer.

    Attributes:
        lists: the tensors that hold the numbers, by device and dtype: the values of a sparse gradient, the real view
            of a complex one, the local part of a ``DTensor``.
        float16: the first parameter with a float16 gradient.
        groups: the process groups that the ``DTensor`` gradients are spread over.
    """

    lists: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = field(default_factory=dict)
    float16: torch.Tensor | None = None
    groups: list[Any] = field(default_factory=list)

    @staticmethod
    def of(optimizer: Optimizer) -> Gradients:
        """Those of an optimizer; float16 sparse ones are coalesced, as torch does it, for the sums may overflow."""
        found = Gradients()
        last: tuple[torch.device, torch.dtype] | None = None
        plain, usual, dense = torch.Tensor, torch.float32, torch.strided  # this loop is most of what a scaler costs
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if type(gradient) is not plain or gradient.dtype is not usual or gradient.layout is not dense:
                    gradient = found._numbers(parameter)
                key = gradient.device, gradient.dtype
                if key != last:
                    tensors, last = found.lists.setdefault(key, []), key
                tensors.append(gradient)
        return found

    def _numbers(self, parameter: torch.Tensor) -> torch.Tensor:
        gradient: Any = parameter.grad
        # FullyShardedDataParallel keeps float16 gradients where it is asked to, of parameters that are float32 beside.
        if gradient.dtype is torch.float16 and self.float16 is None and not _is_flattened(parameter):
            self.float16 = parameter
        if hasattr(gradient, "device_mesh"):  # a DTensor
            groups: Iterable[Any] = gradient.device_mesh.get_all_groups()
            self.groups += [group for group in groups if group not in self.groups]
            gradient = gradient.to_local()
        if gradient.is_sparse:
            if gradient.dtype is torch.float16:
                gradient = parameter.grad = gradient.coalesce()
            gradient = gradient._values()
        if gradient.is_complex():
            if gradient.is_conj():
                gradient = parameter.grad = gradient.resolve_conj()
            gradient = torch.view_as_real(gradient)
        numbers: torch.Tensor = gradient
        return numbers

    def unscale_(self, inv_scale: torch.Tensor, found_inf: torch.Tensor) -> dict[torch.device, torch.Tensor]:
        """Multiplies by ``inv_scale``, in one pass a device and dtype; the flags that tell of what is not finite.

        Args:
            inv_scale: 0-dim or one element, on any device.
            found_inf: the same, zero; it is the flag of its own device.
        """
        flags = {}
        for (device, _), tensors in self.lists.items():
            if device not in flags:
                flags[device] = found_inf.to(device, non_blocking=True, copy=True)
            inverse = inv_scale if device == inv_scale.device else inv_scale.to(device, non_blocking=True)
            torch._amp_foreach_non_finite_check_and_unscale_(tensors, flags[device], inverse)
        return flags

    def check_dtypes(self, optimizer: Optimizer) -> None:
        """Refuses float16 gradients, for most of their bits are gone once they are unscaled.

        Raises:
            GradientError: when there is one.
        """
        if self.float16 is None:
            return
        names = {
            id(parameter): name for name, parameter in named_parameters(optimizer, [trail.module for trail in trails()])
        }
        raise GradientError(
            "Attempting to unscale FP16 gradients. "
            f"The gradient of {names[id(self.float16)]} is float16, and so is the parameter: expected float32",
            hint="keep the parameters in float32, with model.float() before the optimizer is made; "
            "fxamp.convert and torch.autocast compute in float16 without it",
        )


def named_parameters(optimizer: Optimizer, modules: Iterable[nn.Module] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of an optimizer, by the names that the modules or the optimizer itself have for them."""
    names = {id(p): name for module in modules for name, p in module.named_parameters()}
    for i, group in enumerate(optimizer.param_groups):
        own = group.get("param_names")
        for j, parameter in enumerate(group["params"]):
            name = own[j] if own else f"param_groups[{i}]['params'][{j}]"
            yield names.get(id(parameter), name), parameter


def is_finite(gradient: Any) -> bool:
    """Whether all numbers of a gradient are finite; of a ``DTensor``, of the part on this rank."""
    return look([gradient.to_local() if hasattr(gradient, "device_mesh") else gradient]).finite


def is_spread(parameter: torch.Tensor) -> bool:
    """Whether each rank has a part of it, of a ``DTensor`` or in ``FullyShardedDataParallel``."""
    return hasattr(parameter, "device_mesh") or _is_flattened(parameter)


def clip_gradients(optimizer: Optimizer, max_norm: float | None) -> None:
    """Scales the gradients down where their norm is larger, with None not at all.

    Raises:
        FxampError: when each rank has a part of the gradients that the others do not know of.
    """
    if max_norm is None:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(map(_is_flattened, parameters)):
        raise FxampError(
            f"clip_norm={max_norm} is for the norm of all gradients: FullyShardedDataParallel gives each rank a part",
            hint="scaler.unscale_(optimizer), then clip_grad_norm_ of that module, then scaler.step(optimizer)",
        )
    nn.utils.clip_grad_norm_(parameters, max_norm)


def _is_flattened(parameter: torch.Tensor) -> bool:
    """Whether it belongs to ``torch.distributed.fsdp.FullyShardedDataParallel``."""
    return getattr(parameter, "_fsdp_flattened", False)
