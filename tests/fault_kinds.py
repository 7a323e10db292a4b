"""The kinds of faults: what is changed in a model before it is converted, and switched on for one step.

Nothing but the values of tensors tells a run with the fault on from one with it off, so the graph is the same.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.fault_wrappers import Hooked, Multiplied, Wrapper, map_first

__all__ = ["KINDS", "Fault", "parameter_of"]

INF, NAN = float("inf"), float("nan")
NON_FINITE = (INF, -INF, NAN)


class Fault:
    """What goes wrong in a layer: here nothing, but that the scale is too large.

    Attributes:
        values: to draw from.
        overflows: whether float32 would hold what float16 does not.
        outside: whether no graph has a part in it, so that there is the parameter to name, and nothing else.
        place: the "layer" itself, the "input" or the "parameter" of it, or the "data" or the "target" of the model.
    """

    values: tuple[float, ...] = (0.0,)
    overflows = False
    outside = False
    place = "layer"

    def __init__(self, value: float) -> None:
        self.value = value
        self.kept: torch.Tensor | None = None

    def put(self, model: nn.Module, layer: str) -> None:
        """Changes the model before it is converted."""

    def switch(self, model: nn.Module, layer: str, on: bool) -> None:
        """Switches it on or off."""

    def given(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The input and the target at the faulty step."""
        return x, y

    def written(self, model: nn.Module, layer: str) -> None:
        """What happens between the backward pass and the step."""


# -- values ----------------------------------------------------------------------------------------


class NonFiniteWeight(Fault):
    values = NON_FINITE
    place = "parameter"

    def switch(self, model: nn.Module, layer: str, on: bool) -> None:
        weight = parameter_of(model, layer).detach()
        if on:
            self.kept = weight.clone()
            self.change(weight)
        elif self.kept is not None:
            weight.copy_(self.kept)
            self.kept = None

    def change(self, weight: torch.Tensor) -> None:
        weight.view(-1)[-1] = self.value


class LargeWeight(NonFiniteWeight):
    values = (6e4, 1e5, -1e6)
    overflows = True

    def change(self, weight: torch.Tensor) -> None:
        weight.mul_(self.value / weight.abs().amax())


class NonFiniteInput(Fault):
    values = NON_FINITE
    place = "data"

    def given(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.change(x), y

    def change(self, data: torch.Tensor) -> torch.Tensor:
        data = data.clone()
        data.view(-1)[1] = self.value
        return data


class LargeInput(NonFiniteInput):
    values = (1e5, -1e6)
    overflows = True


class NonFiniteTarget(NonFiniteInput):
    place = "target"

    def given(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, self.change(y)


# -- calls -----------------------------------------------------------------------------------------


class _Call(Fault):
    """What a wrapper does to the output of a layer."""

    wrapper = Wrapper

    def put(self, model: nn.Module, layer: str) -> None:
        parent, _, name = layer.rpartition(".")
        setattr(model.get_submodule(parent), name, self.wrapper(model.get_submodule(layer), self.change))

    def switch(self, model: nn.Module, layer: str, on: bool) -> None:
        model.get_submodule(layer).get_buffer("gain").fill_(self.value if on else 1.0)

    @staticmethod
    def change(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x * gain


class Gain(_Call):
    """An activation is multiplied."""

    values = (*NON_FINITE, 1e30)


class LargeGain(_Call):
    values = (1e5, 1e7)
    overflows = True


class Quotient(_Call):
    """A division by zero, of zeros too."""

    values = (0.0,)

    @staticmethod
    def change(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x / gain


class Logarithm(_Call):
    """The logarithm of a number that is not positive."""

    values = (0.0, -1.0)

    @staticmethod
    def change(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x - gain.log()


class Root(_Call):
    """The root of a sum of squares at 0: the forward is finite, and the gradient is not."""

    values = (0.0,)

    @staticmethod
    def change(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x + (0.0 * x + gain).square().sum().sqrt()


class Row(_Call):
    """A softmax of which nothing is left by a mask: that of an attention, where there is one."""

    values = (-INF,)

    def switch(self, model: nn.Module, layer: str, on: bool) -> None:
        super().switch(model, layer, on)
        for name, mask in model.named_buffers():
            if name.endswith("mask"):
                mask[0, 0] = -INF if on else 0.0
            elif name.endswith("later"):
                mask[0, 0] = on

    @staticmethod
    def change(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x + (x + torch.where(gain == 1, 0.0, gain)).softmax(-1)


class Backward(_Call):
    values = (*NON_FINITE, 1e30)

    @staticmethod
    def change(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return Multiplied.apply(x, gain)


class LargeBackward(Backward):
    values = (1e7, 1e9)


# -- hooks -----------------------------------------------------------------------------------------


class _Hook(_Call):
    """A hook of a layer, which reads a buffer of it."""

    values = NON_FINITE

    def put(self, model: nn.Module, layer: str) -> None:
        module = model.get_submodule(layer)
        module.register_buffer("gain", torch.ones(()))
        self.register(module)

    def register(self, module: nn.Module) -> None:
        raise NotImplementedError


class ForwardHook(_Hook):
    def register(self, module: nn.Module) -> None:
        module.register_forward_hook(lambda owner, args, output: map_first(output, lambda x: x * owner.gain))


class ForwardPreHook(_Hook):
    place = "input"

    def register(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda owner, args: (args[0] * owner.gain,))


class BackwardHook(_Hook):
    place = "input"

    def put(self, model: nn.Module, layer: str) -> None:
        for module in model.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # torch refuses it behind such a hook
        super().put(model, layer)

    def register(self, module: nn.Module) -> None:
        module.register_full_backward_hook(
            lambda owner, into, out: tuple(g if g is None else g * owner.gain for g in into)
        )


class ActivationHook(_Call):
    values = NON_FINITE
    wrapper = Hooked


class ParameterHook(Fault):
    """A hook of a parameter, which is no part of a graph."""

    values = NON_FINITE
    place = "parameter"
    outside = True
    gain = 1.0

    def put(self, model: nn.Module, layer: str) -> None:
        parameter_of(model, layer).register_hook(lambda gradient: gradient * self.gain)

    def switch(self, model: nn.Module, layer: str, on: bool) -> None:
        self.gain = self.value if on else 1.0


class Written(Fault):
    """A gradient that the loop itself writes to."""

    values = NON_FINITE
    place = "parameter"
    outside = True

    def written(self, model: nn.Module, layer: str) -> None:
        gradient = parameter_of(model, layer).grad
        assert gradient is not None
        (gradient._values() if gradient.is_sparse else gradient).view(-1)[0] = self.value


KINDS: dict[str, type[Fault]] = {
    "weight not finite": NonFiniteWeight,
    "weight too large": LargeWeight,
    "input not finite": NonFiniteInput,
    "input too large": LargeInput,
    "target not finite": NonFiniteTarget,
    "activation not finite": Gain,
    "activation too large": LargeGain,
    "division by zero": Quotient,
    "logarithm": Logarithm,
    "softmax of nothing": Row,
    "root at zero": Root,
    "gradient not finite": Backward,
    "gradient too large": LargeBackward,
    "scale too large": Fault,
    "forward hook": ForwardHook,
    "forward pre-hook": ForwardPreHook,
    "backward hook": BackwardHook,
    "hook on an activation": ActivationHook,
    "hook on a parameter": ParameterHook,
    "written gradient": Written,
}


def parameter_of(model: nn.Module, layer: str) -> nn.Parameter:
    """The first parameter of a layer."""
    return next(model.get_submodule(layer).parameters())
