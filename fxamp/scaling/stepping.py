"""How are gradients unscaled and looked at, once and on all ranks, and who steps the optimizer?

One multi-tensor pass over the gradients unscales and checks them, for fused optimizers too; one collective
tells all ranks; and the host waits for the answer once a step, where the optimizer does not take it on the device.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch.amp.grad_scaler import OptState

from fxamp.errors import GradientError
from fxamp.scaling.gradients import Gradients, clip_gradients
from fxamp.scaling.ranks import Joining, agree, group_of, has_uneven_inputs, spans_the_world

__all__ = ["Stepping", "combined"]

_IDLE: Final = "no parameter of this {} has a gradient: there is nothing to unscale, and its step changes nothing"
_EXACT: Final = ("cpu", "mps")  # float32 division is rounded correctly; Metal has no float64


class Stepping(torch.amp.GradScaler, Joining):
    """A ``torch.amp.GradScaler`` that unscales in one pass and decides with the ranks of ``process_group``."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients of an optimizer by the scale, and finds out on all ranks whether they are finite.

        Args:
            optimizer: whose gradients; once between two calls of ``update``.

        Raises:
            GradientError: when a gradient is float16; nothing is unscaled then.
            RuntimeError: when they are unscaled already, as in torch's.
        """
        if not self._enabled:
            return
        scale, _ = self._check_scale_growth_tracker("unscale_")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is not OptState.READY:
            super().unscale_(optimizer)  # raises
        # Divided in float64 where kernels may be compiled to divide less exactly, as torch's scaler does it.
        inverse = scale.reciprocal() if scale.device.type in _EXACT else scale.double().reciprocal().float()
        state["found_inf_per_device"] = self._unscale_grads_(optimizer, inverse, torch.zeros_like(scale), False)
        self._agree(optimizer, state)
        state["stage"] = OptState.UNSCALED
        if not state["found_inf_per_device"]:
            warnings.warn(_IDLE.format(type(optimizer).__name__), stacklevel=2)

    def _checked_step(
        self, optimizer: torch.optim.Optimizer, state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        """For an optimizer that is stepped or not: the host has to know, once."""
        if state["stage"] is OptState.READY:
            self.unscale_(optimizer)
        return self._maybe_opt_step(optimizer, state, *args, **kwargs)

    def _maybe_opt_step(
        self, optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        flags = optimizer_state["found_inf_per_device"].values()
        optimizer_state["skipped"] = skipped = bool(flags) and bool(combined(flags).item())
        if skipped:
            return None
        clip_gradients(optimizer, optimizer_state.pop("clip_norm", None))  # a NaN would be in all of them by that
        result: float | None = optimizer.step(*args, **kwargs)
        return result

    def _fused_step(
        self, optimizer: torch.optim.Optimizer, state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        """For an optimizer that looks at the flag on the device, and is called always."""
        contract = _contract(getattr(type(optimizer), "step", optimizer.step))
        if contract == "argument":
            return super().step(optimizer, *args, **kwargs)
        scale, _ = self._check_scale_growth_tracker("step")
        fused: Any = optimizer
        grad_scale = getattr(optimizer, "grad_scale", None)
        if state["stage"] is OptState.READY and not (contract == "kernel" and self._unscaled(optimizer)):
            self._check_inf_per_device(optimizer)
            grad_scale = scale if grad_scale is None else scale * grad_scale
        flags = state["found_inf_per_device"].values()
        fused.grad_scale = grad_scale
        fused.found_inf = combined(flags, scale) if flags else torch.zeros_like(scale)
        try:
            result: float | None = fused.step(*args, **kwargs)
        finally:
            del fused.grad_scale, fused.found_inf
        return result

    def _unscaled(self, optimizer: torch.optim.Optimizer) -> bool:
        """Unscales in the pass that checks, so that the kernel need not write the gradients again; whether it could."""
        try:
            self.unscale_(optimizer)
        except GradientError:
            return False  # float16 loses less in the registers of the kernel
        return True

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: torch.Tensor,
        found_inf: torch.Tensor,
        allow_fp16: bool = True,
    ) -> dict[torch.device, torch.Tensor]:
        with torch.no_grad():
            gradients = Gradients.of(optimizer)
            if not allow_fp16:
                gradients.check_dtypes(optimizer)
            flags = gradients.unscale_(inv_scale, found_inf)
            if gradients.groups and not spans_the_world(group_of(self.process_group)):
                agree(flags, gradients.groups)
            return flags

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        flags = super()._check_inf_per_device(optimizer)
        self._agree(optimizer, self._per_optimizer_states[id(optimizer)])
        return flags

    def _agree(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        group = group_of(self.process_group)
        if group is not None and not self._joined and not has_uneven_inputs(optimizer):
            flags = state["found_inf_per_device"]
            if not flags:  # the other ranks may have gradients
                scale, _ = self._check_scale_growth_tracker("unscale_")
                flags[scale.device] = torch.zeros_like(scale)
            agree(flags, [group])


@functools.lru_cache(maxsize=64)
def _contract(step: Callable[..., Any]) -> str:
    """How an optimizer takes the scale: torch's own in the "kernel", where None is no scale; others as an attribute.

    Or, as torch still serves it, as the "argument" ``step(grad_scaler=...)``.
    """
    if "grad_scaler" in inspect.signature(step).parameters:
        return "argument"
    return "kernel" if step.__module__.startswith("torch.optim.") else "attribute"


def combined(flags: Iterable[torch.Tensor], home: torch.Tensor | None = None) -> torch.Tensor:
    """One flag, on the device of ``home`` or of the first."""
    first, *others = flags
    device = home.device if home is not None else first.device
    found = first.to(device, non_blocking=True)
    for flag in others:
        found = torch.maximum(found, flag.to(device, non_blocking=True))
    return found
