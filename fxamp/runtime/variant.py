"""One graph of a converted module, and the calls it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxamp.capture import Program, Traced, grad_mode
from fxamp.errors import CaptureError, describe
from fxamp.plan import PrecisionPlan
from fxamp.runtime.footing import Footing

__all__ = ["Variant"]


@dataclass
class Variant:
    """One graph: as traced, as planned, as rewritten, as compiled."""

    traced: Traced
    plan: PrecisionPlan
    graph: fx.Graph
    footing: Footing
    function: Any = None
    code: str = ""
    ambient: bool = False
    guarded: bool = False
    mode_flags: tuple[tuple[nn.Module, bool], ...] = ()
    asked: tuple[int, ...] = ()  # placeholders whose type the model asked for
    tensors: tuple[tuple[Callable[[], Any], str, Any], ...] = ()  # what the model asked of its own, and the answers
    particular: bool = False  # whether it is not for every grad mode, whatever its tensors and numbers

    @staticmethod
    def of(program: Program, traced: Traced, plan: PrecisionPlan, graph: fx.Graph) -> Variant:
        """The graph of a program's trace."""
        tensors = tuple((program.reader(path), name, value) for (path, name), value in traced.tensors.items())
        particular = bool(traced.grad or tensors) or traced.asks_numbers()
        return Variant(traced, plan, graph, Footing(program, traced), tensors=tensors, particular=particular)

    def serves(self, values: Sequence[Any]) -> bool:
        """Whether it is for the current grad mode and tensors, and for these values of the placeholders."""
        return (
            self.traced.grad in ((), (grad_mode(),))
            and all(getattr(read(), name) == value for read, name, value in self.tensors)
            and self.traced.goes_this_way(values)
        )

    def check_kinds(self, values: Sequence[Any]) -> None:
        """Refuses another value than a tensor where the model asked for its type.

        Raises:
            CaptureError: when there is one.
        """
        names = [node.name for node in self.traced.graph.nodes if node.op == "placeholder"]
        for i in self.asked:
            if not isinstance(values[i], torch.Tensor):
                raise CaptureError(
                    f"the graph was traced with a tensor for '{names[i]}', whose type the model asks for; "
                    f"found {describe(values[i])}",
                    hint="convert with example_inputs=... that have it",
                )
