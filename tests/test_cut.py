"""The minimum cut costs what the best of all ways costs."""

from __future__ import annotations

import itertools
import random

import pytest

from fxamp.plan.cut import HIGH, LOW, Problem


def problem(seed: int) -> Problem:
    """Up to eight calls, values between them and what is fixed, some of them tied."""
    rng = random.Random(seed)
    made = Problem()
    names = [f"call {i}" for i in range(rng.randrange(1, 9))]
    for name in names:
        made.call(name, rng.randrange(20), rng.randrange(20))
    for value in range(len(names) + 2):
        producer, cost = rng.choice([*names, HIGH, LOW]), rng.randrange(15)
        for _ in range(rng.randrange(1, 4)):
            made.value(producer, cost, rng.choice([*names, HIGH, LOW]), f"value {value}")
    if len(names) > 2 and rng.random() < 0.5:
        made.tie(*rng.sample(names, 2))
    return made


def every(made: Problem) -> list[dict[str, str]]:
    ways = (dict(zip(made.costs, way, strict=True)) for way in itertools.product([HIGH, LOW], repeat=len(made.costs)))
    return [way for way in ways if all(way[one] == way[other] for one, other in made.ties)]


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_nothing_costs_less(first: int) -> None:
    for seed in range(first, first + 50):
        made = problem(seed)
        found = made.solve()
        assert found in every(made), seed
        assert made.cost(found) == min(map(made.cost, every(made))), seed


def test_of_two_ways_that_cost_the_same_it_is_the_one_with_more_in_float32() -> None:
    for seed in range(100):
        made = problem(seed)
        found, ways = made.solve(), every(made)
        least = made.cost(found)
        alike = [way for way in ways if made.cost(way) == least]
        assert all(found[name] == HIGH for way in alike for name in way if way[name] == HIGH), seed


def test_a_cast_is_paid_once_whatever_the_number_of_uses() -> None:
    made = Problem()
    for name in ("a", "b", "c"):
        made.call(name, 10, 0)
        made.value(HIGH, 25, name, "x")
    assert made.solve() == {"a": LOW, "b": LOW, "c": LOW}
    assert made.cost(made.solve()) == 25
    made.casts.clear()
    for name in ("a", "b", "c"):
        made.value(HIGH, 25, name, f"x of {name}")
    assert made.solve() == {"a": HIGH, "b": HIGH, "c": HIGH}


def test_a_long_chain_is_solved_in_seconds() -> None:
    made, before, key = Problem(), HIGH, "x"
    for i in range(20_000):
        made.call(f"call {i}", 4, 2)
        made.value(before, 30, f"call {i}", key)
        before = key = f"call {i}"
    made.value(before, 30, LOW, key)
    assert set(made.solve().values()) == {LOW}
