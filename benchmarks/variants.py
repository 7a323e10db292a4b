"""In which ways is a model run? A variant makes of a model, and of its batch, a call that does one step.

A training step is forward, loss, backward, and gradients set to None. It has no optimizer: an optimizer step is in
float32 in every variant, the same work in each, and would only hide what differs. For the same reason float16 is
measured without a gradient scaler. An inference is the model alone, in eval mode and without gradients.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fxamp
from benchmarks.cases import Batch, Case

__all__ = ["AUTOCAST", "FLOAT32", "FLOOR", "PHASES", "VARIANTS", "Built", "Made", "Setting", "Step", "made_of"]

PHASES = ("training", "inference")
FLOAT32, AUTOCAST, FLOOR = "float32", "autocast", "wholly low"


@dataclass(frozen=True)
class Setting:
    """On what, in which low dtype, and whether through ``torch.compile``."""

    device: str
    dtype: torch.dtype
    compiled: bool = False

    def run(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled where that is what is measured."""
        return torch.compile(function) if self.compiled else function


@dataclass(frozen=True)
class Step:
    """What is timed. ``forward`` gives the loss, or in inference the output."""

    forward: Callable[[], Tensor]
    parameters: tuple[nn.Parameter, ...]
    training: bool

    def __call__(self) -> None:
        if self.training:
            self.forward().backward()
            self.clear()
        else:
            with torch.no_grad():
                self.forward()

    def clear(self) -> None:
        """Ends a training step as ``optimizer.zero_grad()`` does."""
        for parameter in self.parameters:
            parameter.grad = None


@dataclass(frozen=True)
class Made:
    """A case on a device, in one phase: what a variant starts from, and shares with the others."""

    setting: Setting
    training: bool
    model: nn.Module
    batch: Batch
    loss: Callable[..., Tensor]

    def forward(self, model: nn.Module, low: torch.dtype | None = None) -> Callable[[], Tensor]:
        """The model and in training its loss, by hand."""
        inputs, targets = ([_cast(x, low) for x in part] for part in self.batch)
        loss = self.loss
        whole = self.setting.run((lambda *x: loss(model(*x), *targets)) if self.training else model)
        return lambda: whole(*inputs)

    def step(self, forward: Callable[[], Tensor], model: nn.Module) -> Step:
        """A step, with the parameters that get gradients in it."""
        return Step(forward, tuple(model.parameters()) if self.training else (), self.training)


@dataclass(frozen=True)
class Built:
    """One step, and the seconds that its conversion took; None where nothing was converted."""

    step: Step
    conversion_seconds: float | None = None


def made_of(case: Case, phase: str, setting: Setting) -> Made:
    """The model and the batch of a case, always the same ones."""
    torch.manual_seed(0)
    model = case.make().to(setting.device).train(phase == "training")
    return Made(setting, phase == "training", model, case.inputs(setting.device), case.loss)


def _cast(value: Tensor, low: torch.dtype | None) -> Tensor:
    return value.to(low) if low is not None and value.is_floating_point() else value


# -- one of each -----------------------------------------------------------------------------------------


def _float32(made: Made) -> Built:
    return Built(made.step(made.forward(made.model), made.model))


def _autocast(made: Made) -> Built:
    forward, device, dtype = made.forward(made.model), made.setting.device, made.setting.dtype

    def under_autocast() -> Tensor:
        with torch.autocast(device, dtype):
            return forward()

    return Built(made.step(under_autocast, made.model))


def _wholly_low(made: Made) -> Built:
    """The floor: no cast at all. The loss too is in the low dtype."""
    low = copy.deepcopy(made.model).to(made.setting.dtype)
    return Built(made.step(made.forward(low, made.setting.dtype), low))


def _converted(made: Made, *, policy: str, shapes: bool = False, frozen: bool = False) -> Built:
    inputs, targets = made.batch
    values = (*inputs, *targets) if made.training else inputs
    start = time.perf_counter()
    amp = fxamp.convert(
        made.model,
        made.loss if made.training else None,
        example_inputs=values if shapes else None,
        policy=policy,
        dtype=made.setting.dtype,
    )
    seconds = time.perf_counter() - start
    amp.train(made.training)
    whole = made.setting.run(amp.freeze() if frozen else amp)
    forward = (lambda: whole(*values)[0]) if made.training else lambda: whole(*values)
    return Built(made.step(forward, made.model), seconds)


def _all_converted(frozen: bool) -> dict[str, Callable[[Made], Built]]:
    ways = {"fxamp autocast": ("autocast", False), "fxamp fast": ("fast", False), "fxamp fast, shapes": ("fast", True)}
    end = ", frozen" if frozen else ""
    return {f"{name}{end}": partial(_converted, policy=p, shapes=s, frozen=frozen) for name, (p, s) in ways.items()}


_PLAIN: dict[str, Callable[[Made], Built]] = {FLOAT32: _float32, AUTOCAST: _autocast, **_all_converted(frozen=False)}
VARIANTS = {
    "training": {**_PLAIN, FLOOR: _wholly_low},
    "inference": {**_PLAIN, **_all_converted(frozen=True), FLOOR: _wholly_low},
}
