"""Which calls of converted modules do the gradients come from?

A call is kept, with the inputs it had, from its backward pass until the first call of the next iteration. Nothing is
computed for it and nothing copied but the state of the random generators, where the graph draws numbers; the tensors
are those that the training loop holds anyway. ``fxamp.scaling.search`` runs the kept calls again, when someone asks.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.utils._pytree import tree_leaves

from fxamp.plan import PrecisionPlan

__all__ = ["CLOCK", "Call", "Trail", "draws_numbers", "tensors_of", "trails"]

_MOST_CALLS: Final = 64  # of one iteration; a loop that never updates a scaler keeps no more inputs than these
_TRAILS: weakref.WeakSet[Trail] = weakref.WeakSet()


@dataclass
class _Clock:
    """What the scalers of this process have done: how often they scaled, and how many iterations they ended."""

    scaled: int = 0
    updated: int = 0


CLOCK: Final = _Clock()


class Call:
    """One call of a converted module.

    Attributes:
        variant: the graph that ran.
        values: of its placeholders.
        passes: for each backward pass, the gradients that arrived at the outputs, by their place in the result.
    """

    def __init__(self, trail: Trail, variant: Any, values: Sequence[Any]) -> None:
        self.variant = variant
        self.values = values
        self.passes: list[dict[int, torch.Tensor]] = []
        self._trail = weakref.ref(trail)
        self._scaled = CLOCK.scaled
        self._random = _random_state() if variant.draws else None
        self._versions = [_version(value) for value in values]

    def follow(self, result: Any) -> None:
        """Asks the outputs for the gradients that they will get."""
        for i, output in enumerate(tensors_of(result)):
            function = output.grad_fn
            if function is not None:  # of its hooks the cheapest to call
                function.register_prehook(functools.partial(self._arrived, i, output.output_nr))

    def _arrived(self, place: int, number: int, gradients: tuple[torch.Tensor | None, ...]) -> None:
        gradient = gradients[number]
        if gradient is None:
            return
        if not self.passes or place in self.passes[-1]:
            self.passes.append({})
        self.passes[-1][place] = gradient.detach() if gradient.requires_grad else gradient
        trail = self._trail()
        if trail is not None and self._scaled != CLOCK.scaled:  # one of our scalers is at work
            trail.keep(self)

    def was_written_to(self) -> bool:
        """Whether an input is not what it was."""
        return self._versions != [_version(value) for value in self.values]

    def restore_random_state(self) -> None:
        """Makes the graph draw the numbers that it drew."""
        if self._random is not None:
            cpu, cuda = self._random
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda)


class Trail:
    """The calls of one converted module since the last step."""

    def __init__(self, module: Any) -> None:
        self._module = weakref.ref(module)
        self._calls: list[Call] = []
        self._iteration = 0
        _TRAILS.add(self)

    @property
    def module(self) -> Any:
        """The converted module; None when it is gone."""
        return self._module()

    def calls_of(self, span: range) -> list[Call]:
        """Those with a backward pass, if they are from one of these iterations, in the order of these passes."""
        return self._calls if self._iteration in span else []

    def run(self, module: Any, variant: Any, values: Sequence[Any]) -> Any:
        """The result of the call."""
        if self._iteration != CLOCK.updated:
            self._iteration, self._calls = CLOCK.updated, []
        call = Call(self, variant, values)
        result = module._run(variant, values)
        call.follow(result)
        return result

    def keep(self, call: Call) -> None:
        """Notes that a call had a backward pass."""
        if call not in self._calls:
            self._calls = [*self._calls[1 - _MOST_CALLS :], call]


def trails() -> Iterator[Trail]:
    """Those of all converted modules that there are."""
    return (trail for trail in list(_TRAILS) if trail.module is not None)


def tensors_of(result: Any) -> list[torch.Tensor]:
    """The tensors in the result of a call, in order."""
    values = (result,) if isinstance(result, torch.Tensor) else result
    if type(values) is not tuple or not all(isinstance(value, torch.Tensor) for value in values):
        values = tree_leaves(result)
    return [value for value in values if isinstance(value, torch.Tensor)]


def draws_numbers(plan: PrecisionPlan) -> bool:
    """Whether a graph may use a random generator."""
    return any(decision.rule == "opaque" or _draws(decision.aten) for decision in plan)


@functools.cache
def _draws(aten: str) -> bool:
    packet = getattr(torch.ops.aten, aten, None) if aten else None
    overloads = (getattr(packet, name) for name in packet.overloads()) if packet is not None else ()
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


def _random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0
