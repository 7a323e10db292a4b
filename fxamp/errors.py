"""What can go wrong, said in the user's own names.

Every error carries what failed, what was found against what was expected, and after a
blank line one concrete next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CaptureError",
    "FxampError",
    "GradientError",
    "PlanError",
    "PolicyError",
    "VerifyError",
    "describe",
    "nearest",
]


class FxampError(Exception):
    """The base of every error that fxamp raises on purpose.

    Args:
        message: what failed, what was found, what was expected.
        hint: one concrete next step, without the word "hint".
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint)


class CaptureError(FxampError):
    """The model or its loss could not be turned into a graph, or was called in a way it was not captured for."""


class PolicyError(FxampError, ValueError):
    """A policy, a rule, an operator, a module pattern or a dtype is not one that exists."""


class GradientError(FxampError, ValueError):
    """The gradients of an optimizer are not ones that a scaler can unscale."""


class PlanError(FxampError):
    """The graph has an operator that the policy cannot run."""


class VerifyError(FxampError):
    """A rewritten graph breaks one of the laws that every converted graph must keep."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The entry of ``known`` that is spelled most like ``name``, or None when nothing is close."""
    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return found[0] if found else None


def describe(value: object) -> str:
    """A value as an error names it: plain values as they are written, any other by its type."""
    kind = type(value)
    if value is None or isinstance(value, bool | int | float | str) or kind.__name__ == "dtype":
        return repr(value)
    if callable(value) and not isinstance(value, type) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    return f"a {kind.__name__}" if kind.__module__ == "builtins" else f"an object of type {kind.__qualname__}"


def _rebuild(kind: type[FxampError], message: str, hint: str) -> FxampError:
    return kind(message, hint=hint)
