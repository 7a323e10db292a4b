"""Which way does a branch go that only guards against bad input?

``assert x.shape[1] == self.dim`` and ``if x.shape[1] != self.dim: raise ...`` do not change what a
model computes. Such a test is recorded as ``torch._assert`` and the good way is taken; any other
branch on a traced value cannot be traced.
"""

from __future__ import annotations

import ast
import dis
import functools
import linecache
from types import FrameType
from typing import NamedTuple

__all__ = ["Guard", "guard_at"]


class Guard(NamedTuple):
    """The value that a guard's test has for good input, and the guard's text.

    ``whole`` is False for one operand of ``and``/``or``: it may have any value, so it is not checked.
    """

    value: bool
    text: str
    whole: bool


def guard_at(frame: FrameType) -> Guard | None:
    """The guard whose test is being evaluated in ``frame``, or None when it is any other expression."""
    spot = _position(frame)
    if spot is None:
        return None
    lines = linecache.getlines(frame.f_code.co_filename, frame.f_globals)
    for statement, good in _guards("".join(lines)):
        found = _wanted(statement.test, good, spot)
        if found is None and _span(statement) == spot:
            # pytest rewrites asserts, and what it adds has the place of the whole statement.
            found = good, not isinstance(statement.test, ast.BoolOp)
        if found is not None:
            return Guard(found[0], ast.unparse(statement.test), found[1])
    return None


def _position(frame: FrameType) -> tuple[int, int, int, int] | None:
    """Where the tested value's own expression stands: the instruction before the one that tests it."""
    before = None
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset >= frame.f_lasti:
            break
        before = instruction
    found = before.positions if before is not None else None
    if found is None or None in found:
        return None
    return found.lineno, found.col_offset, found.end_lineno, found.end_col_offset  # type: ignore[return-value]


@functools.lru_cache(maxsize=32)
def _guards(source: str) -> tuple[tuple[ast.If | ast.Assert, bool], ...]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ()
    found: list[tuple[ast.If | ast.Assert, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append((node, True))
        elif isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], ast.Raise):
            found.append((node, False))
    return tuple(found)


def _wanted(test: ast.expr, good: bool, spot: tuple[int, int, int, int]) -> tuple[bool, bool] | None:
    """The value for the part of ``test`` at ``spot`` and whether it is the whole test, or None."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _wanted(test.operand, not good, spot)
    if isinstance(test, ast.BoolOp):
        parts = (_wanted(value, good, spot) for value in test.values)
        return next(((part[0], False) for part in parts if part is not None), None)
    return (good, True) if _span(test) == spot else None


def _span(node: ast.expr | ast.stmt) -> tuple[int, int, int | None, int | None]:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset
