"""The result of a run as text: a table for each phase, and one of the means."""

from __future__ import annotations

import itertools
from typing import Any

from tabulate import tabulate

__all__ = ["text_of"]

ROW = ("case", "variant", "ms", "to autocast", "quartiles", "to floor", "casts", "back", "MB cast", "of weights")
ENDS = ("peak MB", "convert s", "again s", "")
MEANS = ("variant", "all", "launch-bound", "large", "worst", "of", "to floor", "cases", "failed")
DIGITS = {
    **dict.fromkeys(("ms", "to autocast", "to floor"), ".3f"),
    **dict.fromkeys(("MB cast", "peak MB", "convert s", "again s"), ".2f"),
}

NOTES = """\
to autocast, to floor: the median over the rounds of the time by that of autocast, or of the model wholly in the low
dtype, in the same round; quartiles: of the ratio to autocast. A training step is forward, loss, backward and gradients
set to None, without an optimizer. casts, back: casts that one step dispatches in forward and in backward; MB cast: what
they read and write; of weights: the share of it that parameters and their gradients have. peak MB: allocated at once,
with the model and its batch. convert s, again s: seconds of the first conversion, which may measure what later ones
know, and of a second one. Means are geometric."""


def text_of(result: dict[str, Any]) -> str:
    """Everything but the times of the rounds."""
    about = [[key, value] for key, value in result.items() if key not in ("cases", "means") and value is not None]
    parts = [tabulate(about, tablefmt="plain", disable_numparse=True)]
    for (phase, compiled), rows in itertools.groupby(result["cases"], lambda row: (row["phase"], row["compiled"])):
        title = f"{phase}{', compiled' if compiled else ''}"
        means = [mean for mean in result["means"] if (mean["phase"], mean["compiled"]) == (phase, compiled)]
        parts += [f"{title}\n\n{_cases(list(rows))}", f"{title}: means of the ratios to autocast\n\n{_means(means)}"]
    return "\n\n".join([*parts, NOTES])


def _cases(rows: list[dict[str, Any]]) -> str:
    headers = (*ROW, *ENDS)
    firsts = {row["case"]: row for row in reversed(rows)}
    lines = [_case(row, row is firsts[row["case"]]) for row in rows]
    table = tabulate(lines, headers, floatfmt=[DIGITS.get(each, "g") for each in headers])
    hidden = {name for row in rows for name in (row["casts"] or {}).get("not_seen_into", ())}
    return f"{table}\n\nnot seen into when casts are counted: {', '.join(sorted(hidden))}" if hidden else table


def _case(row: dict[str, Any], first: bool) -> list[Any]:
    ratio, casts = row["to_autocast"], row["casts"]
    counts: list[Any] = [None] * 4
    if casts is not None:
        share = f"{casts['weight_bytes'] / casts['bytes']:.0%}" if casts["bytes"] else None
        counts = [casts["forward"], casts["backward"], casts["bytes"] / 1e6, share]
    return [
        row["case"] if first else "",
        row["variant"],
        _or_none(row["seconds"], 1e3),
        ratio and ratio["median"],
        ratio and f"{ratio['q1']:.3f} - {ratio['q3']:.3f}",
        row["to_floor"] and row["to_floor"]["median"],
        *counts,
        _or_none(row["peak_bytes"], 1e-6),
        row["conversion_seconds"],
        row["second_conversion_seconds"],
        (row["failed"] or "")[:60],
    ]


def _means(means: list[dict[str, Any]]) -> str:
    rows = []
    for mean in means:
        worst = mean["worst"] or {"median": None, "case": None}
        ratios = [mean["all"], mean["launch-bound"], mean["large"], worst["median"]]
        rows.append([mean["variant"], *ratios, worst["case"], mean["to_floor"], mean["cases"], mean["failed"]])
    return tabulate(rows, MEANS, floatfmt=".3f")


def _or_none(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
