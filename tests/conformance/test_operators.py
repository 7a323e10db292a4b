"""Every operator that torch has samples of, converted, does what eager autocast does: dtypes, bits, gradients.

For the rules of a CPU the reference is torch.autocast itself; for those of a GPU it is ``tests.oracle``. Each call is
made as a function and as a method, for float32 and mixed inputs, in both low dtypes, with example inputs and without.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from tests.conformance.extra import EXTRA
from tests.conformance.opaque import not_seen_into
from tests.conformance.operators import Outcome, method, outcome_of, spellings, spread, worst
from tests.helpers import quiet
from tests.oracle import HEADER, cuda_rules
from tests.samples import op_db, samples

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not HEADER.exists(), reason="this torch comes without its headers"),
]
RULES: dict[str, Callable[[], AbstractContextManager[None]]] = {"cpu": nullcontext, "cuda": cuda_rules}
NEWEST = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
GROUPS = 14
FEW, MANY = 1, 3


def calls(info: Any, count: int) -> list[Any]:
    """A few sample calls, in float32 where the operator takes it."""
    dtype = torch.float32 if torch.float32 in info.dtypes else min(info.dtypes, key=str, default=None)
    return [] if dtype is None else spread(samples(info, 24, dtype), count)


def name_of(info: Any) -> str:
    return f"{info.name}.{info.variant_test_name}" if info.variant_test_name else info.name


def outcomes(infos: list[Any], device_type: str, count: int) -> Iterator[Outcome]:
    for info in infos:
        # Every other call with example inputs, and every other one without.
        chosen = calls(info, 2 * count)
        for kind, examples in itertools.product(("function", "method"), (False, True)):
            found = [
                outcome_of(call, sample, device_type, examples=examples)
                for spelling, call in spellings(info)
                for sample in chosen[examples::2] or chosen
                if spelling == kind
            ]
            if found:
                label = f"{device_type}, {kind}, {'examples' if examples else 'symbolic'}"
                yield Outcome(name_of(info), label, *worst(found), info.supports_autograd)


def unseen(found: list[Outcome], way: str) -> set[str]:
    """The operators that are not seen into, of those tried in this way."""
    return {o.operator for o in found if o.spelling.endswith(way) and o.outcome in ("opaque", "not traceable")}


def check(found: list[Outcome], record_property: Any) -> None:
    for outcome in found:
        record_property("outcome", tuple(outcome))
    assert [outcome for outcome in found if outcome.outcome == "different"] == []


@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize("device_type", RULES)
def test_every_operator_is_bitwise_eager(device_type: str, group: int, record_property: Any) -> None:
    infos = op_db()[group::GROUPS]
    with RULES[device_type](), quiet():
        found = list(outcomes(infos, device_type, FEW))
    check(found, record_property)
    if NEWEST:
        names = {name_of(info) for info in infos}
        for way in ("symbolic", "examples"):
            assert unseen(found, way) == names & not_seen_into(device_type, way), way


@pytest.mark.parametrize("device_type", RULES)
def test_with_example_inputs_97_in_100_operators_are_seen_into(device_type: str) -> None:
    """Of those that can be differentiated, on one sample each: with more samples more of them have an opaque call."""
    differentiable = {name_of(info) for info in op_db() if info.supports_autograd and torch.float32 in info.dtypes}
    assert len(differentiable & not_seen_into(device_type, "examples")) <= 0.03 * len(differentiable)


def seen_wrongly(device_type: str, names: Iterable[str]) -> list[tuple[Any, ...]]:
    """The calls that torch has no samples of and that are not what they should be: equal, or opaque where listed."""
    found = []
    for name, examples in itertools.product(names, (False, True)):
        call, args = EXTRA[name]
        opaque = name in OPAQUE_EXTRA.get((device_type, examples), ())
        outcome, detail = outcome_of(call, (args, {}), device_type, examples=examples)
        if outcome != ("opaque" if opaque else "equal"):
            found.append((name, examples, outcome, detail))
    return found


# The rest is seen into.
_EVERYWHERE = {"_euclidean_dist", "_linalg_det", "_linalg_slogdet", "_weight_norm_interface"}
OPAQUE_EXTRA = {
    ("cpu", False): {*_EVERYWHERE, "convolution", "inner"},
    ("cpu", True): {*_EVERYWHERE, "convolution"},
    ("cuda", False): {*_EVERYWHERE, "embedding_renorm_", "inner", "mvlgamma_"},
    ("cuda", True): {*_EVERYWHERE, "embedding_renorm_", "mvlgamma_"},
}


@pytest.mark.parametrize("device_type", RULES)
def test_operators_without_samples_are_bitwise_eager(device_type: str) -> None:
    with RULES[device_type](), quiet():
        assert seen_wrongly(device_type, EXTRA) == []


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize("device_type", RULES)
def test_many_samples_of_every_operator_are_bitwise_eager(device_type: str, group: int) -> None:
    with RULES[device_type](), quiet():
        found = list(outcomes(op_db()[group::GROUPS], device_type, MANY))
    assert [outcome for outcome in found if outcome.outcome == "different"] == []


# -- the lists that torch tests its own autocast with ---------------------------------------------------------------


def listed(device_type: str) -> Iterator[tuple[str, Callable[..., Any], Any]]:
    """Every entry of torch's lists: its name, the call, and its arguments."""
    from torch.testing._internal.autocast_test_lists import AutocastCPUTestLists, AutocastTestLists

    lists = (AutocastCPUTestLists if device_type == "cpu" else AutocastTestLists)(torch.device("cpu"))
    owners = {"torch": torch, "nn": torch._C._nn, "linalg": torch._C._linalg, "methods": None}
    for list_name, entries in vars(lists).items():
        owner = owners.get(list_name.partition("_")[0], torch)
        for name, *rest in entries:
            if list_name == "banned":
                owner, rest = rest[-1], rest[:-1]
            yield from _entry(f"{list_name} {name}", owner, name, rest)


def _entry(label: str, owner: Any, name: str, rest: list[Any]) -> Iterator[tuple[str, Callable[..., Any], Any]]:
    # A list of the CPU has arguments for bfloat16 and for float16, and then perhaps the dtype to expect.
    argument_lists = [part for part in rest if isinstance(part, tuple)]
    kwargs = next((part for part in rest if isinstance(part, dict)), {})
    for i, args in enumerate(argument_lists):
        if hasattr(owner, name):
            yield f"{label} {i}", getattr(owner, name), (args, kwargs)
        if hasattr(torch.Tensor, name) and isinstance(args[0], torch.Tensor):
            yield f"{label} {i} method", method(name), (args, kwargs)


@pytest.mark.parametrize("device_type", RULES)
@pytest.mark.parametrize("examples", [False, True], ids=["symbolic", "examples"])
def test_the_lists_of_torchs_own_tests_are_bitwise_eager(
    device_type: str, examples: bool, record_property: Any
) -> None:
    with RULES[device_type](), quiet():
        found = [
            Outcome(label, f"{device_type}, list", *outcome_of(call, sample, device_type, examples=examples))
            for label, call, sample in listed(device_type)
        ]
    assert len(found) > (60 if device_type == "cpu" else 130)
    check(found, record_property)
    assert [outcome for outcome in found if outcome.outcome in ("opaque", "not traceable")] == []
