"""The benchmarks count what a hand counts, and what they write holds together."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import measure, scaler, timing
from benchmarks.__main__ import main
from benchmarks.cases import SUITE, Batch, Case
from benchmarks.casts import Casts, count_casts
from benchmarks.memory import peak_bytes
from benchmarks.results import stem
from benchmarks.variants import AUTOCAST, FLOAT32, FLOOR, PHASES, VARIANTS, Setting, Step, made_of


def two_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))


def draw(batch: int) -> Batch:
    return (torch.randn(batch, 8),), (torch.randn(batch, 4),)


TINY = Case("tiny", "launch-bound", two_linear, draw, (4,), (4,), F.mse_loss)
SETTING = Setting("cpu", torch.bfloat16)


# -- casts -----------------------------------------------------------------------------------------------


def casts_of(variant: str, phase: str = "training", case: Case = TINY) -> Casts:
    made = made_of(case, phase, SETTING)
    step = VARIANTS[phase][variant](made).step
    step()
    return count_casts(step, made.model.parameters())


def test_the_casts_of_autocast_by_hand() -> None:
    weights = 8 * 16 + 16 + 16 * 4 + 4
    found = casts_of(AUTOCAST)
    # The input, two weights and two biases; the output, for a loss in float32.
    assert found.forward == 1 + 4 + 1
    # The gradients of the output and of the four parameters; the input has none.
    assert found.backward == 1 + 4
    assert found.bytes == (4 + 2) * (4 * 8 + weights + 4 * 4 + 4 * 4 + weights)
    assert found.weight_bytes == (4 + 2) * 2 * weights
    assert found.not_seen_into == []


def test_the_casts_of_an_inference_by_hand() -> None:
    found = casts_of(AUTOCAST, "inference")
    assert (found.forward, found.backward) == (1 + 4, 0)
    assert found.bytes - found.weight_bytes == (4 + 2) * 4 * 8


@pytest.mark.parametrize("variant", [FLOAT32, FLOOR])
def test_one_dtype_has_no_casts(variant: str) -> None:
    found = casts_of(variant)
    assert (found.forward, found.backward, found.bytes) == (0, 0, 0)
    assert found.dispatched > 10


def counted(forward: Callable[[], Tensor], *weights: nn.Parameter) -> Casts:
    return count_casts(Step(forward, weights, training=True), weights)


def test_a_group_is_one_cast_of_all_its_bytes() -> None:
    sources, targets = [torch.ones(3), torch.ones(5)], [torch.zeros(n, dtype=torch.float16) for n in (3, 5)]
    weight = nn.Parameter(torch.ones(2))

    def forward() -> Tensor:
        torch._foreach_copy_(targets, sources)
        targets[0].copy_(targets[1][:3])  # of one dtype
        torch.ones(3, dtype=torch.int64).to(torch.float32)  # not of floating-point numbers
        torch.ones(3).to(torch.float64)
        return weight.sum()

    found = counted(forward, weight)
    assert (found.forward, found.bytes, found.weight_bytes) == (2, 6 * 8 + 12 * 3, 0)


def test_the_cast_of_a_view_of_a_weight_is_the_weights() -> None:
    weight = nn.Parameter(torch.ones(6, 2))
    found = counted(lambda: weight[:3].t().to(torch.bfloat16).float().sum(), weight)
    assert (found.forward, found.backward) == (2, 2)
    # There and back for the weight; the other two are casts of what was computed.
    assert (found.bytes, found.weight_bytes) == (4 * 6 * 6, 2 * 6 * 6)


def test_a_gradient_as_large_as_a_weight_is_not_the_weights() -> None:
    weight, x = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)), torch.ones(4, 4, dtype=torch.bfloat16)
    found = counted(lambda: (x @ weight).float().sum(), weight)
    assert (found.forward, found.backward, found.weight_bytes) == (1, 1, 0)


class InGroups(torch.autograd.Function):
    """Casts weights as one group into buffers, forward and backward."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        low = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in weights]
        torch._foreach_copy_(low, list(weights))
        return tuple(low)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
        torch._foreach_copy_(wide, list(gradients))
        return tuple(wide)


def test_weights_cast_in_groups() -> None:
    weights = [nn.Parameter(torch.ones(n)) for n in (3, 5)]

    def forward() -> Tensor:
        first, second = InGroups.apply(*weights)
        return first.sum() * second.sum()

    found = counted(forward, *weights)
    assert (found.forward, found.backward) == (1, 1)
    assert found.bytes == found.weight_bytes == 2 * 6 * 8


def test_an_operator_of_ones_own_is_named() -> None:
    @torch.library.custom_op("fxamp_benchmarks::narrow", mutates_args=())
    def narrow(x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)

    weight = nn.Parameter(torch.ones(2))
    assert counted(lambda: weight.sum() + narrow(torch.ones(2)).sum(), weight).not_seen_into == [narrow._qualname]


# -- memory ----------------------------------------------------------------------------------------------


def test_the_peak_by_hand() -> None:
    def make() -> Callable[[], None]:
        kept = torch.zeros(1000)

        def step() -> None:
            twice = kept + kept
            wide = twice.to(torch.float64)
            del twice
            torch.zeros(500) + wide[:500]

        return step

    # What is kept, and at the end of the step: wide, 500 floats, what the addition makes float64 of them, and the sum.
    assert peak_bytes(make, "cpu") == 4000 + (8000 + 2000 + 4000 + 4000)


def test_what_a_step_keeps_counts() -> None:
    def make() -> Callable[[], None]:
        kept: list[Tensor] = []
        return lambda: kept.append(torch.zeros(1000))

    assert peak_bytes(make, "cpu") == 3 * 4000


# -- times -----------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round() -> None:
    found = timing.ratios([1.0, 20.0, 3.0, 4.0, 5.0], [1.0, 10.0, 1.0, 1.0, 1.0])
    assert found == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert timing.ratios([3.0], [2.0]) == {"median": 1.5, "q1": 1.5, "q3": 1.5}


def test_what_fails_is_out_and_the_others_go_on() -> None:
    calls: list[str] = []

    def later() -> None:
        calls.append("later")
        if len(calls) > 40:
            raise ValueError("too often")

    def at_once() -> None:
        raise RuntimeError("no kernel")

    found = timing.time_in_turns({"works": lambda: None, "at once": at_once, "later": later}, 3, "cpu")
    assert len(found["works"].seconds) == 3
    assert found["works"].failed is None
    assert found["at once"].failed == "RuntimeError: no kernel"
    assert found["later"].failed == "ValueError: too often"


# -- a run -----------------------------------------------------------------------------------------------


def refuse(made: Any) -> Any:
    raise RuntimeError("no such kernel\nand more")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a quick run of the tiny case writes, with one variant that fails."""
    folder = tmp_path_factory.mktemp("results")
    other = dataclasses.replace(TINY, name="other", kind="large")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ENOUGH", 0.002)
        patch.setattr(measure, "VARIANTS", {phase: {**VARIANTS[phase], "refused": refuse} for phase in PHASES})
        main(["--quick", "--only", "tiny|other", "--out", str(folder)], (TINY, other))
    return {"folder": folder, **json.loads((folder / f"{stem('cpu')}.json").read_text())}


def test_the_run_says_where_it_was(run: dict[str, Any]) -> None:
    expected = {"torch": torch.__version__, "device": "cpu", "threads": 1, "dtype": "bfloat16", "rounds": 3}
    assert {key: run[key] for key in expected} == expected
    assert run["machine"]
    assert run["date"] in stem("cpu")


def test_every_case_phase_and_variant_has_a_row(run: dict[str, Any]) -> None:
    rows = [(row["phase"], row["case"], row["variant"]) for row in run["cases"]]
    names = {phase: [*VARIANTS[phase], "refused"] for phase in PHASES}
    assert rows == [(phase, case, name) for phase in PHASES for case in ("tiny", "other") for name in names[phase]]


def test_the_rows_hold_together(run: dict[str, Any]) -> None:
    by_name = {(row["phase"], row["case"], row["variant"]): row for row in run["cases"]}
    for (phase, case, name), row in by_name.items():
        if name == "refused":
            assert row["failed"] == "failed: RuntimeError: no such kernel"
            assert row["seconds"] is row["to_autocast"] is row["casts"] is row["peak_bytes"] is None
            continue
        assert row["failed"] is None
        assert len(row["times"]) == 3
        assert row["seconds"] == statistics.median(row["times"])
        assert (row["conversion_seconds"] is not None) == name.startswith("fxamp")
        assert row["peak_bytes"] > 212 * 2
        for key, reference in (("to_autocast", AUTOCAST), ("to_floor", FLOOR)):
            other = by_name[phase, case, reference]
            each = [mine / its for mine, its in zip(row["times"], other["times"], strict=True)]
            assert min(each) <= row[key]["q1"] <= row[key]["median"] <= row[key]["q3"] <= max(each)
            assert min(each) <= row["seconds"] / other["seconds"] * (1 + 1e-12)
            assert row["seconds"] / other["seconds"] <= max(each) * (1 + 1e-12)
            assert row[key]["median"] == statistics.median(each)
    assert by_name["training", "tiny", AUTOCAST]["casts"]["casts"] == 11
    assert by_name["training", "tiny", AUTOCAST]["to_autocast"] == {"median": 1, "q1": 1, "q3": 1}


def test_the_means_are_those_of_the_rows(run: dict[str, Any]) -> None:
    assert len(run["means"]) == sum(len(VARIANTS[phase]) + 1 for phase in PHASES)
    for mean in run["means"]:
        rows = [row for row in run["cases"] if (row["phase"], row["variant"]) == (mean["phase"], mean["variant"])]
        if mean["variant"] == "refused":
            assert (mean["all"], mean["worst"], mean["cases"], mean["failed"]) == (None, None, 0, 2)
            continue
        tiny, other = (row["to_autocast"]["median"] for row in rows)
        assert mean["all"] == pytest.approx(math.sqrt(tiny * other))
        assert (mean["launch-bound"], mean["large"]) == (pytest.approx(tiny), pytest.approx(other))
        assert mean["worst"]["median"] == max(tiny, other)
        assert (mean["cases"], mean["failed"]) == (2, 0)


def test_the_text_has_it_too(run: dict[str, Any]) -> None:
    text = (run["folder"] / f"{stem('cpu')}.txt").read_text()
    assert all(f"\n{phase}\n" in text and f"\n{phase}: means" in text for phase in PHASES)
    assert text.count("failed: RuntimeError: no such kernel") == 4
    assert text.isascii()


def test_a_chart_is_drawn_where_matplotlib_is(run: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    assert (run["folder"] / f"{stem('cpu')}.png").read_bytes().startswith(b"\x89PNG")


def test_no_case_is_an_error_that_names_them() -> None:
    with pytest.raises(SystemExit, match=r"no case matches 'nothing': there are mlp-48x64, gpt-d128, "):
        main(["--only", "nothing"])


# -- the suite -------------------------------------------------------------------------------------------


def test_the_suite_is_what_was_announced() -> None:
    names = [case.name for case in SUITE]
    assert len(names) == len(set(names)) == 13
    assert {case.kind for case in SUITE} == {"launch-bound", "large"}


@pytest.mark.parametrize(("name", "millions"), [("resnet-18", 11.69), ("resnet-50", 25.56)])
def test_the_shapes_are_those_of_the_papers(name: str, millions: float) -> None:
    (case,) = (case for case in SUITE if case.name == name)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in case.make().parameters())
    assert round(count / 1e6, 2) == millions


# -- the scaler ------------------------------------------------------------------------------------------


def test_the_scaler_is_measured_beside_torchs(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["scaler", "--rounds", "1"])
    scaler.main()
    table, _, notes = capsys.readouterr().out.partition("\n\n")
    rows = {row[:15].strip(): row[15:].split() for row in table.splitlines()[2:]}
    assert rows.keys() == scaler.OPTIMIZERS.keys()
    for name, (alone, torchs, ours, *_, passes, waited, waits) in rows.items():
        assert all(float(time) > 0 for time in (alone, torchs, ours))
        assert (passes, waited, waits) == ("1", *(("0", "0") if "fused" in name else ("1", "1")))
    assert len(notes.splitlines()) == 3
