"""The result of a run as a picture: the ratios to autocast, one group of bars for each case."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from benchmarks.variants import AUTOCAST

__all__ = ["draw"]


def draw(result: dict[str, Any], path: Path) -> str | None:
    """Writes a PNG; or says why there is none."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return "no chart: it needs matplotlib"
    groups = [
        (phase, compiled, list(rows))
        for (phase, compiled), rows in itertools.groupby(result["cases"], lambda row: (row["phase"], row["compiled"]))
    ]
    figure = Figure(figsize=(16, 4.5 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{result['machine']}, torch {result['torch']}, {result['dtype']}, {result['date']}")
    axes = figure.subplots(len(groups), squeeze=False)[:, 0]
    names = [name for name in dict.fromkeys(row["variant"] for row in result["cases"]) if name != AUTOCAST]
    colors = {name: f"C{place}" for place, name in enumerate(names)}
    for axis, (phase, compiled, rows) in zip(axes, groups, strict=True):
        _bars(axis, rows, colors)
        axis.set_title(f"{phase}{', compiled' if compiled else ''}")
    figure.savefig(path, dpi=100)
    return None


def _bars(axis: Any, rows: list[dict[str, Any]], colors: dict[str, str]) -> None:
    """Bars for the variants, whiskers for the quartiles, and a line where autocast is."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    here = {row["variant"] for row in rows}
    variants = [name for name in colors if name in here]
    width = 0.85 / len(variants)
    for place, name in enumerate(variants):
        mine = [row for row in rows if row["variant"] == name and row["to_autocast"] is not None]
        ratios = [row["to_autocast"] for row in mine]
        x = [cases.index(row["case"]) + (place - (len(variants) - 1) / 2) * width for row in mine]
        y = [ratio["median"] for ratio in ratios]
        spread = [[r["median"] - r["q1"] for r in ratios], [r["q3"] - r["median"] for r in ratios]]
        axis.bar(x, y, width, yerr=spread, color=colors[name], label=name, error_kw={"elinewidth": 0.7})
    axis.axhline(1, color="black", linewidth=1, label=AUTOCAST)
    axis.set_xticks(range(len(cases)), cases, rotation=20, ha="right")
    axis.set_ylabel("time by that of autocast")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
