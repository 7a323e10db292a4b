"""Tests of the tests: does anything notice when one row of an operator table is another one?

Run as::

    python -m tests.mutations [TABLE ...] [--every N]

Each row is removed, and each of its cells is changed, in turn. A process of its own imports fxamp with the changed
table and runs what tests the row: the checks of the tables themselves, and the conformance of the operators that it
is about. What nothing notices is printed as a survivor; ``EXPLAINED`` has those that cannot make a difference.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["EXPLAINED", "TABLES", "Mutant", "mutants", "survives"]

POLICY = Path(__file__).parent.parent / "fxamp" / "policy"
# Another rule for each: with it, some dtype or some bit is another one.
OTHER_RULE = {
    "lower": "fp32",
    "fp32": "lower",
    "fp32_dtype": "lower",
    "promote": "lower",
    "banned": "fp32",
    "follow": "fp32",
}


class Mutant(NamedTuple):
    """One changed line of one table; ``new`` is empty for a line that is taken out."""

    table: str
    row: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.table}: {' '.join(self.old.split())} -> {' '.join(self.new.split()) or 'removed'}"


def _rules(cells: list[str]) -> Iterator[list[str]]:
    for i in (1, 2):
        yield [*cells[:i], OTHER_RULE[cells[i]], *cells[i + 1 :]]


def _composites(cells: list[str]) -> Iterator[list[str]]:
    for i in (1, 2):
        if cells[i] != "listed":
            yield [*cells[:i], "-" if cells[i] == "same" else "same", *cells[i + 1 :]]


def _names(cells: list[str]) -> Iterator[list[str]]:
    yield [cells[0], "mse_loss" if cells[1] != "mse_loss" else "relu", *cells[2:]]
    if len(cells) > 2:
        yield cells[:2]


# Table to its file, the name it has there, and how a line is changed.
TABLES: dict[str, tuple[str, str, Callable[[list[str]], Iterator[list[str]]]]] = {
    "rules": ("autocast_table", "TABLE", _rules),
    "composites": ("composites", "_COMPOSITES", _composites),
    "kernels": ("composites", "_KERNELS", _composites),
    "functions": ("python_table", "FUNCTIONS", _names),
    "operators": ("python_table", "OPERATOR_MODULE", _names),
}

_TAKEN_APART = "taken apart by fxamp.capture.composed whatever its row says"
_OWN_KERNEL = "has a kernel of its own, so that without a row it is left alone all the same"
_UNVETTED = "made of others: without a row it is not vetted, and runs under autocast all the same"
_INSIDE = "private, and called by kernels and modules of torch only"
_NEEDS_GPU = "its inputs have formats of a GPU"

# Rows of which some change makes no difference, or none that can be tested here, and why.
EXPLAINED: dict[str, str] = {
    "_safe_softmax": _OWN_KERNEL,
    "roll": _OWN_KERNEL,
    "pairwise_distance": _TAKEN_APART,
    "sum_to_size": _TAKEN_APART,
    "ldexp": _UNVETTED,
    "ldexp_": _UNVETTED,
    "pin_memory": "needs a GPU",
    "linalg_lstsq": "what it gives back besides the solution is memory that was never written",
    **dict.fromkeys(
        ("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2", "_scaled_mm", "_scaled_mm_v2"), _NEEDS_GPU
    ),
    **dict.fromkeys(
        (
            "_native_multi_head_attention",
            "_transform_bias_rescale_qkv",
            "_transformer_encoder_layer_fwd",
            "_trilinear",
            "_unsafe_index_put",
        ),
        _INSIDE,
    ),
}


def mutants(table: str) -> Iterator[Mutant]:
    """Every change of one table."""
    file, name, change = TABLES[table]
    text = (POLICY / f"{file}.py").read_text()
    start = text.index(f'{name}: Final = """')
    for line in text[start : text.index('"""\n', start + len(name) + 20)].splitlines()[1:]:
        cells = line.split()
        if cells[0] in ("operator", "composite"):
            continue
        yield Mutant(table, cells[0], line, "")
        for changed in change(cells):
            yield Mutant(table, cells[0], line, " ".join(changed))


class _Changed(importlib.abc.SourceLoader):
    """Loads a module of fxamp with one line changed."""

    def __init__(self, path: str, mutant: Mutant) -> None:
        self._path, self._mutant = path, mutant

    def get_filename(self, fullname: str) -> str:
        return self._path

    def get_data(self, path: str) -> bytes:
        name = TABLES[self._mutant.table][1]
        before, mark, after = Path(self._path).read_text().partition(f'{name}: Final = """')
        new = f"{self._mutant.new}\n" if self._mutant.new else ""
        return f"{before}{mark}{after.replace(f'{self._mutant.old}{chr(10)}', new, 1)}".encode()


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        file = TABLES[self._mutant.table][0]
        if fullname != f"fxamp.policy.{file}":
            return None
        loader = _Changed(str(POLICY / f"{file}.py"), self._mutant)
        return importlib.util.spec_from_loader(fullname, loader)


def survives(mutant: Mutant) -> bool:
    """Whether all that tests the row passes with the changed table; run in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.dont_write_bytecode = True
            sys.meta_path.insert(0, _Finder(mutant))
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            from tests.mutation_checks import check

            check(mutant.row)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=list(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--every", type=int, default=1, help="only every N-th change")
    given = parser.parse_args()
    assert "fxamp" not in sys.modules
    torch.set_num_threads(1)
    from torch.testing._internal import common_methods_invocations  # noqa: F401  (once, and not in every process)

    unexplained = tried = 0
    for table in given.tables:
        for mutant in list(mutants(table))[:: given.every]:
            tried += 1
            if survives(mutant):
                reason = EXPLAINED.get(mutant.row, "")
                unexplained += not reason
                print(f"survives: {mutant}   {reason or 'NOT EXPLAINED'}", flush=True)
    print(f"{tried} changes, {unexplained} survivors without an explanation")
    return min(unexplained, 1)


if __name__ == "__main__":
    raise SystemExit(main())
