"""One graph of a converted module, and the calls it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from fxamp.capture import Program, Traced, grad_mode
from fxamp.capture.questions import Questions
from fxamp.errors import CaptureError, describe
from fxamp.plan import PrecisionPlan
from fxamp.runtime.footing import Footing

__all__ = ["Variant"]


@dataclass
class Variant:
    """One graph: as traced, as planned, as rewritten, as compiled."""

    traced: Traced
    plan: PrecisionPlan
    made: fx.Graph | Callable[[], fx.Graph]
    footing: Footing
    function: Any = None
    code: str = ""
    ambient: bool = False
    guarded: bool = False
    draws: bool = False  # from a random generator, perhaps
    mode_flags: tuple[tuple[nn.Module, bool], ...] = ()
    asked: tuple[int, ...] = ()  # placeholders whose type the model asked for
    tensors: tuple[tuple[Callable[[], Any], str, Any], ...] = ()  # what the model asked of its own, and the answers
    observed: tuple[tuple[torch.dtype, bool] | None, ...] = ()  # dtype, and whether 0-dim, of the example inputs
    by_rule: Variant | None = None  # planned without them
    questions: Questions | None = None  # that a call's arguments answer
    of_questions: tuple[Callable[[], Any], ...] = ()  # the tensors that these need
    particular: bool = False  # whether it is not for every grad mode, whatever its tensors and arguments

    @staticmethod
    def of(
        program: Program,
        traced: Traced,
        plan: PrecisionPlan,
        made: fx.Graph | Callable[[], fx.Graph],
        examples: Sequence[Any] | None = None,
    ) -> Variant:
        """The graph of a program's trace, planned for such examples when there are any."""
        tensors = _readers(program, traced)
        particular = bool(traced.grad or tensors or traced.questions or traced.fits)
        observed = tuple(map(_observed, examples or ()))
        footing = Footing(program, traced)
        return Variant(
            traced,
            plan,
            made,
            footing,
            tensors=tensors,
            observed=observed,
            questions=traced.questions or None,
            of_questions=_of_questions(program, traced),
            particular=particular,
        )

    @property
    def graph(self) -> fx.Graph:
        """The rewritten graph; it is made when it is asked for first."""
        if not isinstance(self.made, fx.Graph):
            self.made = self.made()
        return self.made

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        self.made = graph

    def in_mode(self, mode: str, rewrite: Callable[[Traced, PrecisionPlan], fx.Graph]) -> Variant:
        """The same for another mode, for which nothing is traced or decided otherwise; its graph is one of its own."""
        plan = replace(self.plan, mode=mode)
        return replace(self, plan=plan, made=partial(rewrite, self.traced, plan), function=None, code="", by_rule=None)

    def over(self, program: Program, clone: Callable[[Any], Any]) -> Variant:
        """The same graph over the modules of a clone of its program."""
        flags = tuple((clone(module), flag) for module, flag in self.mode_flags)
        footing, tensors = Footing(program, self.traced), _readers(program, self.traced)
        needed = _of_questions(program, self.traced)
        return replace(self, footing=footing, tensors=tensors, of_questions=needed, mode_flags=flags, by_rule=None)

    def of_frozen(self, program: Program) -> Variant:
        """The same graph over weights in the low dtype, which is no news to what the model asked of them."""
        traced = replace(self.traced, tensors={})
        return replace(Variant.of(program, traced, self.plan, self.graph), observed=self.observed)

    def fits(self, values: Sequence[Any]) -> bool:
        """Whether the dtypes of these inputs are those that it was planned for, when it was planned for some."""
        for value, expected in zip(values, self.observed, strict=False):
            if expected is not None and isinstance(value, torch.Tensor):
                dtype, scalar = expected
                if value.dtype is not dtype or (value.dim() == 0) is not scalar:
                    return False
        return True

    def serves(self, values: Sequence[Any]) -> bool:
        """Whether it is for the current grad mode and tensors, and for these values of the placeholders."""
        return (
            (not self.traced.grad or self.traced.grad == (grad_mode(),))
            and all(getattr(read(), name) == value for read, name, value in self.tensors)
            and (self.traced.fits is None or self.traced.fits.problem(values) is None)
            and (self.questions is None or self.questions.are_answered_so(values, self.of_questions))
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


def _readers(program: Program, traced: Traced) -> tuple[tuple[Callable[[], Any], str, Any], ...]:
    return tuple((program.reader(path), name, value) for (path, name), value in traced.tensors.items())


def _of_questions(program: Program, traced: Traced) -> tuple[Callable[[], Any], ...]:
    return tuple(map(program.reader, traced.questions.tensors))


def _observed(example: Any) -> tuple[torch.dtype, bool] | None:
    return (example.dtype, example.dim() == 0) if isinstance(example, torch.Tensor) else None
