"""Which line of the user's made this call?"""

from __future__ import annotations

import functools
import linecache
import os
import sysconfig
from types import FrameType

import torch
from torch import fx

__all__ = ["calling_frame", "is_library", "is_users", "spelled_line", "user_frame", "user_line"]

_TRACING = (os.path.dirname(fx.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)
_LIBRARY = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)


_PYTHON = sysconfig.get_paths()["stdlib"] + os.sep


def is_library(filename: str) -> bool:
    """Whether a file belongs to torch or to fxamp."""
    return filename.startswith(_LIBRARY)


@functools.cache
def is_users(filename: str) -> bool:
    """Whether a file belongs neither to torch or fxamp nor to Python itself."""
    return not is_library(filename) and (not filename.startswith(_PYTHON) or "site-packages" in filename)


def user_frame(frame: FrameType | None) -> FrameType | None:
    """The nearest frame that belongs to neither torch nor fxamp, nor to Python itself."""
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def calling_frame(frame: FrameType | None) -> FrameType | None:
    """The nearest frame that does something with a traced value, the user's or torch's."""
    while frame is not None and frame.f_code.co_filename.startswith(_TRACING):
        frame = frame.f_back
    return frame


def user_line(frame: FrameType | None) -> str:
    """The user's file and line, as ``model.py:14``; "" when there is none."""
    found = user_frame(frame)
    return f"{found.f_code.co_filename}:{found.f_lineno}" if found is not None else ""


def spelled_line(frame: FrameType | None) -> str:
    """The line that runs in a frame, as `` `if x.dim() == 3:` (model.py:14)``."""
    if frame is None:
        return "?"
    file, number = frame.f_code.co_filename, frame.f_lineno
    return f"`{linecache.getline(file, number, frame.f_globals).strip()}` ({os.path.basename(file)}:{number})"
