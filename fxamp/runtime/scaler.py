"""Which factor keeps small float16 gradients alive, and was the last step skipped?

``GradScaler`` is ``torch.amp.GradScaler`` and takes its place anywhere: the same methods, states,
errors and ``state_dict``. What it adds: ``backward``, a floor under the scale, ``skipped``, and
``overflow`` to say where a skipped step came from. Nothing it adds waits for the device before it is read.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fxamp.dtypes import LOW_DTYPES, abbreviate
from fxamp.errors import FxampError

__all__ = ["GradScaler", "Overflow"]

_DEFAULT_MIN_SCALE = 2.0**-14  # the smallest normal float16, see GradScaler
_SHOWN_PARAMETERS = 8


@dataclass(frozen=True)
class Overflow:
    """What is known about a step that was skipped.

    Args:
        parameters: the parameters whose gradient is not finite now, by name where a name is known.

    Example::

        >>> print(Overflow(("encoder.weight", "head.bias")))
        non-finite gradients in 2 parameters: encoder.weight, head.bias
    """

    parameters: tuple[str, ...]

    def __str__(self) -> str:
        if not self.parameters:
            return "non-finite gradients, cleared since: call overflow() between step() and zero_grad()"
        shown, hidden = self.parameters[:_SHOWN_PARAMETERS], self.parameters[_SHOWN_PARAMETERS:]
        count = f"{len(self.parameters)} parameter{'s' if len(self.parameters) > 1 else ''}"
        more = f" and {len(hidden)} more" if hidden else ""
        return f"non-finite gradients in {count}: {', '.join(shown)}{more}"


class GradScaler(torch.amp.GradScaler):
    """A ``torch.amp.GradScaler`` with a floor, and with answers about the steps it skips.

    torch's scaler halves the scale after every skipped step. A long run of bad batches takes it to 0: it
    never grows again, and the next good batch is unscaled by 1/0 and turns the parameters into NaN. Here it
    stops at ``min_scale``, so training picks up again once the gradients are finite.

    The default floor is 2**-14, the smallest normal float16. A gradient of 1 is still exact to all of its
    bits at that scale, and gradients up to 65504 * 2**14 (about 1e9) fit; no smaller scale can save a step
    worth taking. It is not 1, because a loss summed over a large batch may need a scale below 1 and would
    then skip every step. ``min_scale`` is an argument, not a state: the ``state_dict`` is torch's own.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        init_scale: the first scale.
        growth_factor: what the scale is multiplied by after ``growth_interval`` good steps in a row.
        backoff_factor: what the scale is multiplied by after a skipped step.
        growth_interval: the good steps in a row that let the scale grow.
        enabled: False makes every method pass its argument on; bfloat16 needs no scaling.
        min_scale: the floor that ``update()`` and ``load_state_dict()`` keep to; 0.0 leaves torch's
            behaviour. An ``init_scale`` below the default floor becomes the floor.

    Raises:
        FxampError: when ``min_scale`` is not a number from 0 to ``init_scale``.

    Example::

        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> scaler = GradScaler("cpu", init_scale=4.0)
        >>> scaler.backward((weight * float("inf")).sum())
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> scaler.skipped, scaler.get_scale()
        (True, 2.0)
        >>> print(scaler.overflow())
        non-finite gradients in 1 parameter: param_groups[0]['params'][0]
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        min_scale: float | None = None,
    ) -> None:
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._min_scale = _checked_floor(min_scale, init_scale)
        self._found_inf: tuple[torch.Tensor, ...] = ()
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._module: weakref.ref[torch.nn.Module] | None = None

    @property
    def min_scale(self) -> float:
        """The scale that ``update()`` and ``load_state_dict()`` do not go below."""
        return self._min_scale

    @property
    def skipped(self) -> bool:
        """Whether the last ``step`` was skipped, because a gradient was not finite.

        False before the first step. Reading it waits for the device, nothing before that does.
        """
        return any(flag.item() for flag in self._found_inf)

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Run ``self.scale(loss).backward(**kwargs)``.

        A float16 or bfloat16 loss is multiplied in float32, so the product itself cannot overflow.

        Args:
            loss: a tensor with one real floating-point element.
            kwargs: passed on to ``torch.Tensor.backward``.

        Raises:
            FxampError: when the loss is something else, also when the scaler is disabled.
        """
        _check_loss(loss)
        if self.is_enabled() and loss.dtype in LOW_DTYPES:
            loss = loss.float()
        self.scale(loss).backward(**kwargs)  # type: ignore[no-untyped-call]

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Unscale the gradients, then run ``optimizer.step()``, or skip it if one of them is not finite.

        Args:
            optimizer: the optimizer that applies the gradients.
            args: passed on to ``optimizer.step``; a closure is refused.
            kwargs: passed on to ``optimizer.step``; a closure is refused.

        Returns:
            What ``optimizer.step`` returned, None when the step was skipped.
        """
        if self.is_enabled() and any(callable(arg) for arg in args):
            # torch refuses closure= alone; a positional one would run on gradients nobody unscaled.
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        result = super().step(optimizer, *args, **kwargs)
        if self.is_enabled():
            # Copies, because torch's update() adds the flags of several optimizers up in place.
            flags = self._found_inf_per_device(optimizer).values()
            self._found_inf = tuple(flag.clone() for flag in flags)
            self._optimizer = weakref.ref(optimizer)
        return result

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Adapt the scale to what the steps of this iteration found, and keep it at ``min_scale`` or above.

        Args:
            new_scale: a scale to set instead, taken as it is, below ``min_scale`` too.
        """
        if new_scale is not None and not isinstance(new_scale, torch.Tensor):
            new_scale = float(new_scale)  # torch's takes no int
        super().update(new_scale)
        if new_scale is None and self.is_enabled() and self._scale is not None:
            self._scale.clamp_(min=self._min_scale)  # on the device: no sync

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this scaler or of torch's, with the scale lifted to ``min_scale`` if below.

        Args:
            state_dict: what ``state_dict()`` returned.
        """
        if self.is_enabled() and state_dict:
            state_dict = state_dict | {"scale": max(state_dict["scale"], self._min_scale)}
        super().load_state_dict(state_dict)

    def overflow(self) -> Overflow | None:
        """What made the last step skip, or None when it was not skipped.

        It looks at the gradients as they are now, so call it between ``step()`` and ``zero_grad()``.
        """
        if not self.skipped:
            return None
        optimizer = self._optimizer() if self._optimizer else None
        named = self._named_gradients(optimizer) if optimizer is not None else ()
        return Overflow(tuple(name for name, gradient in named if not _is_finite(gradient)))

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to this process stays here: the copy has made no step and knows no module yet.
        return super().__getstate__() | {"_found_inf": (), "_optimizer": None, "_module": None}

    def _bind(self, module: torch.nn.Module) -> None:
        """Tell whose parameters the gradients belong to, for the names in ``overflow()``."""
        self._module = weakref.ref(module)

    def _named_gradients(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
        module = self._module() if self._module else None
        names = {id(p): name for name, p in module.named_parameters()} if module is not None else {}
        for i, group in enumerate(optimizer.param_groups):
            for j, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    yield names.get(id(parameter), f"param_groups[{i}]['params'][{j}]"), parameter.grad


def _checked_floor(min_scale: float | None, init_scale: float) -> float:
    if min_scale is None:
        return min(_DEFAULT_MIN_SCALE, init_scale)
    if not (math.isfinite(min_scale) and 0.0 <= min_scale <= init_scale):
        raise FxampError(
            f"min_scale={min_scale} is not a floor for init_scale={init_scale}: "
            f"expected a number from 0 to {init_scale}",
            hint="lower min_scale, or leave it out",
        )
    return float(min_scale)


def _check_loss(loss: object) -> None:
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


def _is_finite(gradient: torch.Tensor) -> bool:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return bool(torch.isfinite(values).all())
