"""Measures the suite: ``python -m benchmarks``, or ``python -m benchmarks --device cuda`` on a GPU.

A table goes to stdout; the same, everything as JSON, and a chart go to ``benchmarks/results/``, into files that carry
the date, the version of torch and the machine. On a CPU one thread is used. There float16 is for a few cases only
(``--only``): in it a backward of torch's convolutions takes up to a minute on a CPU without instructions for that, and
its LSTM refuses it.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the memory profiler prints two lines a use otherwise

import torch

from benchmarks.cases import SUITE, Case
from benchmarks.measure import Row, measure, ticks
from benchmarks.progress import Progress
from benchmarks.results import described, write
from benchmarks.variants import PHASES, Setting

__all__ = ["main"]

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
QUICK = 3  # rounds


def main(options: list[str], suite: tuple[Case, ...] = SUITE) -> None:
    given = _parser().parse_args(options)
    cases = [case for case in suite if re.search(given.only, case.name)]
    if not cases:
        raise SystemExit(f"no case matches {given.only!r}: there are {', '.join(case.name for case in suite)}")
    rounds = given.rounds or (QUICK if given.quick else 15)
    dtype = DTYPES[given.dtype]
    if given.device == "cpu":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        raise SystemExit("--device cuda: this torch sees no GPU")
    settings = [Setting(given.device, dtype, compiled) for compiled in ((False, True) if given.compile else (False,))]
    phases = PHASES if given.phase is None else (given.phase,)
    rows = _rows(cases, phases, settings, rounds)
    print(write(given.out, described(given.device, dtype, rounds, options), rows))


def _rows(cases: list[Case], phases: tuple[str, ...], settings: list[Setting], rounds: int) -> list[Row]:
    if settings[-1].compiled:
        # All variants compile one function, whose limit is meant for one model.
        torch._dynamo.config.recompile_limit = 64
    rows = []
    with Progress(sum(ticks(phase, rounds) for phase in phases) * len(cases) * len(settings)) as progress:
        for phase in phases:
            for setting in settings:
                for case in cases:
                    rows += measure(case, phase, setting, rounds, progress)
    gc.unfreeze()
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="the low dtype (default: bf16)")
    parser.add_argument("--phase", choices=PHASES, help="default: both")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name it is found in")
    parser.add_argument("--rounds", type=int, help="how often each is timed (default: 15)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds, to see that it works")
    parser.add_argument("--compile", action="store_true", help="each variant under torch.compile too: slow on a CPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
