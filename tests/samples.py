"""Sample calls of every operator that torch knows, and running them to the last bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

# Their results hold memory that was never written.
SKIPPED = frozenset(
    """empty empty_like new_empty empty_permuted empty_strided new_empty_strided resize_ resize_as_
    linalg.lstsq""".split()
)
ERRORS = (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError, AttributeError, AssertionError)


def op_db() -> list[Any]:
    """Every operator of torch's own samples, but those whose results are not defined."""
    from torch.testing._internal.common_methods_invocations import op_db as found

    return [info for info in found if info.name not in SKIPPED]


def samples(info: Any, count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Any, dict[str, Any]]]:
    """The first calls with inputs of this dtype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = islice(info.sample_inputs_func(info, "cpu", dtype, False), count)
        return [((x.input, *x.args), x.kwargs) for x in made if x.kwargs.get("out") is None]


def spellings(info: Any) -> Iterator[tuple[str, Any, Callable[..., Any]]]:
    """How an operator can be called: opcode, target and function."""
    yield "call_function", info.op, info.op
    yield from (("call_function", alias.op, alias.op) for alias in info.aliases)
    for method in (info.method_variant, info.inplace_variant):
        if method is not None:
            yield "call_method", getattr(method, "__name__", info.name), method


def leaves(call: Any, dtypes: tuple[torch.dtype, ...]) -> tuple[Any, list[torch.Tensor]]:
    """The arguments in these dtypes, in turn, as leaves of autograd."""
    flat, spec = tree_flatten(call)
    floats = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for turn, i in enumerate(floats):
        flat[i] = flat[i].detach().clone().to(dtypes[turn % len(dtypes)]).requires_grad_()
    return tree_unflatten(flat, spec), [flat[i] for i in floats]


def values_and_gradients(run: Callable[..., Any], call: Any, dtypes: tuple[torch.dtype, ...]) -> list[Any]:
    """What a call gives, and the gradients of its floating inputs; ``["raises"]`` for one that fails."""
    (args, kwargs), wanted = leaves(call, dtypes)
    torch.default_generator.manual_seed(0)
    try:
        out = [x for x in tree_leaves(run(*args, **kwargs)) if isinstance(x, torch.Tensor)]
        loss = [x for x in out if x.requires_grad and x.is_floating_point() and x.layout == torch.strided]
        seeds = [torch.randn(x.shape).to(x.dtype) for x in loss]
        grads = torch.autograd.grad(loss, wanted, seeds, allow_unused=True) if loss else ()
    except ERRORS:
        return ["raises"]
    return [x if x is None else x.detach() for x in (*out, *grads)]


def same_bits(left: list[Any], right: list[Any]) -> bool:
    """Whether two results are the same to the last bit; NaN equals NaN."""

    def equal(x: Any, y: Any) -> bool:
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            return x is y or x == y
        if (x.dtype, x.shape, x.layout) != (y.dtype, y.shape, y.layout):
            return False
        if x.dtype == torch.complex32:
            x, y = x.to(torch.complex64), y.to(torch.complex64)
        return x.layout != torch.strided or torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)

    return len(left) == len(right) and all(map(equal, left, right))
