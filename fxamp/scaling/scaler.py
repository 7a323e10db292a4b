"""Which factor keeps small float16 gradients alive, and was the last step skipped?

``GradScaler`` is ``torch.amp.GradScaler`` and takes its place anywhere: the same methods, states,
errors and ``state_dict``. What it adds: ``backward``, bounds for the scale, agreement between ranks, ``skipped``, and
``overflow`` to say where a skipped step came from. On one rank nothing it adds waits for the device before it is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state
from torch.distributed.algorithms.join import Joinable

from fxamp.errors import FxampError
from fxamp.scaling.advice import Advice, advise
from fxamp.scaling.checks import check_loss, checked_bounds, checked_scale, widened
from fxamp.scaling.gradients import clip_gradients
from fxamp.scaling.overflow import Overflow, explain
from fxamp.scaling.ranks import Group
from fxamp.scaling.skips import Skips
from fxamp.scaling.stepping import Stepping, combined
from fxamp.scaling.trail import CLOCK

__all__ = ["GradScaler"]

_CLOSURE = "Closure use is not currently supported if GradScaler is enabled."


class GradScaler(Stepping):
    """A ``torch.amp.GradScaler`` with bounds, with one mind on all ranks, and with answers about skipped steps.

    The scale is halved after every skipped step. In torch's scaler a long run of bad batches takes it to 0: it
    never grows again, and the next good batch is unscaled by 1/0 and turns the parameters into NaN. Here it
    stops at ``min_scale``, and after ``max_skips`` skipped steps in a row ``update`` raises an error with the report
    of ``overflow()``.

    The default floor is 2**-14, the smallest normal float16: a gradient of 1 is still exact to all of its bits at
    that scale, and gradients up to 65504 * 2**14 (about 1e9) fit; no smaller scale can save a step worth taking. It is
    not 1, because a loss summed over a large batch may need a scale below 1: no step is lost that torch's scaler
    takes. The default cap is 2**24, as in apex: what is lost in float16 then is below 2**-48, and a scale that grew
    while gradients were zero is back at a useful size within ``max_skips`` steps. 20 of these take the default
    ``init_scale`` of 2**16 to 2**-4, where gradients of a million fit: what overflows there is not the scale's doing.
    Bounds are arguments, not states: the ``state_dict`` is torch's own.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        init_scale: the first scale.
        growth_factor: what the scale is multiplied by after ``growth_interval`` good steps in a row.
        backoff_factor: what the scale is multiplied by after a skipped step.
        growth_interval: the good steps in a row that let the scale grow.
        enabled: False makes every method pass its argument on; bfloat16 needs no scaling.
        min_scale: the floor that ``update()`` and ``load_state_dict()`` keep to; 0.0 leaves torch's
            behaviour. An ``init_scale`` below the default floor becomes the floor.
        max_scale: the cap, alike; ``math.inf`` leaves torch's behaviour, to grow up to the end of float32. An
            ``init_scale`` above the default cap becomes the cap.
        max_skips: how many iterations in a row with a skipped step are an error; None: any number is not. With a
            fused optimizer it takes up to three times as many, for nothing waits for the device.
        process_group: the ranks that skip a step together when one of them must. None: all of them, when
            ``torch.distributed`` is initialised at that time; False: this one decides on its own. All ranks of the
            group have to step this scaler's optimizers at the same time. With uneven inputs, in
            ``with Join([ddp, scaler]):`` of ``torch.distributed.algorithms.join``, it is the gradients that tell.

    Raises:
        FxampError: when ``min_scale`` or ``max_scale`` is no bound for ``init_scale``, or ``max_skips`` is not
            positive.

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
        max_scale: float | None = None,
        max_skips: int | None = 20,
        process_group: Group | Literal[False] | None = None,
    ) -> None:
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        Joinable.__init__(self)
        self._bounds = checked_bounds(min_scale, max_scale, init_scale)
        if max_skips is not None and max_skips < 1:
            raise FxampError(f"max_skips={max_skips}: expected a positive number", hint="None lets any number pass")
        self.process_group = process_group
        self._skips = Skips(max_skips)

    @staticmethod
    def advise(
        amp: torch.nn.Module, batches: Iterable[Any], loss: Callable[[Any, Any], torch.Tensor] | None = None
    ) -> Advice:
        """Measures what float16 would lose of the gradients at each scale, and says which scale to start with.

        The graph is run in float32 on each batch, forward and backward. Parameters, their gradients, buffers and
        random generators are afterwards as they were.

        Args:
            amp: a module that was converted to float16.
            batches: a few; each is a tuple of inputs, or one input, of ``amp``.
            loss: of ``amp`` and a batch, one number; None: the loss that ``amp`` returns first.

        Returns:
            Printed, a table of shares; ``advice.init_scale`` is for a ``GradScaler``.

        Raises:
            FxampError: when ``amp`` is something else, there is no batch, or no gradient in float16.

        Example::

            >>> import fxamp
            >>> amp = fxamp.convert(torch.nn.Linear(1, 1), dtype=torch.float16, device_type="cpu")
            >>> advice = GradScaler.advise(amp, [torch.ones(4, 1)], lambda amp, x: amp(x).float().sum() * 2**-20)
            >>> advice.init_scale, advice.lost(1.0), advice.rounded(1.0), advice.lost(2.0**-10)
            (16777216.0, 0.0, 1.0, 1.0)
        """
        return advise(amp, batches, loss)

    @property
    def min_scale(self) -> float:
        """The scale that ``update()`` and ``load_state_dict()`` do not go below."""
        return self._bounds[0]

    @property
    def max_scale(self) -> float:
        """The scale that ``update()`` and ``load_state_dict()`` do not go above."""
        return self._bounds[1]

    @property
    def skipped(self) -> bool:
        """Whether the last ``step`` was skipped, because a gradient was not finite.

        False before the first step. Without a fused optimizer the host knows; with one, reading it waits for the
        device, and nothing before that does. A learning rate follows it: ``if not scaler.skipped: scheduler.step()``.
        """
        return self._skips.last

    def scale(self, outputs: Any) -> Any:
        """The outputs multiplied by the scale.

        Args:
            outputs: a tensor, or an iterable of them and of iterables. A float16 one with one element is
                multiplied in float32, so the product itself cannot overflow.
        """
        if not self._enabled:
            return outputs
        CLOCK.scaled += 1
        return super().scale(widened(outputs))

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Run ``self.scale(loss).backward(**kwargs)``.

        Args:
            loss: a tensor with one real floating-point element.
            kwargs: passed on to ``torch.Tensor.backward``.

        Raises:
            FxampError: when the loss is something else, also when the scaler is disabled.
        """
        check_loss(loss)
        self.scale(loss).backward(**kwargs)

    def step(
        self, optimizer: torch.optim.Optimizer, *args: Any, clip_norm: float | None = None, **kwargs: Any
    ) -> float | None:
        """Unscale the gradients, then run ``optimizer.step()``, or skip it if one of them is not finite.

        Args:
            optimizer: the optimizer that applies the gradients.
            args: passed on to ``optimizer.step``; a closure is refused.
            clip_norm: the most that the norm of all gradients of the optimizer together may be; larger ones are made
                smaller in proportion, by ``torch.nn.utils.clip_grad_norm_``, also when the scaler is disabled.
            kwargs: passed on to ``optimizer.step``; a closure is refused.

        Returns:
            What ``optimizer.step`` returned, None when the step was skipped.

        Raises:
            GradientError: when a gradient is float16 and the optimizer is not fused.
            RuntimeError: for a closure, or a second step before ``update``, as in torch's.
        """
        if not self._enabled:
            clip_gradients(optimizer, clip_norm)
            return super().step(optimizer, *args, **kwargs)
        if "closure" in kwargs or any(callable(arg) for arg in args):
            # torch refuses closure= alone; a positional one would run on gradients nobody unscaled.
            raise RuntimeError(_CLOSURE)
        self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if clip_norm is not None:
            if state["stage"] is OptState.READY:
                self.unscale_(optimizer)
            if fused:
                clip_gradients(optimizer, clip_norm)
            else:
                state["clip_norm"] = clip_norm
        step = self._fused_step if fused else self._checked_step
        result = step(optimizer, state, *args, **kwargs)
        state["stage"] = OptState.STEPPED
        self._skips.stepped(optimizer, tuple(state["found_inf_per_device"].values()), state.pop("skipped", None))
        return result

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Adapt the scale to what the steps of this iteration found, within its bounds.

        Args:
            new_scale: a scale to set instead, taken as it is, out of the bounds too.

        Raises:
            FxampError: when ``max_skips`` iterations in a row had a skipped step, with the report of ``overflow()``;
                the scaler is ready for the next iteration all the same. Also for a ``new_scale`` that is no scale.
        """
        if new_scale is not None or not self._enabled:
            super().update(checked_scale(new_scale))
            self._skips.updated(None)
            return
        scale, tracker = self._check_scale_growth_tracker("update")
        states = self._per_optimizer_states.values()
        flags = [flag for state in states for flag in state["found_inf_per_device"].values()]
        if not flags and all(state["stage"] is OptState.READY for state in states):
            raise AssertionError("No inf checks were recorded prior to update.")
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        if not flags:
            return  # there was nothing to unscale
        flag = combined(flags, scale)
        factors = self._growth_factor, self._backoff_factor, self._growth_interval
        torch._amp_update_scale_(scale, tracker, flag, *factors)
        scale.clamp_(*self._bounds)  # on the device: no sync
        if self._skips.updated(flag):
            raise self._too_many_skips()

    def _too_many_skips(self) -> FxampError:
        report = str(explain(self._skips.suspect, self._skips.span)).replace("\n", "\n  ")
        count, scale = self._skips.limit, self.get_scale()
        return FxampError(
            f"{count} iterations in a row had a skipped step, and the scale is down to {scale:g}\n  {report}",
            hint="mend what the report names; GradScaler(max_skips=...) allows more, for a scale that starts too high",
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this scaler or of torch's, with the scale taken into the bounds.

        Args:
            state_dict: what ``state_dict()`` returned.
        """
        if self._enabled and state_dict:
            least, most = self._bounds
            state_dict = state_dict | {"scale": min(max(state_dict["scale"], least), most)}
        super().load_state_dict(state_dict)

    def overflow(self) -> Overflow | None:
        """What made the last step skip, or None when it was not skipped.

        The calls of converted modules that the gradients came from are run again, on the inputs they had, and searched
        for the first value that is not finite; so call it before their next call. For what cannot be run again, the
        gradients are looked at as they are now; so call it before ``zero_grad()``. It speaks of this rank alone,
        and runs nothing again where each rank has a part of the parameters, as with FSDP.
        """
        if not self.skipped:
            return None
        return explain(self._skips.optimizer, self._skips.span)

    def _twin(self) -> GradScaler:
        """Another scaler with these settings and this scale, that has made no step yet."""
        twin: GradScaler = object.__new__(type(self))
        state = {"_init_scale": self.get_scale(), "_init_growth_tracker": self._get_growth_tracker()}
        fresh = {"_scale": None, "_growth_tracker": None, "_skips": Skips(self._skips.limit), "_joined": False}
        twin.__dict__.update(self.__dict__ | state | fresh)
        twin._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to this process stays here: the copy has made no step yet.
        state = super().__getstate__() | {"_skips": Skips(self._skips.limit), "_joined": False}
        return state | ({} if self.process_group is False else {"process_group": None})
