"""One call of an operator as a module, converted and compared with eager autocast to the last bit."""

from __future__ import annotations

import itertools
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Final, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import fxamp
from tests.samples import leaves, same_bits, values_and_gradients

LOW: Final = (torch.bfloat16, torch.float16)
OUTCOMES: Final = ("equal", "opaque", "refused alike", "not traceable", "different")
RAISES: Final = ["raises"]


class Outcome(NamedTuple):
    """What became of one operator, over all its calls."""

    operator: str
    spelling: str
    outcome: str
    detail: str = ""
    differentiable: bool = True


def module_of(call: Callable[..., Any], sample: Any) -> tuple[nn.Module, list[Tensor]]:
    """A module that makes this call, with the tensors of the sample as its inputs."""
    flat, spec = tree_flatten(sample)
    places = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]

    def make(*tensors: Tensor) -> Any:
        values = list(flat)
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        args, kwargs = tree_unflatten(values, spec)
        return call(*args, **kwargs)

    names = ", ".join(f"x{place}" for place in places)
    forward = eval(f"lambda self, {names}: make({names})", {"make": make})
    return type("Call", (nn.Module,), {"forward": forward})(), [flat[place] for place in places]


def method(name: str) -> Callable[..., Any]:
    """A call of a method; one that writes gets a tensor of its own."""
    if name.endswith("_") and not name.endswith("__"):
        return lambda x, *args, **kwargs: getattr(x.clone(), name)(*args, **kwargs)
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


def spellings(info: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """How an operator of ``op_db`` can be called."""
    if isinstance(info.op, types.WrapperDescriptorType | types.MethodDescriptorType):
        yield "method", method(info.op.__name__)
    else:
        yield "function", info.op
    yield from (("function", alias.op) for alias in info.aliases)
    for variant in (info.method_variant, info.inplace_variant):
        if variant is not None:
            name = getattr(variant, "__name__", "")
            yield "method", method(name) if hasattr(Tensor, name) else variant


def under_autocast(model: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with torch.autocast("cpu", dtype):
            return model(*args)

    return run


def outcome_of(call: Callable[..., Any], sample: Any, device_type: str, *, examples: bool) -> tuple[str, str]:
    """The worst outcome over dtypes of autocast and of the inputs, and what it was about."""
    model, tensors = module_of(call, sample)
    cases = itertools.product(LOW, _mixes(tensors))
    return worst(_outcome(model, tensors, device_type, low, mix, examples=examples) for low, mix in cases)


def _outcome(
    model: nn.Module,
    tensors: list[Tensor],
    device_type: str,
    low: torch.dtype,
    mix: tuple[torch.dtype, ...],
    *,
    examples: bool,
) -> tuple[str, str]:
    given = tuple(leaf.detach() for leaf in leaves(tensors, mix)[0]) if examples else None
    expected = values_and_gradients(under_autocast(model, low), (tensors, {}), mix)
    try:
        amp = fxamp.convert(model, example_inputs=given, device_type=device_type, dtype=low)
    except fxamp.FxampError as error:
        return ("refused alike" if expected == RAISES else "not traceable"), str(error).partition("\n")[0]
    found = values_and_gradients(amp, (tensors, {}), mix)
    if not same_bits(expected, found):
        return "different", f"{low} from {mix}: {_shown(found)}, expected {_shown(expected)}"
    if expected == RAISES:
        return "refused alike", ""
    opaque = [decision for decision in amp.plan if decision.rule == "opaque"]
    return ("opaque", opaque[0].reason) if opaque else ("equal", "")


def _mixes(tensors: list[Tensor]) -> Iterable[tuple[torch.dtype, ...]]:
    """The dtypes that the floating inputs have in turn: all in float32, and some in a low dtype."""
    yield (torch.float32,)
    several = sum(tensor.is_floating_point() for tensor in tensors) > 1
    yield (torch.bfloat16, torch.float32) if several else (torch.bfloat16,)


def _shown(values: list[Any]) -> str:
    return ", ".join(str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else str(x) for x in values)


def worst(outcomes: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """The outcome of an operator: that of its worst call. A call that torch refuses says little about the others."""
    ranks = {name: rank for rank, name in enumerate(("refused alike", "equal", "opaque", "not traceable", "different"))}
    return max(outcomes, key=lambda outcome: ranks[outcome[0]], default=("refused alike", "no samples"))


def spread(values: Iterable[Any], count: int, *, among: int = 24) -> list[Any]:
    """A few of the first values, evenly spread: the first alone are often the trivial ones."""
    found = list(islice(values, among))
    step = max(1, len(found) // count)
    return found[::step][:count]


def table(results: Iterable[Outcome]) -> str:
    """The counts, a row a kind of call."""
    counts: dict[str, Counter[str]] = {}
    for result in results:
        counts.setdefault(result.spelling, Counter())[result.outcome] += 1
    rows = [[kind, sum(count.values()), *(count[name] for name in OUTCOMES)] for kind, count in counts.items()]
    return str(tabulate(rows, headers=("rules, call", "tried", *OUTCOMES)))
