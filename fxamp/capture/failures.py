"""How is it said that a model could not be traced?"""

from __future__ import annotations

import linecache
import os
import re
import traceback
from collections.abc import Mapping
from functools import partial
from types import BuiltinFunctionType, FrameType
from typing import Any, Final, NamedTuple

import torch
from torch.fx.proxy import TraceError

from fxamp.capture.source import is_users
from fxamp.errors import CaptureError

__all__ = ["HiddenError", "NotPutBack", "Tried", "capture_error", "dynamo_error", "name_of", "untraceable_by"]

_TRANSFORMS = ("_functorch", "_higher_order_ops")


class HiddenError(TraceError):
    """The model does what Dynamo would do once, while it captures, and leave out of its graph."""


class NotPutBack(TraceError):
    """The trace did something in a frame that has not been undone by the end."""

    def __init__(self, what: str, frame: FrameType | None) -> None:
        super().__init__(what)
        self.frame = (_owned(frame, ""), frame.f_code.co_filename, frame.f_lineno) if frame is not None else None


class Tried(NamedTuple):
    """How a model was traced: ``call`` is the conversion with inputs in the user's words."""

    call: str
    by_example: bool
    takes_nothing: bool  # without inputs, for all its arguments are optional


# What is told of inputs, and not without.
_TOLD = re.compile(
    "branches on|iterates over|asks for the type|(argument .*|value cannot be) interpreted as an integer"
)


def capture_error(model: str, error: Exception, tried: Tried) -> CaptureError:
    """The error for a trace of ``model`` that failed with ``error``, with the user's own line."""
    if isinstance(error, CaptureError):
        return error
    every = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in every if is_users(frame.filename)]
    where, line = model, "forward"
    last = (_qualified(error, model), frames[-1].filename, frames[-1].lineno or 0) if frames else None
    last = error.frame if isinstance(error, NotPutBack) else last
    if last is not None:
        where = f"{last[0]} ({os.path.basename(last[1])}:{last[2]})"
        line = linecache.getline(last[1], last[2]).strip().rstrip(":")
    if any(os.path.join("torch", part) + os.sep in frame.filename for frame in every for part in _TRANSFORMS):
        what = f"`{line}` calls a function transform of torch's, which cannot be traced into"
    elif isinstance(error, TraceError) and str(error).startswith("branches"):
        what = f"the branch `{line}` depends on a tensor value"
    else:
        what = f"`{line}` {error}" if isinstance(error, TraceError) else f"`{line}`: {error}"
    return CaptureError(
        f"cannot trace {where}: {what}",
        hint=_hint(error, tried),
    )


def dynamo_error(model: str, error: Exception) -> CaptureError:
    """The error for a capture by Dynamo that failed, with the user's own line where Dynamo tells it."""
    if isinstance(error, CaptureError):
        return error
    stack = getattr(error, "real_stack", None) or traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(stack) if is_users(frame.filename)), None)
    where, line = model, ""
    if frame is not None:
        where = f"{model} ({os.path.basename(frame.filename)}:{frame.lineno})"
        line = f"`{linecache.getline(frame.filename, frame.lineno or 0).strip()}`: "
    said = [text.strip() for text in str(error).splitlines() if text.strip()] or [type(error).__name__]
    more = next((text.partition(": ")[2] for text in said if text.startswith(("Explanation: ", "Developer debug"))), "")
    return CaptureError(f"cannot capture {where}: {line}{said[0]}{'; ' if more else ''}{more}", hint=_COMPILE)


_COMPILE: Final = 'torch.compile(model, backend="fxamp") runs what cannot be one graph in several'


def untraceable_by(failed: Mapping[str, CaptureError]) -> CaptureError:
    """The error for a model that no frontend takes."""
    reasons = "".join(f"\n- {frontend}: {error.message}" for frontend, error in failed.items())
    first = next(iter(failed.values()))
    return (
        CaptureError(f"no frontend can make one graph of the model:{reasons}", hint=_COMPILE)
        if (len(failed) > 1)
        else first
    )


def _hint(error: Exception, tried: Tried) -> str:
    told = bool(_TOLD.search(str(error))) or (tried.takes_nothing and not isinstance(error, TraceError))
    if told and not tried.by_example:
        return f"trace it with inputs: {tried.call}"
    if told:
        return _COMPILE
    return "put that line into a submodule of its own: a module that cannot be traced stays a call"


def _qualified(error: Exception, model: str) -> str:
    found, trace = model, error.__traceback__
    while trace is not None:
        found = _owned(trace.tb_frame, found)
        trace = trace.tb_next
    return found


def _owned(frame: FrameType, otherwise: str) -> str:
    """The name of the user's function that runs in a frame."""
    if not is_users(frame.f_code.co_filename):
        return otherwise
    owner = frame.f_locals.get("self")
    return f"{type(owner).__name__}.{frame.f_code.co_name}" if owner is not None else frame.f_code.co_qualname


def name_of(function: Any) -> str:
    """What a user calls a function or a module."""
    if isinstance(function, partial):
        return name_of(function.func)
    if isinstance(function, BuiltinFunctionType):
        return torch.overrides.resolve_name(function) or function.__name__
    return getattr(function, "__qualname__", None) or type(function).__qualname__
