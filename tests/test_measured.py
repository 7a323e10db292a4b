"""Policy "fast" with shapes known: what was measured decides whether an operator runs in the low dtype."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxamp
from fxamp.cost import Probe

LOW = torch.bfloat16


class Told(Probe):
    """Says of each call what a test wants, and counts the questions."""

    asked: list[str]

    def __init__(self, low: float, cast: float) -> None:
        self.low, self.per_element, self.asked, self.specs = low, cast, [], []

    def compare(self, key: str, function: Any, args: Any, kwargs: Any, dtypes: Any, *, training: bool) -> Any:
        self.asked.append(f"{key} {'train' if training else 'eval'}")
        self.specs.append(args)
        return (1e-3, 1e-3 * self.low) if key == "linear" else (None, None)

    def cast(self, numel: int, source: Any, target: Any, *, training: bool = False) -> float:
        return self.per_element * numel

    def pointwise(self, numel: int, dtype: Any, *, training: bool = False) -> float:
        return 1e-12 * numel

    def save(self) -> None:
        self.asked.append("saved")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Told]:
    def tell(low: float, cast: float = 1e-12) -> Told:
        probe = Told(low, cast)
        module = importlib.import_module("fxamp.convert")
        monkeypatch.setattr(module, "measurable", lambda device: True)
        monkeypatch.setattr(module, "Probe", lambda device: probe)
        return probe

    return tell


def converted(policy: Any = "fast", **options: Any) -> fxamp.AmpModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    options.setdefault("example_inputs", (torch.randn(16, 64),))
    return fxamp.convert(model, dtype=LOW, policy=policy, **options)


def linears(amp: fxamp.AmpModule) -> list[tuple[Any, str]]:
    return [(decision.runs_in, decision.reason) for decision in amp.plan if decision.aten == "linear"]


def test_what_is_faster_in_the_low_dtype_runs_in_it(told: Callable[..., Told]) -> None:
    told(low=0.5)
    assert linears(converted()) == [(LOW, "op table")] * 3


def test_what_is_not_runs_in_float32_and_nothing_is_cast(told: Callable[..., Told]) -> None:
    told(low=1.5)
    amp = converted()
    assert linears(amp) == [(torch.float32, "faster in f32")] * 3
    assert amp.report().totals["weight_casts"] == 0
    assert [decision.rule for decision in amp.plan if decision.aten == "linear"] == ["fp32"] * 3


def test_casts_that_cost_more_than_they_bring_are_not_made(told: Callable[..., Told]) -> None:
    told(low=0.5, cast=1e-6)
    assert linears(converted()) == [(torch.float32, "faster in f32")] * 3


def test_the_output_has_the_dtype_of_autocast_all_the_same(told: Callable[..., Told]) -> None:
    told(low=1.5)
    amp = converted()
    x = torch.randn(16, 64)
    assert amp(x).dtype == LOW
    with torch.no_grad():
        torch.testing.assert_close(amp(x).float(), amp.replan("full")(x), atol=1e-2, rtol=1e-2)


def test_both_modes_are_measured_once_each_and_kept(told: Callable[..., Told]) -> None:
    probe = told(low=0.5)
    converted()
    assert {ask for ask in probe.asked if ask.startswith("linear")} == {"linear train", "linear eval"}
    assert probe.asked[-1] == "saved"


def test_gradients_count_for_what_has_one(told: Callable[..., Told]) -> None:
    probe = told(low=0.5)
    converted()
    (x, weight, bias), (y, _, _), *_ = [args for args, ask in zip(probe.specs, probe.asked, strict=False) if args]
    assert (x.grad, weight.grad, bias.grad) == (False, True, True)
    assert y.shape == (16, 64)


@pytest.mark.parametrize("policy", ["autocast", "full"])
def test_other_policies_measure_nothing(told: Callable[..., Told], policy: str) -> None:
    probe = told(low=1.5)
    converted(policy)
    assert not probe.asked


def test_without_shapes_nothing_is_measured(told: Callable[..., Told]) -> None:
    probe = told(low=1.5)
    assert linears(converted(example_inputs=None)) == [(LOW, "op table")] * 3
    assert not probe.asked


def test_a_graph_for_another_device_is_not_measured_on_this_one(told: Callable[..., Told]) -> None:
    probe = told(low=1.5)
    assert linears(converted(device_type="cuda")) == [(LOW, "op table")] * 3
    assert not probe.asked


def test_an_override_is_not_measured_away(told: Callable[..., Told]) -> None:
    told(low=1.5)
    policy = fxamp.Policy.fast().with_modules({"2": "lower"})
    assert [runs_in for runs_in, _ in linears(converted(policy))] == [torch.float32, LOW, torch.float32]


def test_the_report_has_what_was_predicted(told: Callable[..., Told]) -> None:
    told(low=0.5)
    amp = converted()
    rows = {row["name"]: row for row in amp.report().to_dict()["nodes"]}
    assert rows["linear"]["predicted"] == "1000/500"
    assert "predicted" not in rows["gelu"]
    header = str(amp.report()).splitlines()[2].split("  ")
    assert "predicted" in header[-1] or "predicted" in header
    assert "predicted" not in str(converted("autocast").report())


def test_the_report_has_what_is_measured_on_request() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.norm(self.fc(x)), training=self.training)

    model, x = Normed(), torch.randn(4, 8)
    amp = fxamp.convert(model, example_inputs=(x,), dtype=LOW)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    report = amp.report(measure=(x,))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    measured = {row["name"]: row.get("measured") for row in report.to_dict()["nodes"]}
    assert float(measured["linear"]) > 0
    assert measured["x"] is None
    assert " measured" in str(report)
    assert " measured" not in str(amp.report())


@pytest.mark.measured
def test_small_calls_run_in_float32_and_large_ones_do_not() -> None:
    torch.set_num_threads(1)
    small = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    amp = fxamp.convert(small, example_inputs=(torch.randn(2, 8),), dtype=LOW, policy="fast")
    assert [decision.runs_in for decision in amp.plan if decision.aten == "linear"] == [torch.float32] * 3
    assert all(decision.seconds is not None for decision in amp.plan if decision.aten == "linear")
    again = fxamp.convert(small, example_inputs=(torch.randn(2, 8),), dtype=LOW, policy="fast")
    assert again.code == amp.code
