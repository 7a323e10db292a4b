"""The policy "fast" is about as exact as autocast: against float64, and where training ends.

The bound of the first part: over the models of the zoo the median of error("fast") / error(autocast), each against the
model in float64, is at most 1.5, for outputs and for gradients. The numbers: ``python -m tests.fast_numerics``.

That of the second: the mean validation loss over five seeds is within two standard errors of float32's, which is the
spread over its seeds divided by the root of their number. The numbers: ``python -m tests.fast_training``.
"""

from __future__ import annotations

import functools
import statistics

import pytest
import torch

from tests.fast_numerics import RULES, Compared, Skipped, compare, compare_all, main, ratios, summary
from tests.fast_training import TASKS, ends
from tests.helpers import quiet
from tests.zoo import BASIC, ZOO

MEDIAN, FEW = 1.5, 3.0
SEEDS = 5

# -- against float64 -----------------------------------------------------------------------------------------------


@functools.cache
def found(rules: str, examples: bool) -> tuple[list[Compared], dict[str, str]]:
    with quiet():
        return compare_all(ZOO, rules, examples=examples)


def check(rows: list[Compared]) -> None:
    print(summary(rows))  # noqa: T201 - seen when it fails, and with pytest -s
    for which in (0, 1):
        assert statistics.median(ratios(rows, which)) <= MEDIAN
        assert ratios(rows, which)[len(rows) * 9 // 10] <= FEW


@pytest.mark.parametrize("examples", [False, True], ids=["symbolic", "examples"])
@pytest.mark.parametrize("rules", RULES)
def test_the_error_of_the_basic_models(rules: str, examples: bool) -> None:
    with quiet():
        rows, _ = compare_all(BASIC, rules, examples=examples)
    assert len(rows) >= 12
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize("examples", [False, True], ids=["symbolic", "examples"])
@pytest.mark.parametrize("rules", RULES)
def test_the_error_of_the_whole_zoo(rules: str, examples: bool) -> None:
    rows, _ = found(rules, examples)
    assert len(rows) >= 0.7 * sum(case.symbolic or examples for case in ZOO.values())
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES)
def test_were_all_choices_low_the_bound_would_hold(rules: str) -> None:
    """The table lets no operator choose that spoils many models."""
    with quiet():
        rows, _ = compare_all(ZOO, rules, examples=True, all_low=True)
    check(rows)


def test_autocast_itself_is_measured() -> None:
    """The errors are those of bfloat16, not of float32 and not of everything."""
    rows = [compare(name) for name in ("mlp", "attention", "resnet")]
    for row in rows:
        assert all(1e-4 < error < 1e-1 for error in (*row.autocast, *row.fast))
        assert ratios([row], 0)[0] < FEW


def test_an_error_of_float32_is_no_error() -> None:
    rows = [Compared("a", (1e-9, 1e-3), (1e-8, 3e-3)), Compared("b", (1e-3, 1e-3), (float("nan"), 1e-3))]
    assert ratios(rows, 0) == [1.0, torch.inf]
    assert ratios(rows, 1) == [1.0, pytest.approx(3.0)]


@pytest.mark.parametrize(
    ("name", "why"),
    [("top_k_moe", "decides by its values: argmax, topk"), ("gan", "random"), ("roi", "decides by its values: floor")],
)
def test_why_a_model_is_skipped(name: str, why: str) -> None:
    with quiet(), pytest.raises(Skipped, match=why):
        compare(name, examples=True)


def test_the_command_prints_a_row_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    main(["mlp", "attention", "--rules", "cpu"])
    printed = capsys.readouterr().out
    assert "\nmlp " in printed
    assert "\nattention " in printed
    assert "median" in printed


# -- training --------------------------------------------------------------------------------------------------------


def away(task: str, policy: str) -> float:
    """How far the mean validation loss is from float32's, in standard errors of that."""
    single, low = ends(task, "float32", SEEDS), ends(task, policy, SEEDS)
    return (statistics.fmean(low) - statistics.fmean(single)) / (statistics.stdev(single) / SEEDS**0.5)


SLOW = {"characters", "digits, attention"}
TRAINED = [pytest.param(task, marks=pytest.mark.slow if task in SLOW else ()) for task in TASKS]


@pytest.mark.parametrize("task", TRAINED)
def test_training_ends_within_the_noise_of_float32(task: str) -> None:
    assert abs(away(task, "autocast")) <= 2
    assert abs(away(task, "fast")) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_were_all_choices_low_training_would_end_there_too(task: str) -> None:
    assert abs(away(task, "fast, all low")) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_noise_is_less_than_what_low_weights_cost(task: str) -> None:
    """The bound can fail: with weights that are bfloat16 themselves training ends elsewhere."""
    assert away(task, "wholly low") > 2
