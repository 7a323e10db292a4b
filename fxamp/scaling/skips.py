"""Which steps were skipped? The answer of the device is waited for only where somebody asks.

An optimizer without fused support is stepped or not by the host, so the host knows. A fused one decides on the
device; its flags are kept as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

from fxamp.scaling.trail import CLOCK, captures_graph

__all__ = ["Skips"]


class Skips:
    """The last step, and how many were skipped in a row.

    Args:
        limit: from how many on ``updated`` tells; None: never.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._optimizer: Callable[[], torch.optim.Optimizer | None] | None = None
        self._suspect: Callable[[], torch.optim.Optimizer | None] | None = None
        self.span = range(0)  # of the last step: the iterations that its gradients may be from
        self._began = CLOCK.updated
        self._last: bool | tuple[torch.Tensor, ...] = False
        self._known: bool | None = False  # of this iteration: None when only the device knows
        self._in_a_row = 0
        self._window: list[torch.Tensor] = []
        self._late: _Late | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """That of the last step, while it is alive."""
        return self._optimizer() if self._optimizer is not None else None

    @property
    def suspect(self) -> torch.optim.Optimizer | None:
        """That of the last step which was skipped or may have been."""
        return self._suspect() if self._suspect is not None else None

    @property
    def last(self) -> bool:
        """Whether the last step was skipped; reading it waits for the device if nobody on the host knows."""
        if isinstance(self._last, tuple):
            self._last = any(bool(flag) for flag in self._last)
        return self._last

    def stepped(self, optimizer: torch.optim.Optimizer, flags: Sequence[torch.Tensor], skipped: bool | None) -> None:
        """Notes a step: its flags, and whether it was skipped if the host knows."""
        self._optimizer = _reference(optimizer)
        self.span = range(self._began, CLOCK.updated + 1)
        if skipped is not False:
            self._suspect = self._optimizer
        self._last = skipped if skipped is not None else tuple(flags)
        self._known = None if skipped is None or self._known is None else self._known or skipped

    def updated(self, flag: torch.Tensor | None) -> bool:
        """Ends an iteration, whose steps the flag tells of; whether the limit was reached, and counting starts anew.

        It does so without a flag, too: the scale is another by then.

        Where only the device knows, the flags of ``limit`` iterations are looked at together and ``limit``
        iterations later, when the answer has long been copied: nothing waits for it.
        """
        known, self._known = self._known, False
        CLOCK.updated += 1
        self._began = CLOCK.updated
        if self.limit is None or flag is None or captures_graph():
            self._in_a_row, self._window, self._late = 0, [], None
            return False
        if known is not None:
            self._window = []
            self._in_a_row = self._in_a_row + 1 if known else 0
            reached = self._in_a_row >= self.limit
            self._in_a_row = 0 if reached else self._in_a_row
            return reached
        self._window.append(flag)
        if len(self._window) < self.limit:
            return False
        late, self._late = self._late, _Late(torch.stack(self._window).amin())
        self._window = []
        return late is not None and late.read()


def _reference(optimizer: torch.optim.Optimizer) -> Callable[[], torch.optim.Optimizer | None]:
    try:
        return weakref.ref(optimizer)
    except TypeError:  # one of somebody's own, with slots
        return lambda: optimizer


class _Late:
    """A number on its way from the device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._value = tensor.to("cpu", non_blocking=True)  # into pinned memory
        self._event = torch.Event(tensor.device) if tensor.device.type != "cpu" else None
        if self._event is not None:
            self._event.record()

    def read(self) -> bool:
        if self._event is not None and not self._event.query():
            self._event.synchronize()
        return bool(self._value)
