"""How far is it? A bar of tqdm on a terminal where that is installed, and otherwise a line on stderr for each part."""

from __future__ import annotations

import sys
from types import TracebackType

try:
    from tqdm import tqdm
except ModuleNotFoundError:
    tqdm = None

__all__ = ["Progress"]


class Progress:
    """Counts up to ``total``, and says what is being done."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.label = total, 0, ""
        self.bar = tqdm(total=total, file=sys.stderr) if tqdm is not None and sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def doing(self, label: str) -> None:
        """What the steps from here on are for."""
        if self.bar is not None:
            self.bar.set_description(label)
        elif label != self.label:
            print(f"[{100 * self.done // self.total:3}%] {label}", file=sys.stderr, flush=True)
        self.label = label

    def advance(self) -> None:
        """One more is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
