"""Measures one model after another, each in a process of its own and with a limit of time."""

from __future__ import annotations

import copy
import json
import os
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import fx, nn

import fxamp
from tests.helpers import quiet
from tests.third_party import CASES
from tests.third_party.case import Call, load
from tests.third_party.checks import MODES, Expected, check, expected, frontends

__all__ = ["Row", "measure", "report"]

LIMIT = 120  # seconds a model


class Row(NamedTuple):
    """What became of a model."""

    model: str
    taken: str = "no"
    equal: str = ""
    nodes: int | None = None
    opaque: float | None = None
    weights: float | None = None
    seconds: float | None = None
    capture: float | None = None
    ratio: float | None = None


def measure(names: Iterable[str], frontend: str) -> Iterator[Row]:
    """A row a model, as soon as it is known."""
    names = list(names)
    _warm_up(names, frontend)
    for name in names:
        yield _apart(name, partial(_row, name, frontend))


def report(rows: list[Row]) -> str:
    """The table, and what it adds up to."""
    shown = [row._replace(taken=row.taken[:100], equal=row.equal[:80]) for row in rows]
    table = tabulate(shown, headers=_HEADERS, tablefmt="github", floatfmt=".2f")
    taken = [row for row in rows if row.taken == "yes"]
    equal = sum(row.equal == "yes" for row in taken)
    lines = [f"{len(rows)} models: {len(taken)} taken, {equal} of them equal to eager autocast bit by bit"]
    seen = sum(row.weights == 0 for row in taken)
    lines.append(f"{seen} of those taken have no weights inside an opaque module")
    ratios = [row.ratio for row in taken if row.ratio is not None]
    if ratios:
        lines.append(f"conversion: {statistics.median(ratios):.2f} times the bare capture (median of {len(ratios)})")
    return "\n\n".join([table, *lines])


_HEADERS = ["model", "taken", "equal", "nodes", "opaque %", "weights %", "seconds", "capture", "ratio"]


def _row(name: str, frontend: str) -> Row:
    try:
        answers = expected(CASES[name])
    except Exception as error:  # a row whose package changed; the others still count
        return Row(name, f"eager: {_line(error)}")
    start = time.perf_counter()
    try:
        converted, owner = frontends[frontend](answers)
        if frontend == "backend":  # it captures when it is called; what that does to buffers is not to count
            _call_in_both_modes(converted, owner, answers.example)
        seconds = time.perf_counter() - start
        if frontend == "backend":
            converted, owner = frontends[frontend](answers)
        difference = check(answers, converted, owner)
    except Exception as error:  # refused, or a crash: the row says which
        return Row(name, _line(error), seconds=time.perf_counter() - start)
    capture = _seconds_of_capture(answers)
    ratio = seconds / capture if capture else None
    return Row(name, "yes", difference or "yes", *_seen(converted, answers.model), seconds, capture, ratio)


def _seen(converted: Callable[..., Any], model: nn.Module) -> tuple[int | None, float | None, float | None]:
    """The nodes of the graph, how many per cent of its operations are opaque, and of the weights are in such modules.

    One opaque node may be the whole network: the weights tell.
    """
    if not isinstance(converted, fxamp.AmpModule):
        return None, None, None
    report = fxamp.inspect(converted).report()
    operations = sum(report.totals[rule] for rule in ("lower", "fp32", "promote", "follow", "opaque"))
    modules = dict(model.named_modules())
    whole = [
        modules.get(node["module"]) for node in report.nodes if node["rule"] == "opaque" and _is_call(node, modules)
    ]
    inside = {id(weight): weight.numel() for module in whole if module is not None for weight in module.parameters()}
    weights = sum(weight.numel() for weight in model.parameters())
    opaque = 100 * report.totals["opaque"] / max(operations, 1)
    return report.totals["nodes"], opaque, 100 * sum(inside.values()) / max(weights, 1)


def _is_call(node: dict[str, Any], modules: dict[str, nn.Module]) -> bool:
    """Whether a row of the report is the call of a module, and not an operation inside one."""
    path = node["module"]
    return path in modules and node["op"] == type(modules[path]).__name__


def _seconds_of_capture(answers: Expected) -> float | None:
    """What getting a graph in both modes takes without fxamp: of torch.fx, or else of Dynamo; None of neither."""
    for capture in (_symbolic, _dynamo):
        model = copy.deepcopy(answers.model)
        start = time.perf_counter()
        try:
            with quiet():
                capture(model, answers.example)
        except Exception:  # it cannot take this model
            continue
        return time.perf_counter() - start
    return None


def _symbolic(model: nn.Module, example: Call) -> None:
    for training in MODES:
        fx.symbolic_trace(model.train(training))


def _dynamo(model: nn.Module, example: Call) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, inputs: graph.forward, fullgraph=True)
    _call_in_both_modes(compiled, model, example)


def _call_in_both_modes(converted: Callable[..., Any], owner: nn.Module, example: Call) -> None:
    for training in MODES:
        owner.train(training)
        with quiet():
            converted(*example.args, **example.kwargs)


def _warm_up(names: list[str], frontend: str) -> None:
    """Imports, so that no model's time has them; and one thread, since others do not live on in a forked process."""
    torch.set_num_threads(1)
    small = Expected(nn.Linear(2, 2), {"one": Call((torch.zeros(1, 2),), {})}, {})
    for name in sorted({name.partition("/")[0] for name in names}):
        try:
            load(name)
        except ImportError:
            continue
    try:
        converted, owner = frontends[frontend](small)
        _call_in_both_modes(converted, owner, small.example)
    except Exception:
        warnings.warn(f"the frontend {frontend} does not run", stacklevel=2)
    _dynamo(nn.Linear(2, 2), small.example)


def _apart(name: str, work: Callable[[], Row]) -> Row:
    """A row from another process: a crash there, or one that does not end, is a row too."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        signal.alarm(LIMIT)
        try:
            with os.fdopen(writing, "w") as file:
                json.dump(work(), file)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        written = file.read()
    _, status = os.waitpid(process, 0)
    return Row(*json.loads(written)) if written else Row(name, f"ended by signal {status & 127}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
