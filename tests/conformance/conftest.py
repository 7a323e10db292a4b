"""Prints what became of every operator, when the conformance tests ran."""

from __future__ import annotations

from typing import Any

from tests.conformance.operators import Outcome, table


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    outcomes = [Outcome(*row) for report in reports for name, row in report.user_properties if name == "outcome"]
    if outcomes:
        terminalreporter.section("operators against eager autocast, bit by bit")
        terminalreporter.write_line(table(outcomes))
        opaque = sorted({outcome.operator for outcome in outcomes if outcome.outcome in ("opaque", "not traceable")})
        terminalreporter.write_line(f"\nopaque or not traceable: {', '.join(opaque)}")
