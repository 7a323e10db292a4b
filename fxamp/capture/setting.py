"""What surrounds a call of the model: the modes of its modules, autocast, and the grad mode.

A graph is for every setting in which what its trace asked for has the same answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx

from fxamp.capture.fits import Fits
from fxamp.capture.questions import Questions
from fxamp.capture.signature import Layout

__all__ = ["Ambient", "GradMode", "Setting", "Traced", "grad_mode", "grad_mode_as", "kept"]

Ambient: TypeAlias = tuple[str, torch.dtype] | None


class GradMode(NamedTuple):
    """Whether gradients are recorded, and whether ``torch.inference_mode`` is on."""

    enabled: bool
    inference: bool


class Setting(NamedTuple):
    """What surrounds a call.

    ``training`` is the flag of each module by its path; ``ambient`` the device type and dtype of autocast.
    """

    training: Mapping[str, bool]
    ambient: Ambient
    grad: GradMode


@dataclass(frozen=True)
class Traced:
    """One graph of a program.

    Attributes:
        graph: calls of torch functions, methods and leaf modules; no casts of ours.
        layout: which arguments its placeholders stand for.
        untraceable: module path to why it stayed a call.
        modes: path and ``training`` flag of every module whose flag was read.
        ambient: device type and dtype of the autocast that it was traced for (None: of none), in a tuple; empty when
            that made no difference.
        grad: the grad mode that it was traced for, in a tuple; empty when the model did not ask.
        tensors: what the model asked of its own parameters and buffers: path and attribute, to the answer.
        guessed: what was not known while it was traced; the graph checks it.
        frontend: what captured it.
        failed: the frontends that were tried before, with the reason of each.
        fits: the inputs that it is for, when it was captured for such.
        stands_on: the dtype and device of the tensors that it reads, when these may be frozen in it.
        given: the values of the placeholders that it was traced with, when the way follows from these.
    """

    graph: fx.Graph
    layout: Layout
    untraceable: Mapping[str, str] = field(default_factory=dict)
    modes: Mapping[str, bool] = field(default_factory=dict)
    ambient: tuple[()] | tuple[Ambient] = ()
    grad: tuple[()] | tuple[GradMode] = ()
    tensors: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    guessed: str = ""
    frontend: str = "torch.fx"
    failed: Mapping[str, str] = field(default_factory=dict)
    fits: Fits | None = None
    stands_on: Mapping[str, tuple[torch.dtype, torch.device]] = field(default_factory=dict)
    given: tuple[Any, ...] | None = None

    def serves(self, setting: Setting, attribute: Callable[[str], Any]) -> bool:
        """Whether it is also the graph for this setting, and for the tensors that ``attribute`` finds by their path."""
        return (
            self.ambient in ((), (setting.ambient,))
            and self.grad in ((), (setting.grad,))
            and all(setting.training.get(path) == flag for path, flag in self.modes.items())
            and all(getattr(attribute(path), name) == value for (path, name), value in self.tensors.items())
            and all(_place(attribute(path)) == place for path, place in self.stands_on.items())
        )

    @functools.cached_property
    def questions(self) -> Questions:
        """What the arguments of a call tell about the way, before it runs."""
        return Questions(self.graph)

    def goes_this_way(self, values: Sequence[Any], attribute: Callable[[str], Any]) -> bool:
        """Whether a call with these values of the placeholders goes the way of this graph."""
        if self.fits is not None and self.fits.problem(values) is not None:
            return False
        readers = [functools.partial(attribute, path) for path in self.questions.tensors]
        return self.questions.are_answered_so(values, readers)


def kept(value: Any) -> Any:
    """An argument of a call, to make another graph for such calls with: without its history."""
    if not isinstance(value, torch.Tensor):
        return value
    with torch.no_grad():
        return value.detach().clone().requires_grad_(value.requires_grad)


def _place(tensor: torch.Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def grad_mode() -> GradMode:
    """The one that is on."""
    return GradMode(torch.is_grad_enabled(), torch.is_inference_mode_enabled())


@contextmanager
def grad_mode_as(mode: GradMode) -> Iterator[None]:
    """Records gradients or not; never in inference mode, for what a trace makes must not become inference tensors."""
    with torch.inference_mode(False):
        torch._C._set_grad_enabled(mode.enabled)
        yield
