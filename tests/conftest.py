"""What every test starts from, one thread and one seed and no GPU test without a GPU; and the table at the end."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.helpers import has_low_lstm
from tests.ranks import Ranks

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skips what asks for an LSTM that torch does not have for this CPU, whatever it is asked by."""
    try:
        return (yield)
    except RuntimeError as error:
        if "primitive descriptor for the LSTM" not in str(error) or has_low_lstm():
            raise
        pytest.skip("torch has no bfloat16 LSTM for this CPU")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure is not kept among what the user's own programs did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXAMP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Two processes on gloo that the tests of a module share: ``ranks(function, *args)`` is a list of two results."""
    with Ranks() as live:
        yield live


@pytest.fixture(autouse=True)
def unmeasured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy "fast" goes by bytes, as without shapes: what is measured depends on the machine, and takes time."""
    if request.node.get_closest_marker("measured") is None:
        monkeypatch.setattr(importlib.import_module("fxamp.convert"), "measurable", lambda device: False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what became of every operator, when the conformance tests ran."""
    from tests.conformance.operators import Outcome, table

    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    outcomes = [Outcome(*row) for report in reports for name, row in report.user_properties if name == "outcome"]
    if outcomes:
        terminalreporter.section("operators against eager autocast, bit by bit")
        terminalreporter.write_line(table(outcomes))
        opaque = sorted({outcome.operator for outcome in outcomes if outcome.outcome in ("opaque", "not traceable")})
        terminalreporter.write_line(f"\nopaque or not traceable: {', '.join(opaque)}")
