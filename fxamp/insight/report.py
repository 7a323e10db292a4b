"""Which decision was taken where, as a table and as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from tabulate import tabulate, tabulate_formats
from torch import fx

from fxamp.dtypes import abbreviate
from fxamp.errors import FxampError, nearest
from fxamp.plan import Decision, Flow, PrecisionPlan, tensors_in

__all__ = ["Report", "report_of"]

COLUMNS: Final = ("name", "op", "module", "rule", "inputs", "runs in", "output", "casts", "why")
# Shown by default where there is something: measured microseconds, in float32/in the low dtype, and as it runs.
TIMES: Final = ("predicted", "measured")
_KEYS: Final = {"runs in": "runs_in", "why": "reason"}
_LOOKING: Final = ("promote", "dtype if castable")
_COUNTED: Final = ("lower", "fp32", "promote", "follow", "opaque")
MAX_WIDTH: Final = 119
# What is cut when the table is too wide, in this order, and how far.
_MAY_SHRINK: Final = {"why": 16, "op": 16, "module": 12, "inputs": 12, "name": 14, "output": 8}


@dataclass(frozen=True)
class Report:
    """The decisions of one graph; ``str(report)`` is the table.

    Example::

        >>> import fxamp, torch
        >>> amp = fxamp.convert(torch.nn.Linear(4, 4), dtype=torch.bfloat16, device_type="cpu")
        >>> print(amp.report().table(columns=("name", "op", "rule", "casts", "why")))
        name     op           rule      casts  why
        -------  -----------  ------  -------  -----------
        input_1  placeholder                0  model input
        linear   F.linear     lower         3  op table
        output   output                     0
    """

    model: str
    policy: str
    device_type: str
    dtype: str
    mode: str
    nodes: tuple[dict[str, Any], ...]
    totals: dict[str, int]
    frontend: str = "torch.fx"
    failed: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data; the schema is part of the public API."""
        return {
            "policy": self.policy,
            "device_type": self.device_type,
            "dtype": self.dtype,
            "mode": self.mode,
            "frontend": self.frontend,
            "failed_frontends": dict(self.failed),
            "note": self.note,
            "nodes": [dict(node) for node in self.nodes],
            "totals": dict(self.totals),
        }

    def table(self, tablefmt: str = "simple", columns: Iterable[str] | None = None) -> str:
        """The decisions as text, one row a node.

        Args:
            tablefmt: a format of the ``tabulate`` package, such as "github".
            columns: which of "name", "op", "module", "rule", "inputs", "runs in", "output", "casts", "why", "source",
                "predicted" and "measured" to show; None: all but "source", and the last two where they say something.
                "predicted" has what a call takes in float32 and in the low dtype, with gradients in train mode, as
                policy "fast" measured it alone; "measured" what it takes in the forward of this graph; both in
                microseconds. Long texts are cut only where the table would be wider than 119 characters.

        Raises:
            FxampError: for a column or a format that does not exist.
        """
        if columns is None:
            columns = (*COLUMNS, *(name for name in TIMES if any(name in node for node in self.nodes)))
        columns = (columns,) if isinstance(columns, str) else tuple(columns)
        _check_known("column", columns, (*COLUMNS, "source", *_KEYS.values(), *TIMES))
        _check_known("tablefmt", (tablefmt,), tabulate_formats)
        rows = [[node.get(_KEYS.get(column, column), "") for column in columns] for node in self.nodes]
        for column, least in _MAY_SHRINK.items():
            if column in columns and tablefmt == "simple":
                _shrink(rows, columns, columns.index(column), least)
        return _render(rows, columns, tablefmt)

    def __str__(self) -> str:
        counts = ", ".join(f"{self.totals[rule]} {rule}" for rule in _COUNTED if self.totals[rule])
        soft = f", {self.totals['soft_casts']} soft" if self.totals["soft_casts"] else ""
        casts = f"{self.totals['casts']} ({self.totals['weight_casts']} of weights{soft})"
        unknown = self.totals["dtype_unknown"]
        values = f"{unknown} of {unknown + self.totals['dtype_known']} values"
        title = f"{self.model}   policy {self.policy}/{self.device_type} {self.dtype}   mode {self.mode}"
        for frontend, reason in self.failed.items():
            title += f"\ncaptured by {self.frontend}, as {frontend} could not: {reason}"
        totals = f"ops: {counts or 'none'}     casts: {casts}     dtype unknown: {values}"
        title += f"\n{self.note}" if self.note else ""
        return f"{title}\n\n{self.table()}\n\n{totals}"


def report_of(
    model: str,
    plan: PrecisionPlan,
    graph: fx.Graph,
    frontend: str = "torch.fx",
    failed: Mapping[str, str] = MappingProxyType({}),
    note: str = "",
    seconds: Mapping[str, float] = MappingProxyType({}),
) -> Report:
    """The report of one planned and rewritten graph.

    Args:
        model: the name in the title.
        plan: the decisions.
        graph: the rewritten graph; the casts are counted in it.
        frontend: what captured it.
        failed: what could not, with the reason.
        note: a line for the title.
        seconds: what calls were measured to take, by name.
    """
    policy = plan.policy
    assert policy.device_type is not None
    assert policy.dtype is not None
    casts = Counter(node.meta["for"] for node in graph.nodes if "cast" in node.meta)
    made = [node.meta["cast"] for node in graph.nodes if "cast" in node.meta]
    weights = sum(cast.weight for cast in made)
    decisions = [decision for decision in plan if decision.op != "get_attr"]
    nodes = tuple(_row(decision, casts[decision.name], seconds.get(decision.name)) for decision in decisions)
    rules = Counter(decision.rule for decision in decisions)
    total = sum(casts.values())
    totals = {"nodes": len(nodes), **{rule: rules[rule] for rule in _COUNTED}}
    totals.update(casts=total, weight_casts=weights, activation_casts=total - weights)
    # A call that looks at the dtypes it gets before it casts is as soft as a cast that does.
    totals["soft_casts"] = sum(cast.soft for cast in made) + sum(decision.how in _LOOKING for decision in decisions)
    flows = [decision.output for decision in decisions if tensors_in(decision.output)]
    totals["dtype_unknown"] = sum(map(_is_unknown, flows))
    totals["dtype_known"] = len(flows) - totals["dtype_unknown"]
    return Report(
        model,
        policy.name,
        policy.device_type,
        abbreviate(policy.dtype),
        plan.mode,
        nodes,
        totals,
        frontend,
        failed,
        note,
    )


def _row(decision: Decision, casts: int, measured: float | None) -> dict[str, Any]:
    times = {}
    if decision.seconds is not None:
        times["predicted"] = "/".join(map(_micro, decision.seconds))
    if measured is not None and decision.rule:
        times["measured"] = _micro(measured)
    return {
        "name": decision.name,
        "op": decision.op,
        "module": decision.module,
        "rule": decision.rule,
        "inputs": _dtypes(decision.inputs),
        "runs_in": abbreviate(decision.runs_in) if decision.runs_in is not None else "",
        "output": _dtypes((decision.output,)),
        "casts": casts,
        "reason": decision.reason,
        "source": decision.source,
        **times,
    }


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}" if seconds < 1e-4 else f"{seconds * 1e6:.0f}"


def _dtypes(flows: Iterable[Flow]) -> str:
    """The different dtypes in order; "?" for one that is not known."""
    found: dict[str, None] = {}
    for flow in flows:
        for value in tensors_in(flow):
            found["?" if value.dtype is None else abbreviate(value.dtype)] = None
    return ", ".join(found)


def _is_unknown(flow: Flow) -> bool:
    return any(value.dtype is None for value in tensors_in(flow))


def _render(rows: list[list[Any]], columns: tuple[str, ...], tablefmt: str) -> str:
    words = [i for i, column in enumerate(columns) if column != "casts"]
    return str(tabulate(rows, headers=columns, tablefmt=tablefmt, disable_numparse=words))


def _shrink(rows: list[list[Any]], columns: tuple[str, ...], index: int, least: int) -> None:
    """Cuts the texts of a column, at most to ``least`` characters, as far as the table is too wide."""
    widest = max((len(line) for line in _render(rows, columns, "simple").splitlines()), default=0)
    longest = max((len(row[index]) for row in rows), default=0)
    width = max(least, longest - max(0, widest - MAX_WIDTH))
    for row in rows:
        if len(row[index]) > width:
            row[index] = (
                f"{row[index][: width - 2]}.." if columns[index] != "module" else f"..{row[index][2 - width :]}"
            )


def _check_known(word: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = tuple(known)
    for name in names:
        if name not in known:
            raise FxampError(
                f"unknown {word} {name!r}: expected one of {', '.join(known)}",
                hint=f"write {(nearest(str(name), known) or known[0])!r}",
            )
