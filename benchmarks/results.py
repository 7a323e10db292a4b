"""What a run found: where it ran, its rows, and the means over the suite. Written as JSON, text and a chart."""

from __future__ import annotations

import datetime
import json
import math
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import KINDS
from benchmarks.chart import draw
from benchmarks.measure import Row
from benchmarks.table import text_of

__all__ = ["described", "machine", "means", "stem", "write"]

HERE = Path(__file__).parent


def machine(device: str) -> str:
    """The GPU, or the model of the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found is not None else platform.processor() or platform.machine()


def stem(device: str) -> str:
    """How the files of a run of today are called, without their endings."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", re.sub(r"\((R|TM)\)", "", machine(device))).strip("-")
    return f"{datetime.date.today()}_torch{torch.__version__}_{name}"


def described(device: str, dtype: torch.dtype, rounds: int, options: list[str]) -> dict[str, Any]:
    """Everything about a run that a repetition needs."""
    return {
        "date": str(datetime.date.today()),
        "command": " ".join(["python -m benchmarks", *options]),
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "rounds": rounds,
    }


def means(rows: list[Row]) -> list[dict[str, Any]]:
    """For each variant in each phase the geometric means of its ratio to autocast, and the worst of them."""
    found = []
    for phase, compiled, variant in dict.fromkeys((row["phase"], row["compiled"], row["variant"]) for row in rows):
        mine = [row for row in rows if (row["phase"], row["compiled"], row["variant"]) == (phase, compiled, variant)]
        known = [row for row in mine if row["to_autocast"] is not None]
        worst = max(known, key=lambda row: row["to_autocast"]["median"], default=None)
        found.append(
            {
                "phase": phase,
                "compiled": compiled,
                "variant": variant,
                "all": _geometric_mean(known, "to_autocast"),
                **{kind: _geometric_mean([r for r in known if r["kind"] == kind], "to_autocast") for kind in KINDS},
                "to_floor": _geometric_mean(known, "to_floor"),
                "worst": None if worst is None else {"case": worst["case"], **worst["to_autocast"]},
                "cases": len(known),
                "failed": len(mine) - len(known),
            }
        )
    return found


def write(folder: Path, about: dict[str, Any], rows: list[Row]) -> str:
    """Writes the files of a run into a folder, and gives the text."""
    result = {**about, "means": means(rows), "cases": rows}
    text = text_of(result)
    path = folder / stem(about["device"])
    folder.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_name(f"{path.name}.txt").write_text(text + "\n")
    note = draw(result, path.with_name(f"{path.name}.png"))
    return text if note is None else f"{text}\n\n{note}"


def _geometric_mean(rows: list[Row], key: str) -> float | None:
    logs = [math.log(row[key]["median"]) for row in rows if row[key] is not None]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def _commit() -> str | None:
    """What was measured, with a mark where files were changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
