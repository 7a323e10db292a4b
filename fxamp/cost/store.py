"""Where is kept what was measured?

In the process, so that a question has one answer in it; and in one file for each device, build of torch and number of
threads, so that the next process need not measure again. What stands in a file stays: a second writer adds to it. A
file that cannot be read, or that is about something else, is not there; a folder that cannot be written to is no error.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

__all__ = ["About", "Row", "Store", "open_store"]

_FORMAT: Final = 1
About = Mapping[str, str | int]


@dataclass
class Row:
    """What is known of one call.

    Attributes:
        work: how much it does, in floating-point operations.
        measured: short dtype to seconds; None where it does not run in it.
        estimated: short dtype to what stands for a measurement; None, which is not kept, where nothing could.
    """

    work: float
    measured: dict[str, float | None] = field(default_factory=dict)
    estimated: dict[str, float | None] = field(default_factory=dict)

    def get(self, dtype: str) -> float | None:
        """Seconds in a dtype, or None."""
        return (self.measured if dtype in self.measured else self.estimated).get(dtype)

    def __contains__(self, dtype: str) -> bool:
        return dtype in self.measured or dtype in self.estimated


class Store:
    """The rows of one device, and the file that they are kept in.

    Args:
        path: the file, or None for the usual one.
        about: what the rows hold for.
    """

    def __init__(self, path: Path | None, about: About) -> None:
        self.path = _usual_path(about) if path is None else path
        self._about = dict(about)
        self._rows: dict[str, Row] = {}
        self._kinds: dict[str, list[Row]] = {}
        self._changed = False
        for text, row in self._read().items():
            self._put(text, row)

    def get(self, text: str) -> Row | None:
        """The row of a call."""
        return self._rows.get(text)

    def put(self, text: str, row: Row) -> None:
        """Keep a row, which was changed or is new. The first word of its text is the kind of the call."""
        self._changed = True
        self._put(text, row)

    def alike(self, kind: str) -> list[Row]:
        """The rows of the calls of a kind."""
        return self._kinds.get(kind, [])

    def _put(self, text: str, row: Row) -> None:
        if text not in self._rows:
            self._rows[text] = row
            self._kinds.setdefault(text.partition(" ")[0], []).append(row)

    def save(self) -> None:
        """Add the rows to the file."""
        if self.path is None or not self._changed:
            return
        rows = self._read()
        for text, row in self._rows.items():
            found = rows.setdefault(text, Row(row.work))
            told = {dtype: seconds for dtype, seconds in row.estimated.items() if seconds is not None}
            for mine, theirs in ((row.measured, found.measured), (told, found.estimated)):
                theirs.update({dtype: seconds for dtype, seconds in mine.items() if dtype not in found})
        content = {"fxamp": _FORMAT, "about": self._about, "calls": {text: vars(row) for text, row in rows.items()}}
        with contextlib.suppress(OSError):
            _write(self.path, json.dumps(content, indent=1, sort_keys=True))
            self._changed = False

    def _read(self) -> dict[str, Row]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8")) if self.path is not None else {}
            if content["fxamp"] != _FORMAT or content["about"] != self._about:
                return {}
            return {text: _row(entry) for text, entry in content["calls"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}


def open_store(path: Path | None, device: torch.device) -> Store:
    """The store for a device, the same for everyone in this process."""
    about = _about(device)
    key = (path or _usual_path(about), *about.values())
    if key not in _OPEN:
        _OPEN[key] = Store(path, about)
    return _OPEN[key]


_OPEN: Final[dict[tuple[Any, ...], Store]] = {}


def _row(entry: Any) -> Row:
    return Row(_number(entry["work"]), _numbers(entry["measured"]), _numbers(entry["estimated"]))


def _numbers(entry: dict[str, Any]) -> dict[str, float | None]:
    return {str(dtype): None if seconds is None else _number(seconds) for dtype, seconds in entry.items()}


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError(value)
    return float(value)


def _write(path: Path, text: str) -> None:
    """All of it or nothing, whoever else reads or writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _usual_path(about: About) -> Path | None:
    words = [re.sub(r"[^a-z0-9.]+", "-", str(value).lower()).strip("-") for value in about.values()]
    folder = _folder()
    return None if folder is None else folder / f"{'_'.join(words)}.json"


def _folder() -> Path | None:
    if chosen := os.environ.get("FXAMP_CACHE_DIR"):
        return Path(chosen)
    if usual := os.environ.get("XDG_CACHE_HOME"):
        return Path(usual) / "fxamp"
    try:
        return Path.home() / ".cache" / "fxamp"
    except RuntimeError:  # a user without a home
        return None


def _about(device: torch.device) -> dict[str, str | int]:
    name = _processor() if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}


def _processor() -> str:
    """Its name, and what stands for what it can do: virtual machines of one name differ in that."""
    lines = dict(_cpuinfo())
    name = lines.get("model name") or platform.processor() or platform.machine()
    able = lines.get("flags", lines.get("Features", torch.backends.cpu.get_cpu_capability()))
    return f"{name} {zlib.crc32(able.encode()):08x}"


def _cpuinfo() -> Iterator[tuple[str, str]]:
    """The lines about one core."""
    with contextlib.suppress(OSError):
        first, *_ = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")
        for line in first.splitlines():
            name, _, value = line.partition(":")
            yield name.strip(), value.strip()
