"""Models of other packages equal eager autocast bit by bit: what they return, gradients and buffers, in both modes."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fxamp
from tests.third_party import CASES
from tests.third_party.case import Case, call, each
from tests.third_party.checks import check, convert, expected, first_difference, outcome
from tests.third_party.known import DIFFERENT, REFUSED

pytestmark = pytest.mark.filterwarnings("ignore")  # what other packages warn about is theirs


def rows() -> list[Any]:
    """Every case; skipped where its package is not installed, which nothing but ``make third-party`` does."""
    found = []
    for name, case in CASES.items():
        package = name.partition("/")[0]
        missing = importlib.util.find_spec(package) is None
        marks = [pytest.mark.third_party, pytest.mark.skipif(missing, reason=f"needs {package}: make third-party")]
        found.append(pytest.param(name, marks=[*marks, pytest.mark.slow] if case.slow else marks, id=name))
    return found


@pytest.mark.parametrize("name", rows())
@pytest.mark.parametrize("frontend", ["convert", "backend"])
def test_it_is_bitwise_eager_autocast(name: str, frontend: str) -> None:
    known = {**REFUSED[frontend], **DIFFERENT[frontend]}.get(name)
    found = outcome(expected(CASES[name]), frontend)
    if known is None:
        assert found is None
    else:
        assert found is not None, "is equal now: take it out of tests/third_party/known.py"
        assert known in found


def test_what_is_known_is_about_cases() -> None:
    for table in (*REFUSED.values(), *DIFFERENT.values()):
        assert table.keys() <= CASES.keys()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lin = nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.lin(self.norm(x)).softmax(-1)}


@pytest.fixture
def small() -> Case:
    return Case(Small, each(lambda n: call(torch.randn(n, 4)), (2,), (3,)))


def test_equal_models_have_no_difference(small: Case) -> None:
    assert outcome(expected(small), "convert") is None


def test_another_precision_is_a_difference(small: Case) -> None:
    answers = expected(small)
    amp = fxamp.convert(answers.model, policy="full")
    assert "output.y: dtype torch.float32, expected torch.bfloat16" in str(check(answers, amp, amp))


class Pair(NamedTuple):
    x: Any
    y: Any


class Kept(dict[str, Any]):
    """As the outputs of transformers: items and attributes."""


def kept(**attributes: Any) -> Kept:
    found = Kept(x=1)
    found.__dict__ |= attributes
    return found


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("found", "wanted", "text"),
    [
        (ONE, ONE.clone(), None),
        (ONE * torch.nan, ONE * torch.nan, None),
        ({"a": [ONE, Pair(1, ONE)]}, {"a": [ONE, Pair(1, ONE)]}, None),
        (ONE, ONE * 2, ": bits differ by up to 1 of torch.float32"),
        (ONE, ONE * torch.nan, ": bits differ"),
        (ONE, ONE.bfloat16(), "dtype torch.float32, expected torch.bfloat16"),
        (ONE, torch.ones(3), "shape torch.Size([2]), expected torch.Size([3])"),
        (ONE, torch.ones(2, requires_grad=True), "requires_grad False, expected True"),
        ([ONE], (ONE,), "list, expected tuple"),
        ({"a": ONE}, {"a": None}, "a: Tensor, expected NoneType"),
        ({"a": ONE}, {"b": ONE}, "has ['a'], expected ['b']"),
        ({"a": [1, 2]}, {"a": [1, 3]}, "a.1: 2, expected 3"),
        (Pair(1, ONE), Pair(1, ONE * 2), "1: bits differ"),
        (kept(y=ONE), kept(y=ONE), None),
        (kept(y=ONE), kept(y=2 * ONE), "y: bits differ"),
        (kept(y=ONE), kept(), "has ['x', 'y'], expected ['x']"),
    ],
)
def test_the_first_difference(found: Any, wanted: Any, text: str | None) -> None:
    difference = first_difference(found, wanted)
    assert difference is None if text is None else text in str(difference)


def test_a_gradient_and_a_buffer_are_compared(small: Case) -> None:
    answers = expected(small)
    amp, owner = convert(answers)
    result = answers.results[True, "2"]
    assert result.gradients["lin.weight"] is not None
    result.gradients["lin.weight"].add_(1)
    assert "gradients.lin.weight: bits differ" in str(check(answers, amp, owner))
