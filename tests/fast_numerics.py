"""How far are torch.autocast and the policy "fast" from float64, model by model?

``python -m tests.fast_numerics`` prints a table; with ``--all-low`` every operator that may choose is low, which is as
far as "fast" can come. The error of a run is the relative norm of its difference to the model in float64, over all
outputs and over all gradients. What counts is the ratio of the two policies: both round, and each model forgives more
or less of it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxamp
from fxamp.policy.fast import fast_kinds
from tests.helpers import quiet, run
from tests.oracle import cuda_rules
from tests.zoo import BASIC, ZOO, Case

__all__ = ["RULES", "Compared", "Skipped", "all_low_of", "compare", "compare_all", "main", "ratios", "summary"]

RULES: dict[str, Callable[[], AbstractContextManager[None]]] = {"cpu": nullcontext, "cuda": cuda_rules}
LOW = torch.bfloat16
SINGLE = torch.finfo(torch.float32).eps

# What these give depends on which value is larger: a rounding may give another answer, neither right nor wrong.
DISCRETE = frozenset(
    """
    argmax argmin argsort bucketize ceil eq floor ge gt histc kthvalue le lt median mode multinomial ne nonzero round
    searchsorted sign sort topk trunc unique unique_consecutive
    """.split()
)
# On a GPU an LSTM is one kernel, which cannot be tried here once example inputs tell its dtypes.
OTHER_KERNELS = frozenset({"recurrent", "sentiment"})


class Skipped(Exception):
    """A model of which a comparison says nothing, and why."""


class Compared(NamedTuple):
    """The errors of one model against float64: of outputs and of gradients, under autocast and "fast"."""

    name: str
    autocast: tuple[float, float]
    fast: tuple[float, float]


class _Decisions(TorchDispatchMode):
    """Notes operators that decide by floating-point values that a low dtype may have rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        first = next((x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)), None)
        if name in DISCRETE and first is not None and first.is_floating_point() and first.numel() > 1:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def all_low_of(amp: fxamp.AmpModule, rules: str) -> fxamp.AmpModule:
    """Every operator that the table of "fast" lets choose in the low dtype: the least exact that it can become."""
    kinds = fast_kinds(rules)
    found = fxamp.inspect(amp)  # a model may have a policy of its own
    decisions = [decision for decision in found.plan if decision.reason != "in-place"]
    low = {decision.aten for decision in decisions if kinds.get(decision.aten, "fp32") != "fp32"}
    return found.replan(found.policy.with_ops({f"aten::{name}": "lower" for name in sorted(low)}))


def compare(name: str, rules: str = "cpu", *, examples: bool = False, all_low: bool = False) -> Compared:
    """The errors of one model of the zoo.

    Args:
        name: of the model.
        rules: whose operator lists, "cpu" or "cuda"; the numbers come from the kernels of a CPU.
        examples: convert with example inputs.
        all_low: in the place of "fast", every operator that may choose is low.

    Raises:
        Skipped: when there is nothing to compare.
    """
    case = ZOO[name]
    if rules == "cuda" and not case.gpu:
        raise Skipped("its rules of a GPU cannot be tried on a CPU")
    if LOW not in case.dtypes:
        raise Skipped("no bfloat16 kernels")
    if not (examples or case.symbolic):
        raise Skipped("needs example inputs")
    if rules == "cuda" and examples and name in OTHER_KERNELS:
        raise Skipped("another kernel on a GPU")
    model, reference = _deterministic(name)
    with RULES[rules](), quiet():
        context = torch.autocast("cpu", LOW)
        autocast = _errors(_both(copy.deepcopy(model), case), case, reference, context)
        if not all(map(math.isfinite, autocast)):
            raise Skipped("not finite under autocast")
        given = _arguments(case, torch.float32) if examples else None
        amp = fxamp.convert(
            copy.deepcopy(model), case.loss, policy="fast", dtype=LOW, device_type=rules, example_inputs=given
        )
        amp = all_low_of(amp, rules) if all_low else amp
        amp.train(model.training)
        fast = _errors(amp, case, reference, nullcontext())
    return Compared(name, autocast, fast)


Values = tuple[list[Tensor], list[Tensor]]


@functools.cache
def _deterministic(name: str) -> tuple[nn.Module, Values]:
    """The model, in training where that is not random, and what it gives in float64."""
    case = ZOO[name]
    torch.manual_seed(0)
    with quiet():
        made = case.make()
        for module in made.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        for training in (True, False):
            model = copy.deepcopy(made).train(training)
            first, second = (_run(_both(copy.deepcopy(model), case), case, torch.float32, seed) for seed in (0, 1))
            if _distance(first[0], second[0]) == 0:
                _check_decisions(model, case)
                return model, _reference(model, case, first)
    raise Skipped("random")


def _check_decisions(model: nn.Module, case: Case) -> None:
    # Without the backward: the derivative of a clamp compares as well, which makes it no decision.
    args, kwargs = _arguments(case, torch.float32)
    with _Decisions() as decisions:
        _both(copy.deepcopy(model), case)(*args, **kwargs)
    if decisions.found:
        raise Skipped(f"decides by its values: {', '.join(sorted(decisions.found))}")


def _reference(model: nn.Module, case: Case, single: Values) -> Values:
    torch.set_default_dtype(torch.float64)  # for the tensors that a model makes itself
    try:
        reference = _run(_both(copy.deepcopy(model).double(), case), case, torch.float64)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise Skipped(f"does not run in float64: {str(error).splitlines()[0][:60]}") from error
    finally:
        torch.set_default_dtype(torch.float32)
    if not all(bool(x.isfinite().all()) for x in (*reference[0], *reference[1])):
        raise Skipped("not finite")
    if max(map(_distance, single, reference)) > 1e-3:
        raise Skipped("float32 is no better than a low dtype")
    return reference


def _both(model: nn.Module, case: Case) -> Callable[..., Any]:
    """The model with its loss, as a module, so that its gradients are found."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            count = len(args) - len(case.loss_args())
            output = self.model(*args[:count], **kwargs)
            return output if case.loss is None else (case.loss(output, *args[count:]), output)

    return Both()


def _arguments(case: Case, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs, with those of the loss, and keyword arguments: the same numbers in every dtype."""
    torch.manual_seed(3)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    given = (*case.inputs(), *case.loss_args()), dict(case.kwargs)
    torch.set_default_dtype(default)
    return pytree.tree_map_only(Tensor, lambda t: t.detach().to(dtype) if t.dtype == torch.float32 else t, given)


def _run(model: Any, case: Case, dtype: torch.dtype, seed: int = 0, context: Any = None) -> Values:
    """Outputs and gradients, those of the inputs and of the parameters in the order of their names."""
    args, kwargs = _arguments(case, dtype)
    args = pytree.tree_map_only(Tensor, lambda t: t.clone().requires_grad_(t.is_floating_point()), args)
    output, grads = run(model, args, kwargs, context or nullcontext(), seed=seed)
    named = {name.removeprefix("model."): grad for name, grad in grads.items() if grad is not None}
    leaves = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    return [x.double() for x in leaves], [named[name].double() for name in sorted(named)]


def _errors(model: Any, case: Case, reference: Values, context: Any) -> tuple[float, float]:
    found = _run(model, case, torch.float32, context=context)
    return _distance(found[0], reference[0]), _distance(found[1], reference[1])


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The relative norm of the difference, over all tensors."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        raise Skipped("other values in float64")
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    size = sum(float(b.square().sum()) for b in expected)
    return (difference / size) ** 0.5 if size else difference**0.5


# -- many models ---------------------------------------------------------------------------------------------------


def compare_all(
    names: Iterable[str], rules: str, *, examples: bool, all_low: bool = False
) -> tuple[list[Compared], dict[str, str]]:
    """The errors of these models, and why the others were skipped."""
    found, skipped = [], {}
    for name in names:
        try:
            found.append(compare(name, rules, examples=examples, all_low=all_low))
        except Skipped as reason:
            skipped[name] = str(reason)
        except (RuntimeError, fxamp.FxampError) as error:
            if not all_low:
                raise
            skipped[name] = f"cannot be all low: {str(error).splitlines()[0][:60]}"
    return found, skipped


def ratios(found: Sequence[Compared], which: int) -> list[float]:
    """Error of "fast" over that of autocast, sorted; ``which`` is 0 for outputs and 1 for gradients.

    An error of float32 is none: where neither has more than that, they are equal.
    """
    floor = 8 * SINGLE
    errors = [(row.fast[which], row.autocast[which]) for row in found]
    return sorted(max(fast, floor) / max(autocast, floor) if fast == fast else math.inf for fast, autocast in errors)


def summary(found: Sequence[Compared]) -> str:
    """The distribution of the ratios."""
    rows = []
    for which, word in enumerate(("outputs", "gradients")):
        values = ratios(found, which)
        at = [values[min(len(values) - 1, len(values) * percent // 100)] for percent in (10, 25, 75, 90)]
        rows.append([word, len(values), values[0], *at[:2], statistics.median(values), *at[2:], values[-1]])
    headers = ["fast / autocast", "models", "least", "10%", "25%", "median", "75%", "90%", "most"]
    return str(tabulate(rows, headers, floatfmt=".2f"))


def _table(found: Sequence[Compared]) -> Iterator[list[Any]]:
    for row in sorted(found, key=lambda row: -max(ratios([row], 0)[0], ratios([row], 1)[0])):
        (out, grad), (fast_out, fast_grad) = row.autocast, row.fast
        yield [row.name, out, fast_out, ratios([row], 0)[0], grad, fast_grad, ratios([row], 1)[0]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the errors of every model, the worst ratio first."""
    parser = argparse.ArgumentParser(prog="python -m tests.fast_numerics", description=main.__doc__)
    parser.add_argument("models", nargs="*", help="names of the zoo; none: all, 'basic': the basic ones")
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=list(RULES))
    parser.add_argument("--without-examples", action="store_true", help="convert without example inputs")
    parser.add_argument("--all-low", action="store_true", help="every operator that may choose is low")
    given = parser.parse_args(arguments)
    names = list(BASIC) if given.models == ["basic"] else given.models or list(ZOO)
    for rules in given.rules:
        found, skipped = compare_all(names, rules, examples=not given.without_examples, all_low=given.all_low)
        print(f"\nrules of {rules}, bf16, errors against float64\n")
        headers = ["model", "out: autocast", "fast", "ratio", "grad: autocast", "fast", "ratio"]
        print(tabulate(list(_table(found)), headers, floatfmt=("", ".1e", ".1e", ".2f", ".1e", ".1e", ".2f")))
        print(f"\n{summary(found)}\n")
        print(tabulate(sorted(skipped.items()), ["skipped", "why"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
