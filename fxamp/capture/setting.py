"""What surrounds a call of the model: the modes of its modules, autocast, and the grad mode.

A graph is for every setting in which what its trace asked for has the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import fx

from fxamp.capture.arguments import map_leaves
from fxamp.capture.calls import expect
from fxamp.capture.fits import Fits
from fxamp.capture.signature import Layout

__all__ = ["Ambient", "GradMode", "Setting", "Traced", "grad_mode", "grad_mode_as"]

Ambient: TypeAlias = tuple[str, torch.dtype] | None

_PLAIN: Final = ("_operator", "builtins", "math")  # where Python's own functions of numbers are


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
        frontend: what captured it.
        failed: the frontends that were tried before, with the reason of each.
        fits: the inputs that it is for, when it was captured for such.
        stands_on: the dtype and device of the tensors that it reads, when these may be frozen in it.
    """

    graph: fx.Graph
    layout: Layout
    untraceable: Mapping[str, str] = field(default_factory=dict)
    modes: Mapping[str, bool] = field(default_factory=dict)
    ambient: tuple[()] | tuple[Ambient] = ()
    grad: tuple[()] | tuple[GradMode] = ()
    tensors: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    frontend: str = "torch.fx"
    failed: Mapping[str, str] = field(default_factory=dict)
    fits: Fits | None = None
    stands_on: Mapping[str, tuple[torch.dtype, torch.device]] = field(default_factory=dict)

    def serves(self, setting: Setting, attribute: Callable[[str], Any]) -> bool:
        """Whether it is also the graph for this setting, and for the tensors that ``attribute`` finds by their path."""
        return (
            self.ambient in ((), (setting.ambient,))
            and self.grad in ((), (setting.grad,))
            and all(setting.training.get(path) == flag for path, flag in self.modes.items())
            and all(getattr(attribute(path), name) == value for (path, name), value in self.tensors.items())
            and all(_place(attribute(path)) == place for path, place in self.stands_on.items())
        )

    def asks_numbers(self) -> bool:
        """Whether the way through the model follows from arguments that are numbers."""
        return any(node.target is expect and node in self._of_numbers() for node in self.graph.nodes)

    def goes_this_way(self, values: Sequence[Any]) -> bool:
        """Whether a call with these values of the placeholders goes the way of this graph, by its numbers."""
        if self.fits is not None and self.fits.problem(values) is not None:
            return False
        rest = iter(values)
        found: dict[fx.Node, Any] = {}
        numbers = self._of_numbers()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                found[node] = next(rest, None)
            elif node in numbers:
                args, kwargs = map_leaves((node.args, node.kwargs), fx.Node, found.__getitem__)
                if node.target is expect:
                    value, expected, _ = args
                    if (bool(value) if isinstance(expected, bool) else value) != expected:
                        return False
                else:
                    found[node] = node.target(*args, **kwargs)
        return True

    def _of_numbers(self) -> set[fx.Node]:
        """The nodes whose value follows from numbers among the arguments alone."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            plain = node.target is expect or getattr(node.target, "__module__", "") in _PLAIN
            if node.meta.get("number") or (plain and found.issuperset(node.all_input_nodes) and node.all_input_nodes):
                found.add(node)
        return found


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
