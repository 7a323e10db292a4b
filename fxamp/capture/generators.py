"""Which random numbers of its own does a model draw from?

A ``torch.Generator`` that the model keeps is shared with the graph, so its state goes on from call to call. One that a
forward makes is made at every call. What sets the state of one while it is traced would be lost, and is refused.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Final

import torch
from torch import nn
from torch.fx.proxy import TraceError

from fxamp.capture.reach import reachable

__all__ = ["Generators"]

_UNLIKELY = 5_577_006_791_947_779_410  # a seed that no model sets


class Generators:
    """The generators that exist before a trace.

    Args:
        modules: whose attributes may have some.
        function: what is traced when it is no module, or None.
    """

    def __init__(self, modules: Iterable[nn.Module], function: Any) -> None:
        modules = list(modules)
        forwards = [inspect.getattr_static(kind, "forward", None) for kind in {type(module) for module in modules}]
        roots = [*map(_kept, modules), *(each for each in forwards if isinstance(each, FunctionType)), function]
        found = reachable({str(i): root for i, root in enumerate(roots)})
        self._known = [value for _, value in found if isinstance(value, torch.Generator)]
        self._set = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While the block lasts, they are in a state that tells when one is set."""
        states = [generator.get_state() for generator in self._known]
        self._were_set()
        try:
            yield
        finally:
            for generator, state in zip(self._known, states, strict=True):
                generator.set_state(state)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Refuses what sets the state of one; blocks inside count for themselves.

        Raises:
            TraceError: when the block has set one.
        """
        outer, self._set = self._set or self._were_set(), False
        try:
            yield
            if self._set or self._were_set():
                raise TraceError("sets the state of a torch.Generator, which a graph would forget")
        finally:
            self._were_set()
            self._set = outer

    def _were_set(self) -> bool:
        """Whether one was set since this was asked last."""
        found = any(generator.initial_seed() != _UNLIKELY for generator in self._known)
        for generator in self._known if found else ():
            generator.manual_seed(_UNLIKELY)
        return found

    def check(self, generator: torch.Generator) -> None:
        """Refuses a generator that is not known.

        Raises:
            TraceError: when it was made while the model was traced, or is kept where it is not looked for.
        """
        if not any(generator is known for known in self._known):
            raise TraceError("uses a torch.Generator that is no attribute of a module")


def _kept(module: nn.Module) -> dict[str, Any]:
    """What a module keeps, without what cannot reach a generator: its tensors and submodules, and empty tables."""
    empty = [name for name, value in vars(module).items() if type(value) in (dict, OrderedDict) and not value]
    return {name: value for name, value in vars(module).items() if name not in _TABLES and name not in empty}


_TABLES: Final = frozenset({"_parameters", "_buffers", "_modules"})
