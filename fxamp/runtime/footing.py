"""What does a graph stand on that can change without it?

The modules that were traced into are in the graph no more: a hook that is registered on one of them would not run, a
module put in its place would not be called, and casts are planned for the dtypes that parameters had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import nn

from fxamp.capture import Program, Traced
from fxamp.capture.calls import CALL_HOOKS
from fxamp.capture.tracer import WHOLE
from fxamp.errors import CaptureError

__all__ = ["Footing"]

_dtype = attrgetter("dtype")


class Footing:
    """The modules that a graph was traced through, and their parameters and buffers, as they are now.

    Args:
        program: what was traced.
        traced: the graph.
    """

    def __init__(self, program: Program, traced: Traced) -> None:
        modules = dict(_traced_into(program.whole, traced))
        self._program = program
        self._paths = [path for path in modules if path]
        self._modules = [modules[path] for path in self._paths]
        hooks = [getattr(module, name) for module in self._modules for name in CALL_HOOKS]
        self._hooks = [table for table in hooks if not table]
        self._hooked = [(table, list(table.values())) for table in hooks if table]  # Dynamo traced into these
        places = [path.rpartition(".") for path in self._paths]
        self._owners = [modules[owner]._modules for owner, _, _ in places]
        self._names = [name for _, _, name in places]
        kept: list[tuple[str, Mapping[str, Any], str]] = [
            (path, table, name)
            for path, module in modules.items()
            for table in (module._parameters, module._buffers)
            for name in table
        ]
        self._absent = [(table, name) for _, table, name in kept if table[name] is None]
        present = [(path, table, name) for path, table, name in kept if table[name] is not None]
        self._tensors = [f"{path}.{name}".lstrip(".") for path, _, name in present]
        self._tables = [table for _, table, _ in present]
        self._keys = [name for _, _, name in present]
        self._dtypes = self._dtypes_now()

    def holds(self) -> bool:
        """Whether all is as it was. This is asked at every call, so it is done without a step of Python's."""
        try:
            return (
                not any(self._hooks)
                and not self._other_hooks()
                and all(map(is_, map(getitem, self._owners, self._names), self._modules))
                and self._dtypes_now() == self._dtypes
                and not any(table[name] is not None for table, name in self._absent)
            )
        except (AttributeError, KeyError):
            return False

    def _other_hooks(self) -> bool:
        return any(list(table.values()) != known for table, known in self._hooked)

    def needs_a_trace(self) -> bool:
        """Whether the graph itself is another one now, and not just its casts.

        Raises:
            CaptureError: when the modules are others, or the model that was converted was given another dtype.
        """
        for path, owner, name, module in zip(self._paths, self._owners, self._names, self._modules, strict=True):
            if owner.get(name) is not module:
                raise CaptureError(
                    f"submodule '{path}' was replaced after fxamp.convert, which traced into it: found "
                    f"{_named(owner.get(name))}, expected the {type(module).__name__} that was traced",
                    hint="replace it in the model, and convert that",
                )
        if any(self._hooks) or self._other_hooks() or any(table.get(name) is not None for table, name in self._absent):
            return True
        self._check_buffers()
        return any(table.get(key) is None for table, key in zip(self._tables, self._keys, strict=True))

    def _dtypes_now(self) -> Sequence[torch.dtype]:
        return list(map(_dtype, map(getitem, self._tables, self._keys)))

    def _check_buffers(self) -> None:
        """A dtype that the original was given reaches the parameters, which are shared, and no buffers."""
        theirs = dict(self._program.original.named_buffers())
        for path, table, key, dtype in zip(self._tensors, self._tables, self._keys, self._dtypes, strict=True):
            if path in theirs and table[key].dtype == dtype != theirs[path].dtype:
                raise CaptureError(
                    f"{self._program.name} was given another dtype after fxamp.convert: its buffer '{path}' is "
                    f"{theirs[path].dtype}, expected {dtype} as in the converted module, which shares its parameters",
                    hint="call .to(), .bfloat16() and the like on the converted module, or convert again",
                )


def _traced_into(whole: nn.Module, traced: Traced) -> Iterator[tuple[str, nn.Module]]:
    opaque = tuple(f"{node.target}." for node in traced.graph.nodes if node.op == "call_module")
    for path, module in whole.named_modules():
        if f"{WHOLE}." not in opaque and not f"{path}.".startswith(opaque):
            yield path, module


def _named(module: Any) -> str:
    return "nothing" if module is None else f"a {type(module).__name__}"
