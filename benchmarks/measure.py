"""A case measured: one row for each variant, with its times, casts, memory and conversion.

All variants are made beside each other, on one model. Then casts and memory are counted, each variant alone with a
model of its own, and at last all are timed in turns.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.cases import Case
from benchmarks.casts import Casts, count_casts
from benchmarks.memory import WARM_UP, peak_bytes
from benchmarks.progress import Progress
from benchmarks.timing import Timed, ratios, time_in_turns
from benchmarks.variants import AUTOCAST, FLOOR, VARIANTS, Built, Made, Setting, Step, made_of

__all__ = ["Row", "measure", "ticks"]

Row = dict[str, Any]

Variant = Callable[[Made], Built]


class Counted(NamedTuple):
    """What does not depend on the clock; and how long a second conversion took, on the way."""

    casts: dict[str, Any] | None = None
    peak: int | None = None
    conversion_seconds: float | None = None
    failed: str | None = None


def ticks(phase: str, rounds: int) -> int:
    """By how much the measurement of one case in one phase advances the progress."""
    return len(VARIANTS[phase]) + rounds


def measure(case: Case, phase: str, setting: Setting, rounds: int, progress: Progress) -> list[Row]:
    """The rows of a case in one phase; what fails becomes a row that says so."""
    gc.collect()
    gc.freeze()  # what is alive before a case is never garbage in it: collections within it are short
    variants = VARIANTS[phase]
    progress.doing(f"{case.name} {phase}{' compiled' if setting.compiled else ''}")
    made = made_of(case, phase, setting)
    built = {name: _built(variant, made) for name, variant in variants.items()}
    counted = {}
    for name, variant in variants.items():
        counted[name] = _counted(case, phase, setting, variant)
        progress.advance()
    steps = {name: found.step for name, found in built.items() if isinstance(found, Built)}
    timed = time_in_turns(steps, rounds, setting.device, progress.advance)
    about = {"case": case.name, "kind": case.kind, "phase": phase, "compiled": setting.compiled}
    rows = [{**about, "variant": name, **_row(counted[name], built[name], timed.get(name))} for name in variants]
    _add_ratios(rows, timed)
    del made, built, steps
    _free(setting)
    return rows


def _counted(case: Case, phase: str, setting: Setting, variant: Variant) -> Counted:
    """The casts and the peak of a variant; a compiled one dispatches no casts that could be counted."""

    def fresh() -> Step:
        return variant(made_of(case, phase, setting)).step

    try:
        peak = peak_bytes(fresh, setting.device)
        if setting.compiled:
            return Counted(peak=peak)
        made = made_of(case, phase, setting)
        built = variant(made)
        return Counted(_casts(built.step, made).to_dict(), peak, built.conversion_seconds)
    except Exception as error:
        return Counted(failed=_text(error))
    finally:
        _free(setting)


def _casts(step: Step, made: Made) -> Casts:
    for _ in range(WARM_UP):
        step()  # what is made once is no cast of a step
    return count_casts(step, [*made.model.parameters(), *step.parameters])


def _built(variant: Variant, made: Made) -> Built | str:
    try:
        return variant(made)
    except Exception as error:
        return _text(error)


def _row(counted: Counted, built: Built | str, timed: Timed | None) -> Row:
    failed = built if isinstance(built, str) else (timed and timed.failed) or counted.failed
    times = timed.seconds if timed is not None and not timed.failed else []
    return {
        "seconds": statistics.median(times) if times else None,
        "times": times,
        "repeats": timed.repeats if timed is not None else 0,
        "casts": counted.casts,
        "peak_bytes": counted.peak,
        "conversion_seconds": None if isinstance(built, str) else built.conversion_seconds,
        "second_conversion_seconds": counted.conversion_seconds,
        "failed": None if failed is None else f"failed: {failed}",
    }


def _add_ratios(rows: list[Row], timed: dict[str, Timed]) -> None:
    for key, reference in (("to_autocast", AUTOCAST), ("to_floor", FLOOR)):
        other = timed.get(reference)
        for row in rows:
            known = row["times"] and other is not None and other.failed is None
            row[key] = ratios(row["times"], timed[reference].seconds) if known else None


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _free(setting: Setting) -> None:
    """Leaves nothing for the next one to find in its way."""
    torch.compiler.reset()
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
