"""What does the user's own code keep of a run on fake tensors?

A module that is one call is run on fake tensors to know what it gives. What its code puts into a cache of its own then,
a ``functools.lru_cache`` or a dict of its file, must not be there when real tensors come.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import nn
from torch._subclasses import FakeTensor

__all__ = ["forgetting_fakes", "note_run"]

_CACHE: Final = type(functools.lru_cache(lambda: None))
_HOLDERS: Final = (dict, list, tuple)
_files: set[str] = set()  # whose code was run


def note_run(module: nn.Module) -> None:
    """Notes whose code is run on fake tensors."""
    _files.update(type(each).__module__ for each in module.modules())


@contextmanager
def forgetting_fakes() -> Iterator[None]:
    """Takes the fake tensors out of the caches of the code that is run inside."""
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    files = [name for name in _files if not name.startswith("torch.")]
    _files.clear()
    if not files:
        return
    for found in gc.get_objects():
        if type(found) is _CACHE and any(_holds_a_fake(value, 2) for value in gc.get_referents(found)):
            found.cache_clear()
    for name in files:
        for value in list(getattr(sys.modules.get(name), "__dict__", {}).values()):
            if type(value) is dict:
                for key in [key for key, item in value.items() if _holds_a_fake(item, 2)]:
                    del value[key]


def _holds_a_fake(value: Any, depth: int) -> bool:
    if isinstance(value, FakeTensor):
        return True
    if depth == 0 or not isinstance(value, _HOLDERS):
        return False
    return any(_holds_a_fake(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))
