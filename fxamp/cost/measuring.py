"""How often must calls be repeated until their times are known?

They are measured in turns, so that whatever slows the machine down slows all of them alike. What counts is the least
time of each: others only ever add to it. For the ratio of two calls that is the better number than the median of the
same repetitions (on a busy machine its spread over three to ten repetitions was about two thirds of the median's).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from fxamp.cost.clock import Clock

__all__ = ["LONG", "measure"]

LONG: Final = 0.2  # a call of so many seconds is made once
_ROUNDS: Final = 3  # at least
_ENOUGH: Final = 0.02  # seconds for each call, after which its least time counts as it is
_STABLE: Final = 1.02  # two samples of a call that are so close are not chance


def measure(clock: Clock, runs: Sequence[Callable[[], Any]], first: Sequence[float], idle: float = 0.0) -> list[float]:
    """Seconds of one call of each, in steady state.

    Args:
        clock: tells them.
        runs: the calls; each was made once, so that what only a first call does is done.
        first: how long that took.
        idle: how long the host takes in each call for what does not count.
    """
    again = [seconds if seconds > LONG else clock.seconds(run, 1) for run, seconds in zip(runs, first, strict=True)]
    loops = [math.ceil(clock.sample / max(seconds, clock.sample / _MOST)) for seconds in again]
    samples: list[list[float]] = [[] for _ in runs]
    short = [index for index, seconds in enumerate(first) if seconds <= LONG]
    start = clock.now()
    while short and not _known(samples, short, clock.now() - start):
        for index in short:
            samples[index].append(clock.seconds(runs[index], loops[index], idle))
    return [min(found, default=seconds) for found, seconds in zip(samples, first, strict=True)]


_MOST: Final = 1000  # loops


def _known(samples: list[list[float]], short: list[int], spent: float) -> bool:
    if len(samples[short[0]]) < _ROUNDS:
        return False
    return spent >= _ENOUGH * len(short) or all(_is_stable(samples[index]) for index in short)


def _is_stable(samples: list[float]) -> bool:
    least, next_to_it, *_ = sorted(samples)
    return next_to_it <= _STABLE * least
