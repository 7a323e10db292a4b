"""How long does each call of a converted graph take, forward?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any, Final

import torch
from torch import fx, nn

from fxamp.scaling.search import untouched

__all__ = ["seconds_of_calls"]

_RUNS: Final = 5


def seconds_of_calls(root: nn.Module, graph: fx.Graph, values: Sequence[Any]) -> dict[str, float]:
    """Seconds of each call of a graph on these values, the median of some runs; of the buffers nothing changes.

    Args:
        root: what the graph runs on.
        graph: a converted one.
        values: of its placeholders.
    """
    found: dict[str, list[float]] = {}
    with untouched(root):
        for _ in range(1 + _RUNS):
            timed = _Timed(root, graph)
            with torch.set_grad_enabled(torch.is_grad_enabled()):  # which the graph may switch
                timed.run(*values)
            for name, seconds in timed.seconds.items():
                found.setdefault(name, []).append(seconds)
    return {name: median(seconds[1:]) for name, seconds in found.items()}


class _Timed(fx.Interpreter):
    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.seconds: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        _wait()
        start = time.perf_counter()
        result = super().run_node(n)
        _wait()
        self.seconds[n.name] = time.perf_counter() - start
        return result


def _wait() -> None:
    """For what a GPU still does."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
