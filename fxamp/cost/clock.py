"""How is time told on a device?

On a CPU by the clock of the host. On a device that works off a queue from the moment the queue is empty until it is
empty again: a call takes the longer of what the host needs to launch its kernels and what the device needs to run them,
so a small call takes as long as its launches. A step of a model is at most the sum of these: where calls that wait for
the host follow on calls that wait for the device, one hides a part of the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import torch

__all__ = ["Clock", "DeviceClock", "HostClock", "clock_of", "indexed", "measurable"]


class Clock(Protocol):
    """Tells how long a function takes."""

    sample: float  # Seconds that one measurement should take at least, for what it measures to show.

    def now(self) -> float:
        """Seconds since some moment."""

    def seconds(self, run: Callable[[], Any], loops: int, idle: float = 0.0) -> float:
        """Seconds of one call of ``run``, which is called so many times.

        Args:
            run: what to call.
            loops: how often.
            idle: how long the host takes in each for what is not to count.
        """


class HostClock:
    """For a device that is done when a call returns."""

    sample: float = 2e-4

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, run: Callable[[], Any], loops: int, idle: float = 0.0) -> float:
        start = time.perf_counter()
        for _ in range(loops):
            run()
        return _without(idle, (time.perf_counter() - start) / loops)


class DeviceClock:
    """For a device with a queue, which must be the current one of its kind.

    Args:
        module: such as ``torch.cuda``, with ``synchronize`` and ``Event``.
    """

    sample: float = 1e-3  # hundreds of small kernels: the way to the device and back is then a small part

    def __init__(self, module: Any) -> None:
        self._module = module

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, run: Callable[[], Any], loops: int, idle: float = 0.0) -> float:
        begin, end = (self._module.Event(enable_timing=True) for _ in range(2))
        self._module.synchronize()
        start = time.perf_counter()
        begin.record()
        for _ in range(loops):
            run()
        end.record()
        host = time.perf_counter() - start
        self._module.synchronize()
        longer = max(host, float(begin.elapsed_time(end)) * _MILLISECOND)
        waits = host > _BUSY * longer  # the device for the host
        return _without(idle, longer / loops) if waits else longer / loops


_MILLISECOND: Final = 1e-3
_BUSY: Final = 0.9  # A host that is done earlier than this part of the time has launched faster than the device runs.
_LEAST: Final = 0.2


def _without(idle: float, seconds: float) -> float:
    """Less what does not count; what is left of a short call is uncertain, but never nothing."""
    return max(seconds - idle, _LEAST * seconds)


def clock_of(device: torch.device) -> Clock:
    """The clock for a device."""
    return HostClock() if device.type == "cpu" else DeviceClock(torch.get_device_module(device))


def indexed(device: torch.device) -> torch.device:
    """A device with its number, where there may be several."""
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, torch.get_device_module(device).current_device())


def measurable(device: torch.device) -> bool:
    """Whether this machine can run calls on a device: not on ``meta``, nor on a GPU that is not there."""
    if device.type == "cpu":
        return True
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type == device.type and (device.index or 0) < torch.accelerator.device_count()
