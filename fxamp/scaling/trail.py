"""Which calls of converted modules do the gradients come from?

A call is kept, with the inputs it had, until the first call of the next iteration. Nothing is computed for it and
nothing copied but the state of the random generators, where the graph draws numbers; the tensors are those that the
training loop holds anyway, and there is a bound for those that it does not. ``fxamp.scaling.search`` runs the kept
calls again, when someone asks.
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

# Of inputs and of gradients of outputs that are kept beyond the newest call, as with many calls before one step.
_MOST_BYTES: Final = 256 << 20
_TRAILS: weakref.WeakSet[Trail] = weakref.WeakSet()


@dataclass
class _Clock:
    """How often the scalers of this process scaled, how many iterations they ended, and how many calls there were."""

    scaled: int = 0
    updated: int = 0
    called: int = 0


CLOCK: Final = _Clock()


class Call:
    """One call of a converted module.

    Attributes:
        variant: the graph that ran.
        values: of its placeholders, without the history of these.
        passes: for each backward pass, the gradients that arrived at the outputs, by their place in the result; None
            for one that is too large to be kept.
        bytes: what the values take.
        tasks: the numbers that autograd has for these passes.
        number: of this call, among those of all modules.
    """

    def __init__(self, trail: Trail, variant: Any, values: Sequence[Any]) -> None:
        self.variant = variant
        self.values = [_without_history(value) for value in values]
        self.passes: list[dict[int, torch.Tensor | None]] = []
        self.bytes = sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
        self.tasks: set[int] = set()
        CLOCK.called += 1
        self.number = CLOCK.called
        self._trail = weakref.ref(trail)
        self._scaled = CLOCK.scaled
        self._random = _random_state() if variant.draws else None
        self._versions = [_version(value) for value in values]

    def follow(self, result: Any) -> None:
        """Asks the outputs for the gradients that they will get; they do not keep this call, nor it them."""
        link = _Link(self)
        for i, output in enumerate(tensors_of(result)):
            function = output.grad_fn
            if function is not None:  # of its hooks the cheapest to call
                function.register_prehook(functools.partial(link.arrived, i, output.output_nr))
        self._link = weakref.ref(link, functools.partial(_unlinked, self._trail, weakref.ref(self)))

    def arrived(self, place: int, gradient: torch.Tensor) -> None:
        """Notes the gradient of an output."""
        if not self.passes or place in self.passes[-1]:
            self.passes.append({})
        kept = gradient if gradient.nbytes <= _MOST_BYTES else None
        self.tasks.add(torch._C._current_graph_task_id())
        self.passes[-1][place] = kept.detach() if kept is not None and kept.requires_grad else kept
        trail = self._trail()
        if trail is not None and self._scaled == CLOCK.scaled:  # none of our scalers is at work
            trail.drop(self)

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
        self._bytes = 0
        self._iteration = 0
        _TRAILS.add(self)

    @property
    def module(self) -> Any:
        """The converted module; None when it is gone."""
        return self._module()

    def calls_of(self, span: range) -> list[Call]:
        """Those with a backward pass, if they are from one of these iterations, in their order."""
        return [call for call in self._calls if call.passes] if self._iteration in span else []

    def run(self, module: Any, variant: Any, values: Sequence[Any]) -> Any:
        """The result of the call."""
        if self._iteration != CLOCK.updated:
            self._iteration, self._calls, self._bytes = CLOCK.updated, [], 0
        if captures_graph():
            return module._run(variant, values)
        call = Call(self, variant, values)
        self._bytes += call.bytes
        while self._bytes > _MOST_BYTES and self._calls:
            self.drop(self._calls[0])
        self._calls.append(call)
        result = module._run(variant, values)
        call.follow(result)
        return result

    def drop(self, call: Call) -> None:
        """Forgets a call."""
        if call in self._calls:
            self._calls.remove(call)
            self._bytes -= call.bytes


def captures_graph() -> bool:
    """Whether what runs now is recorded as a CUDA graph, in which the host can ask for nothing."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def _unlinked(of_trail: weakref.ref[Trail], of_call: weakref.ref[Call], _: Any) -> None:
    """The graph of the outputs is gone; without a backward pass so far there will be none."""
    trail, call = of_trail(), of_call()
    if trail is not None and call is not None and not call.passes:
        trail.drop(call)


class _Link:
    """What the nodes of autograd hold of a call, as long as they live."""

    def __init__(self, call: Call) -> None:
        self._call = weakref.ref(call)

    def arrived(self, place: int, number: int, gradients: tuple[torch.Tensor | None, ...]) -> None:
        """Tells the call of a gradient, if there is one and it is still kept."""
        call, gradient = self._call(), gradients[number]
        if call is not None and gradient is not None:
            call.arrived(place, gradient)


def _without_history(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return value.detach().requires_grad_()
    return value


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
