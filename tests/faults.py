"""Training runs with a fault: an infinity or a NaN in a drawn layer, at a drawn step, on a drawn rank.

Run as::

    python -m tests.faults [RUNS]

Each run is made with the scaler of fxamp and with torch's. What must hold of both is in ``problems_of``; what the
report of an overflow names is compared with an oracle, and counted by the kind of fault.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

from tests.fault_kinds import KINDS, Fault
from tests.fault_models import SAMPLES, Sample, layers_of
from tests.fault_oracle import INPUT, LOSS, Culprit
from tests.fault_runs import OPTIMIZERS, STEPS, Run, Skip, play
from tests.ranks import Ranks

__all__ = ["EVERY_DAY", "Case", "Result", "Verdict", "cases", "study", "table"]


EVERY_DAY = 40  # runs
LOSSES = ("F.cross_entropy", "F.mse_loss")


@dataclass(frozen=True)
class Case:
    """One run, all of it.

    Attributes:
        seed: of everything.
        world: how many ranks.
        model: its name among the samples.
        kind: of the fault.
        layer: where it is.
        value: what is put there.
        step: when.
        rank: on which rank.
        optimizer: its name.
        clip: "step" for ``scaler.step(clip_norm=...)``, "hand" for what it stands for, "" for none.
        batches: of one step.
        two: whether there are two optimizers, with half of the parameters each.
        own: whether the loop makes a scaler of its own, and does not use ``amp.scaler``.
        outside: whether the loss is computed outside of the graph.
        late: whether ``overflow()`` is called after ``update()`` and ``zero_grad()``.
        lone: whether no other rank than the faulty one calls it.
    """

    seed: int
    world: int
    model: str
    kind: str
    layer: str
    value: float
    step: int
    rank: int
    optimizer: str
    clip: str
    batches: int
    two: bool
    own: bool
    outside: bool
    late: bool
    lone: bool

    def __str__(self) -> str:
        flags = [name for name in ("two", "own", "outside", "late", "lone") if getattr(self, name)]
        where = f"{self.model}: {self.kind} ({self.value:g}) in {self.layer}"
        when = f"step {self.step}, rank {self.rank} of {self.world}, {self.batches} batches"
        return f"{self.seed}: {where}, {when}, {self.optimizer}, clip: {self.clip or 'no'}, {' '.join(flags)}"


def case_of(seed: int, world: int) -> Case:
    """The case with this number, among those on so many ranks."""
    draw = random.Random(1000 * world + seed)
    kind = list(KINDS)[seed % len(KINDS)]
    fault = KINDS[kind]
    model = draw.choice([name for name, sample in SAMPLES.items() if _can_train(fault, sample)])
    sample = SAMPLES[model]
    net = sample.make()
    sparse = sample.sparse
    two = not sparse and draw.random() < 0.15
    return Case(
        seed=seed,
        world=world,
        model=model,
        kind=kind,
        layer=draw.choice([path for path in layers_of(net) if _can_have(fault, net.get_submodule(path))]),
        value=draw.choice(fault.values),
        step=draw.randrange(1, STEPS - 1),
        rank=draw.randrange(world),
        optimizer="sgd" if sparse else draw.choice(list(OPTIMIZERS)),
        clip="" if sparse else draw.choice(["", "", "step", "hand"]),
        batches=draw.choice([1, 1, 2]),
        two=two,
        own=draw.random() < 0.3,
        outside=draw.random() < 0.25,
        late=not two and kind != "written gradient" and draw.random() < 0.3,
        lone=draw.random() < 0.5,
    )


def _can_train(fault: type[Fault], sample: Sample) -> bool:
    if fault.place == "target":
        return sample.loss is not F.cross_entropy
    return not (fault.place == "data" and sample.words)


def _can_have(fault: type[Fault], module: nn.Module) -> bool:
    if fault.place == "parameter":
        return any(True for _ in module.parameters())
    return not (fault.place == "input" and isinstance(module, nn.Embedding))


def cases(count: int) -> list[Case]:
    """So many, a quarter of them on two ranks; fewer of the first, which run every day."""
    shares = [0.12 if seed < EVERY_DAY else 0.28 for seed in range(count)]
    return [case_of(seed, 2 if random.Random(seed).random() < share else 1) for seed, share in enumerate(shares)]


# -- what must hold -----------------------------------------------------------------------------------------


def problems_of(case: Case, ours: list[Run], torchs: list[Run]) -> list[str]:
    """Which laws the runs on all ranks break, in words."""
    found = [problem for run in ours for problem in run.problems]
    for rank, (run, other) in enumerate(zip(ours, torchs, strict=True)):
        for what in ("moved", "scales", "parameters", "buffers", "random_state"):
            if not _equal(getattr(run, what), getattr(other, what)):
                found.append(f"rank {rank}: {what} are not those of torch's scaler")
        if not all(p.isfinite().all() for step in run.parameters for p in step):
            found.append(f"rank {rank}: parameters are not finite")
    for what in ("moved", "scales", "parameters"):
        if not all(_equal(getattr(run, what), getattr(ours[0], what)) for run in ours):
            found.append(f"{what} are not the same on all ranks")
    return found


def _equal(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right) or torch.equal(left.nan_to_num(), right.nan_to_num())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_equal, left, right))
    return left == right


@dataclass(frozen=True)
class Verdict:
    """Whether the report of a skipped step names what made it, and the report."""

    named: bool
    text: str


def verdict_of(case: Case, rank: int, skip: Skip) -> Verdict:
    """What is to be said of one report."""
    text = f"{skip.found!s}\nexpected: {skip.expected or 'nothing in the calls of this rank'}"
    if skip.expected:
        return Verdict(any(_is_named(case, skip, expected) for expected in skip.expected), text)
    if rank != case.rank or (case.world > 1 and not KINDS[case.kind].outside):
        return Verdict(skip.found.value == "", text)  # it came from the other rank
    return Verdict(_is_parameter_named(case, skip), text)


def _is_named(case: Case, skip: Skip, expected: Culprit) -> bool:
    found = skip.found
    if expected.modules == {INPUT} or expected.first == INPUT:
        return found.op == "placeholder"
    if expected.modules == {LOSS} and case.outside:
        return found.op == "output"
    if expected.modules == {LOSS}:
        named = found.op == "placeholder" if case.kind == "target not finite" else found.op in LOSSES
        return named or _is_cast(found, expected)
    if found.phase == "forward" and found.phase != expected.phase:
        return found.module == expected.first or (found.op == "get_attr" and found.module in expected.modules)
    inside = skip.opaque and any(module.startswith(f"{found.module}.") for module in expected.modules)
    return found.phase == expected.phase and (found.module in expected.modules or inside or _is_cast(found, expected))


def _is_cast(found: Any, expected: Culprit) -> bool:
    return "its gradient does not fit when it is cast" in found.note and found.module in expected.casts


def _is_parameter_named(case: Case, skip: Skip) -> bool:
    found = skip.found
    if case.kind == "hook on a parameter":
        return any(f"a hook on '{name}'" in found.note for name in skip.names)
    return found.value == "" and skip.names.issuperset(found.parameters)


# -- the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What came of a case.

    Attributes:
        case: which one.
        problems: the laws that it broke.
        verdicts: on the report of each skipped step.
        mended: how many proposals it took to compute each step that overflowed in float16; None: they did not help.
    """

    case: Case
    problems: list[str]
    verdicts: list[Verdict]
    mended: list[int | None]

    @property
    def named(self) -> bool:
        """Whether each skipped step was told of as it should be."""
        return all(verdict.named for verdict in self.verdicts)

    def __str__(self) -> str:
        misses = [verdict.text for verdict in self.verdicts if not verdict.named]
        lines = [str(self.case), *self.problems, *(miss.replace("\n", "\n    ") for miss in misses)]
        return "\n  ".join([*lines, *["what is proposed does not help"][: self.mended.count(None)]])


def study(chosen: Sequence[Case], ranks: Ranks) -> list[Result]:
    """The results of these cases, those on two ranks on these."""
    return [_result(case, ranks(play, case) if case.world > 1 else [play(0, case)]) for case in chosen]


def _result(case: Case, runs: list[tuple[Run, Run]]) -> Result:
    ours, torchs = map(list, zip(*runs, strict=True))
    skips = [(rank, skip) for rank, run in enumerate(ours) for skip in run.skips]
    verdicts = [verdict_of(case, rank, skip) for rank, skip in skips]
    mended = [skip.mended for _, skip in skips if skip.mendable]
    return Result(case, problems_of(case, ours, torchs), verdicts, mended)


def table(results: Sequence[Result]) -> str:
    """A row for each kind of fault, and one for all."""
    rows = []
    for kind in [*KINDS, "all"]:
        own = [result for result in results if kind in (result.case.kind, "all")]
        verdicts = [verdict for result in own for verdict in result.verdicts]
        mended = [count for result in own for count in result.mended]
        counts = [count for count in mended if count is not None]
        rows.append(
            (
                kind,
                len(own),
                sum(not result.verdicts for result in own),
                sum(bool(result.problems) for result in own),
                sum(result.named for result in own),
                len(verdicts),
                sum(verdict.named for verdict in verdicts),
                f"{len(counts)} of {len(mended)}" if mended else "",
                f"{sum(counts) / len(counts):.1f}" if counts else "",
            )
        )
    heads = ("fault", "runs", "no skip", "law broken", "named", "skips", "named", "mended", "by proposals")
    return tabulate(rows, heads, disable_numparse=True)


def main(count: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with Ranks(timeout=120.0) as ranks:
        results = study(cases(count), ranks)
    for result in results:
        if result.problems or not result.named or None in result.mended:
            print(result)
    print(table(results))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
