"""What is known of a value before anything runs?

Dtypes flow through the graph by rule on the lattice {a dtype, unknown}. Beside the dtype one fact of
the shape matters: a 0-dim tensor does not widen others (``bf16[3] + f32[]`` is bf16).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch

__all__ = [
    "NOT_A_TENSOR",
    "UNKNOWN",
    "Flow",
    "Tensors",
    "Value",
    "element",
    "of_object",
    "outcome",
    "promoted",
    "tensors_in",
]


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor. ``dtype`` None: not known; ``scalar``: whether it is 0-dim, None: not known; so with ``rank``."""

    dtype: torch.dtype | None
    scalar: bool | None = None
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Tensors:
    """A tuple or list of tensors, each like ``each``; how many is not known."""

    each: Value


@dataclass(frozen=True, slots=True)
class _NotATensor:
    pass


NOT_A_TENSOR = _NotATensor()
UNKNOWN = Value(None)

Flow = Value | Tensors | _NotATensor | tuple[Any, ...]


def of_object(value: Any) -> Flow:
    """The flow of a real or fake value."""
    if isinstance(value, torch.Tensor):
        return Value(value.dtype, value.dim() == 0, value.dim())
    if isinstance(value, tuple | list) and any(isinstance(item, torch.Tensor) for item in value):
        return tuple(of_object(item) for item in value)
    if isinstance(value, dict):
        return UNKNOWN
    return NOT_A_TENSOR


def tensors_in(flow: Flow) -> tuple[Value, ...]:
    """The tensors that a value is or holds."""
    if isinstance(flow, Value):
        return (flow,)
    if isinstance(flow, Tensors):
        return (flow.each,)
    if isinstance(flow, tuple):
        found: list[Value] = []
        for item in flow:
            if isinstance(item, Value):
                found.append(item)
            else:
                found.extend(tensors_in(item))
        return tuple(found)
    return ()


def element(flow: Flow, index: Any) -> Flow:
    """The flow of ``value[index]``."""
    if isinstance(flow, tuple):
        if isinstance(index, int) and -len(flow) <= index < len(flow):
            item: Flow = flow[index]
            return item
        return flow[index] if isinstance(index, slice) else UNKNOWN
    if isinstance(flow, Tensors):
        return flow if isinstance(index, slice) else flow.each
    if isinstance(flow, Value):
        return Value(flow.dtype, None)
    return NOT_A_TENSOR


_REAL: Final = frozenset({None, *(d for d in vars(torch).values() if isinstance(d, torch.dtype) and not d.is_complex)})


def outcome(kind: Any, inputs: tuple[Value, ...]) -> Flow:
    """What an operator gives back.

    Args:
        kind: as ``fxamp.policy.flow.output_kind`` says; a kind speaks of real tensors.
        inputs: the tensors it is given, after any casts.
    """
    if not _REAL.issuperset([value.dtype for value in inputs]):
        kind = tuple(None for _ in kind) if isinstance(kind, tuple) else None
    if isinstance(kind, tuple):
        return tuple(outcome(item, inputs) for item in kind)
    if kind == "first":
        return Value(inputs[0].dtype, None) if inputs else UNKNOWN
    if kind == "accumulate":
        return Value(_accumulated(inputs[0].dtype), None) if inputs else UNKNOWN
    if kind == "uniform":
        return Value(_uniform(inputs), None)
    if kind in ("promote", "float_promote"):
        return _promote(inputs, floating=kind == "float_promote")
    fixed = {"bool": torch.bool, "int32": torch.int32, "int64": torch.int64}.get(kind)
    return Value(fixed)


def _uniform(inputs: tuple[Value, ...]) -> torch.dtype | None:
    """The dtype that all floating inputs share."""
    dtypes = {value.dtype for value in inputs if value.dtype is None or value.dtype.is_floating_point}
    return dtypes.pop() if len(dtypes) == 1 else None


def _accumulated(dtype: torch.dtype | None) -> torch.dtype | None:
    """Sums keep floating dtypes and turn integers into int64."""
    return dtype if dtype is None or dtype.is_floating_point or dtype.is_complex else torch.int64


def promoted(values: Iterable[Value]) -> torch.dtype | None:
    """The dtype of ``torch.result_type`` over tensors, or None when it cannot be told."""
    return _promote(tuple(values), floating=False).dtype


def _promote(inputs: tuple[Value, ...], *, floating: bool) -> Value:
    if not inputs:
        return UNKNOWN
    scalar = _all_scalar(inputs)
    dtypes = [value.dtype for value in inputs]
    if None in dtypes:
        return Value(None, scalar)
    if len(set(dtypes)) == 1:
        found = dtypes[0]
    elif any(value.scalar is None for value in inputs):
        found = _promote_doubtful(tuple([(value.dtype, value.scalar) for value in inputs]))
    else:
        found = _result_type(tuple([(value.dtype, value.scalar) for value in inputs]))
    if found is not None and floating and not (found.is_floating_point or found.is_complex):
        found = torch.get_default_dtype()
    elif found is not None and not floating and not found.is_floating_point and not found.is_complex:
        # An integer tensor may meet a Python float; only floating results are sure.
        return Value(None, scalar)
    return Value(found, scalar)


def _all_scalar(inputs: tuple[Value, ...]) -> bool | None:
    found = {value.scalar for value in inputs}
    return False if False in found else None if None in found else True


_Inputs = tuple[tuple[torch.dtype | None, bool | None], ...]  # dtype, and whether 0-dim


@functools.lru_cache(maxsize=4096)
def _promote_doubtful(inputs: _Inputs) -> torch.dtype | None:
    """The promoted dtype when it is the same whichever of the doubtful inputs are 0-dim."""
    doubtful = [i for i, (_, scalar) in enumerate(inputs) if scalar is None]
    if len(doubtful) > 3:
        return None
    found = set()
    for mask in range(2 ** len(doubtful)):
        scalars = {i: bool(mask >> bit & 1) for bit, i in enumerate(doubtful)}
        found.add(_result_type(tuple((dtype, scalars.get(i, scalar)) for i, (dtype, scalar) in enumerate(inputs))))
    return found.pop() if len(found) == 1 else None


@functools.lru_cache(maxsize=4096)
def _result_type(inputs: _Inputs) -> torch.dtype:
    samples = [torch.empty(() if scalar else (1,), dtype=dtype, device="meta") for dtype, scalar in inputs]
    result = samples[0]
    for sample in samples[1:]:
        result = torch.empty(
            (1,) if result.dim() or sample.dim() else (),
            dtype=torch.result_type(result, sample),
            device="meta",
        )
    return result.dtype
