"""Where does something stop to be finite? Asked of the unconverted model under torch.autocast, module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

__all__ = ["INPUT", "LOSS", "Culprit", "culprit"]

INPUT, LOSS = "(input)", "(loss)"


class Culprit(NamedTuple):
    """The pass, and the modules that made something not finite out of what is finite: in the forward the first.

    Attributes:
        phase: "forward" or "backward".
        modules: their paths.
        first: of a value of the forward that was not finite, and left no trace but in the gradients.
        casts: those that made the values whose gradients are not finite then: a gradient is cast to the dtype of such
            a value.
    """

    phase: str
    modules: frozenset[str]
    first: str | None = None
    casts: frozenset[str] = frozenset()


def culprit(
    model: nn.Module, loss: Callable[..., torch.Tensor], x: torch.Tensor, y: torch.Tensor, scale: float
) -> Culprit | None:
    """Which modules; None when all gradients are finite. The model is left as it is, but for gradients and buffers."""
    watch = _Watch()
    with watch.hooks(model):
        with torch.autocast("cpu", torch.float16):
            output = model(x)
            value = loss(output, y)
        watch.claim([output], "")
        watch.claim([value], LOSS)
        if _is_bad([output, value]):
            return Culprit("forward", frozenset({watch.first if watch.first is not None else LOSS}))
        with watch.backward_hooks():
            leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(value * scale, leaves, allow_unused=True)
    if not _is_bad(gradients):
        return None
    return Culprit("backward", frozenset(watch.sources), watch.first, frozenset(watch.casts))


class _Watch:
    def __init__(self) -> None:
        self.first: str | None = None
        self.sources: set[str] = set()
        self.casts: set[str] = set()
        self._stack: list[str] = []
        self._owners: dict[Any, str] = {}

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._before(path), prepend=True))
            handles.append(module.register_forward_hook(self._after(path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, path: str) -> Callable[..., None]:
        def before(module: nn.Module, args: Any) -> None:
            parent = self._stack[-1] if self._stack else INPUT
            if self.first is None and _is_bad(tree_leaves(args)):
                self.first = parent
            self.claim(tree_leaves(args), parent)
            self._stack.append(path)

        return before

    def _after(self, path: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()
            if self.first is None and _is_bad(tree_leaves(output)):
                self.first = path
            self.claim(tree_leaves(output), path)

        return after

    def claim(self, tensors: Iterable[Any], owner: str) -> None:
        """Notes that the autograd nodes that nobody owns were made by this module."""
        waiting = [tensor.grad_fn for tensor in tensors if isinstance(tensor, torch.Tensor)]
        while waiting:
            function = waiting.pop()
            if function is not None and function not in self._owners:
                self._owners[function] = owner
                waiting += [before for before, _ in function.next_functions]

    @contextmanager
    def backward_hooks(self) -> Iterator[None]:
        handles = [function.register_hook(self._passed(function)) for function in self._owners]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _passed(self, function: Any) -> Callable[..., None]:
        owner = self._owners[function]

        def passed(made: Any, given: Any) -> None:
            summed = _is_bad(given) and not self.sources
            if summed or (_is_bad(made) and not _is_bad(given)):
                self.sources.add(owner)
                self.casts.update(self._owners[before] for before, _ in function.next_functions if before is not None)

        return passed


def _is_bad(values: Iterable[Any]) -> bool:
    """Whether one is not finite; a mask is as it should be, of some 0 and some -inf."""
    for value in values:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        value = value.detach().to_dense() if value.is_sparse else value.detach()
        masked, kept = value == float("-inf"), value == 0
        if not value.isfinite().all() and not ((masked | kept).all() and kept.any()):
            return True
    return False
