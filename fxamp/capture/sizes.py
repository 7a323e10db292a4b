"""What did Dynamo find out about the sizes of inputs?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from fxamp.capture.fits import Kind

__all__ = ["condition", "kind_of", "may_change", "written"]


def condition(mode: FakeTensorMode | None, symbols: Collection[str]) -> str | None:
    """What the program asked of symbols, as Python writes it; None when it asked for more than these tell."""
    if mode is None or mode.shape_env is None:
        return "True"
    conditions: dict[str, None] = {}
    for symbol, bounds in mode.shape_env.var_to_range.items():
        if str(symbol) in symbols:
            conditions[f"{written(bounds.lower)} <= {symbol}"] = None
            if not _is_endless(bounds.upper):
                conditions[f"{symbol} <= {written(bounds.upper)}"] = None
    for guard in mode.shape_env.guards:
        expression = mode.shape_env.simplify(guard.expr)
        unknown = {str(symbol) for symbol in expression.free_symbols}.difference(symbols)
        if not all(name.startswith(("u", "zu")) for name in unknown):  # but for what only data tells
            return None
        if expression.free_symbols and not unknown:
            conditions[written(expression)] = None
    return " and ".join(f"({each})" for each in conditions) or "True"


def may_change(value: torch.Tensor) -> Sequence[int]:
    """The sizes that are symbols: those of batches and sequences. With all of them, Dynamo takes minutes for images."""
    if not value.is_floating_point():
        return range(value.dim())
    return (0, 1) if value.dim() == 3 else (0,) if value.dim() else ()


def kind_of(value: Any, shape: Sequence[Any] | None) -> Any:
    """What an input has to be; all that was seen of it when Dynamo's graph has no use for it."""
    if not isinstance(value, torch.Tensor):
        return value
    sizes = tuple(_size(size) for size in (value.shape if shape is None else shape))
    return Kind(value.dtype, value.device.type, value.requires_grad, sizes)


def _size(size: Any) -> int | str:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return written(expression) if expression.free_symbols else int(expression)


def written(expression: Any) -> str:
    """A sympy expression as Python has it."""
    from torch.utils._sympy.printers import PythonPrinter

    return str(PythonPrinter().doprint(expression))


def _is_endless(bound: Any) -> bool:
    from torch.utils._sympy.numbers import int_oo

    return bound == int_oo or bound.is_infinite is True or int(bound) >= 2**31
