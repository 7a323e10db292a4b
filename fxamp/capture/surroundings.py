"""What surrounds a trace: the modes it is made in, and what it must not leave behind."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from fxamp.capture.arguments import map_leaves
from fxamp.capture.calls import expect
from fxamp.capture.outside import Outside
from fxamp.capture.patches import mode_of, set_mode
from fxamp.capture.regions import autocast_as, is_device_type
from fxamp.capture.setting import Ambient
from fxamp.capture.state import python_state

__all__ = ["StateChangedError", "autocast_answers", "calls_of", "changed_modules", "check_root", "modes", "put_back"]

_QUESTIONS: Final = tuple(
    name
    for name in (
        "is_autocast_enabled",
        "get_autocast_dtype",
        "is_autocast_cpu_enabled",
        "get_autocast_cpu_dtype",
        "get_autocast_gpu_dtype",
    )
    if hasattr(torch, name)
)


@contextmanager
def modes(modules: Mapping[str, nn.Module], training: Mapping[str, bool]) -> Iterator[None]:
    """The ``training`` flags that a trace is made with; the modules get theirs back."""
    before = {module: mode_of(module) for module in modules.values()}
    try:
        for path, module in modules.items():
            set_mode(module, training.get(path, mode_of(module)))
        yield
    finally:
        for module, flag in before.items():
            set_mode(module, flag)


@contextmanager
def autocast_answers(ambient: Ambient, outside: Outside) -> Iterator[set[str]]:
    """Autocast switched on for whoever asks.

    Args:
        ambient: device type and dtype of the autocast that a model is traced for, or None.
        outside: the files that may ask.

    Yields:
        The questions that were asked: what is traced then is right for this autocast only.
    """
    asked: set[str] = set()
    device_type = "cpu" if ambient is None else ambient[0]

    def noting(name: str) -> Callable[..., Any]:
        question = getattr(torch, name)

        def answer(*args: Any) -> Any:
            asked.add(name)
            return question(*(device_type if is_device_type(arg) else arg for arg in args))

        return answer

    answers = {getattr(torch, name): noting(name) for name in _QUESTIONS}
    switched_on = nullcontext() if ambient is None else autocast_as(*ambient, enabled=True)
    with switched_on, outside.answering(answers):
        yield asked


@contextmanager
def put_back(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Undoes what was done to the modules and to the containers they hold: a traced value must not stay in them."""
    spaces = [module.__dict__ for module in modules.values()]
    held = [value for space in spaces for value in space.values() if type(value) in (dict, OrderedDict, list, set)]
    before = [(container, container.copy()) for container in (*spaces, *held)]
    try:
        yield
    finally:
        for container, copied in before:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(copied)


def changed_modules(modules: Mapping[str, nn.Module], before: Mapping[str, Any]) -> dict[str, str]:
    """Path of each module whose state is not as before, and what was changed past the graph."""
    return {
        path: what for path, module in modules.items() for what in _changes(module, before[path], python_state(module))
    }


def _changes(module: nn.Module, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in {**before, **now} if before != now else ():
        if name not in before and not _is_settled(module, name):
            yield f"makes self.{name} at its first call, which a graph would make again at every call"
        elif name in before and now.get(name) != before[name]:
            yield f"changes self.{name}, which a graph cannot carry to the next call"


def _is_settled(module: nn.Module, name: str) -> bool:
    """Whether an attribute is a cached property without tensors: what it is once, it stays."""
    cached = isinstance(getattr(type(module), name, None), functools.cached_property)
    leaves = pytree.tree_leaves(module.__dict__.get(name))
    return cached and not any(isinstance(leaf, fx.Proxy | torch.Tensor) for leaf in leaves)


class StateChangedError(TraceError):
    """The model itself changed its state; ``calls`` is what was traced all the same."""

    def __init__(self, what: str, calls: Sequence[Any]) -> None:
        super().__init__(what)
        self.calls = calls


def calls_of(graph: fx.Graph) -> Sequence[Any]:
    """What a graph computes, whatever its nodes are called and whatever it asks about the way."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        # A module may do anything; torch.fx asks the owner of the graph about it, and there is none yet.
        counts = node.op == "call_module" or (node.target is not expect and node.is_impure())
        if counts or not needed.isdisjoint(node.users):
            needed.add(node)
    place = {node: f"%{i}" for i, node in enumerate(node for node in graph.nodes if node in needed)}
    return [(n.op, n.target, str(map_leaves((n.args, n.kwargs), fx.Node, place.__getitem__))) for n in place]


def check_root(changed: Mapping[str, str], drawn: torch.Tensor, graph: fx.Graph) -> None:
    """Raises TraceError when the model itself changed its state, or torch's random numbers were drawn."""
    if "" in changed:
        raise StateChangedError(changed[""], calls_of(graph))
    if not torch.equal(torch.get_rng_state(), drawn):
        raise TraceError("draws random numbers on its own, which a graph would freeze")
