"""Stands in for packages that third-party code imports and no model uses.

timm and others name torchvision for the transforms of their data sets. It has to be built for the very build of torch
that runs: a wrong one makes every package fail that looks for it, so none is installed for the tests.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any

from torch import nn

__all__ = ["stand_ins"]


class _Named(type):
    """Of a class that stands in for another, or for an enumeration: members are their names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(types.ModuleType):
    """Has whatever is imported from it: a class that does nothing."""

    __version__ = "0.0"
    __path__: MutableSequence[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _Named(name, (nn.Module,), {}))
        return vars(self)[name]


class _Finder:
    """Finds the packages that no other finder found."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        known = name.partition(".")[0] in self.packages
        return ModuleSpec(name, self, is_package=True) if known else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is in it."""


@contextmanager
def stand_ins(*packages: str) -> Iterator[None]:
    """Imports from packages that are not installed succeed inside, and leave no trace of them."""
    finder = _Finder(packages)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]
