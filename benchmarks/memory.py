"""How much memory does a step take at its peak?

Both counts begin before the model is made and look at a step after two others, so they have everything that is alive in
it: the model, its batch, what a conversion keeps between steps, activations, gradients, what operators use for a while.

On a GPU it is what ``torch.cuda.max_memory_allocated`` says. On a CPU it is the sum over every block that torch's
allocator gave out and took back, as its memory profiler reports each of them: exact to the byte, and inside operators
too. Memory that a library allocates for itself (scratch of oneDNN and MKL) is not torch's and not in it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

__all__ = ["WARM_UP", "peak_bytes"]

WARM_UP = 2
_WINDOW = "benchmarks.memory"


def peak_bytes(make: Callable[[], Callable[[], Any]], device: str) -> int:
    """The most that is allocated at once during the third step, of what was allocated since ``make`` was called."""
    gc.collect()  # what is freed from here on is what was made from here on
    return (_peak_on_gpu if device == "cuda" else _peak_on_cpu)(make)


def _warm(step: Callable[[], Any]) -> None:
    for _ in range(WARM_UP):
        step()
    gc.collect()


def _peak_on_cpu(make: Callable[[], Callable[[], Any]]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        try:
            step = make()
            _warm(step)
            with record_function(_WINDOW):
                step()
        finally:
            step = None  # type: ignore[assignment]  # freed while it is still counted
            gc.collect()
    events = sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    (window,) = (event for event in events if event.name() == _WINDOW)
    end = window.start_ns() + window.duration_ns()
    live = peak = 0
    for event in events:
        if event.start_ns() > end:
            break
        live += event.nbytes() if event.name() == "[memory]" else 0
        peak = live if event.start_ns() < window.start_ns() else max(peak, live)
    return peak


def _peak_on_gpu(make: Callable[[], Callable[[], Any]]) -> int:
    _wake()
    before = torch.cuda.memory_allocated()
    step = make()
    _warm(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _wake() -> None:
    """The workspaces that the first product of a thread allocates belong to no variant."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        layer = nn.Linear(8, 8, device="cuda", dtype=dtype)
        layer(torch.ones(8, 8, device="cuda", dtype=dtype)).sum().backward()
