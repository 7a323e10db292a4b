"""How long does each of several steps take, beside the others?

All are timed in turns, in one process: in every round each once, in another order each time, so that whatever disturbs
the machine meets all of them. Ratios are taken within a round. One timing runs a step as often as it takes to
last long enough for the clock.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Timed", "ratios", "time_in_turns"]

WARM_UP = 2
ENOUGH = 0.02  # seconds that one timing takes at least


@dataclass
class Timed:
    """Seconds a step, one for each round; or why there are none."""

    repeats: int = 0
    seconds: list[float] = field(default_factory=list)
    failed: str | None = None


def time_in_turns(
    steps: Mapping[str, Callable[[], Any]], rounds: int, device: str, after_round: Callable[[], None] = lambda: None
) -> dict[str, Timed]:
    """Every step timed in every round. One that fails is out of the rounds from then on."""
    timed = {name: _warmed(step, device) for name, step in steps.items()}
    order, shuffle = list(steps), random.Random(0).shuffle
    with _without_collections():
        for _ in range(rounds):
            shuffle(order)
            gc.collect()
            for name in order:
                if timed[name].failed is None:
                    _time(steps[name], timed[name], device)
            after_round()
    return timed


def ratios(times: list[float], reference: list[float]) -> dict[str, float]:
    """The median over the rounds of one time by the other, with the quartiles."""
    each = [mine / other for mine, other in zip(times, reference, strict=True)]
    q1, median, q3 = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return {"median": median, "q1": q1, "q3": q3}


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """No collection of garbage but those between the rounds."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _warmed(step: Callable[[], Any], device: str) -> Timed:
    try:
        for _ in range(WARM_UP):
            step()
        return Timed(max(1, math.ceil(ENOUGH / _seconds(step, _enough_to_see(step, device), device))))
    except Exception as error:
        return Timed(failed=f"{type(error).__name__}: {error}")


def _enough_to_see(step: Callable[[], Any], device: str) -> int:
    """How often a step has to run for a first guess of its time."""
    return max(1, min(20, math.ceil(ENOUGH / 4 / _seconds(step, 1, device))))


def _time(step: Callable[[], Any], timed: Timed, device: str) -> None:
    try:
        timed.seconds.append(_seconds(step, timed.repeats, device))
    except Exception as error:
        timed.failed = f"{type(error).__name__}: {error}"


def _seconds(step: Callable[[], Any], repeats: int, device: str) -> float:
    """Seconds a step, until the last one's result is there."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
