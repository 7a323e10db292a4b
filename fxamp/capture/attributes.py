"""What does a forward do with the attributes of its modules?

An attribute that is set to a traced value is set at run time, by a call in the graph. That is right as long as the
program does not go by what an earlier call left there: a trace sees the first call only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple
from unittest import mock

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

from fxamp.capture.patches import mode_of, set_mode
from fxamp.capture.source import is_library

__all__ = ["Attributes"]

_MISSING: Final = object()


class _Write(NamedTuple):
    module: nn.Module
    name: str
    before: Any  # in the module's own dictionary


class Attributes:
    """The attributes that one trace reads and sets.

    After it ``keeps_traced`` says whether one was set to a traced value: then the trace counts only if reads were seen.

    Args:
        paths: identity of each module that counts, to its path.
        modules: path to the module whose mode the trace is made in.
        assign: called with a module, a name and a traced value, to put the assignment into the graph.
        sized: whether the model asked for the size of this parameter or buffer.
        meet: called with a module that does not count, when its mode is read.
    """

    def __init__(
        self,
        paths: Mapping[int, str],
        modules: Mapping[str, nn.Module],
        assign: Callable[[nn.Module, str, fx.Proxy], None],
        sized: Callable[[torch.Tensor], bool],
        meet: Callable[[nn.Module], None],
    ) -> None:
        self.mode_readers: dict[str, bool] = {}
        self._paths, self._modules = paths, modules
        self._assign, self._sized, self._meet = assign, sized, meet
        self.keeps_traced = False
        self._read: set[tuple[int, str]] = set()
        self._writes: list[_Write] = []

    def mark(self) -> int:
        """What ``undo`` goes back to."""
        return len(self._writes)

    def undo(self, mark: int = 0) -> None:
        """Takes back what was set since the mark."""
        while len(self._writes) > mark:
            module, name, before = self._writes.pop()
            if before is _MISSING:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before

    @contextmanager
    def watched(self, *, reads: bool) -> Iterator[None]:
        """Sees every attribute that is set or deleted until the block ends, and every one that is read if asked to."""
        get, set_plain, delete = nn.Module.__getattribute__, nn.Module.__setattr__, nn.Module.__delattr__

        def get_watched(module: nn.Module, name: str) -> Any:
            if id(module) in self._paths and (
                name != "__dict__" or not is_library(sys._getframe(1).f_code.co_filename)
            ):
                self._read.add((id(module), name))
            return get(module, name)

        def set_watched(module: nn.Module, name: str, value: Any) -> None:
            if id(module) not in self._paths:
                set_plain(module, name, value)
            elif hasattr(getattr(type(module), name, None), "__set__"):
                object.__setattr__(module, name, value)  # a property: what it sets comes here again
            else:
                self._set(module, name, value)

        def delete_watched(module: nn.Module, name: str) -> None:
            if id(module) in self._paths:
                raise TraceError(f"deletes self.{name}, which a graph would forget")
            delete(module, name)

        patches: dict[str, Any] = {
            **({"__getattribute__": get_watched} if reads else {}),
            "__setattr__": set_watched,
            "__delattr__": delete_watched,
            "training": property(self._training, self._set_training),
        }
        with mock.patch.multiple(nn.Module, create=True, **patches):
            yield

    def _training(self, module: nn.Module) -> bool:
        path = self._paths.get(id(module))
        if path is None:
            self._meet(module)
            return mode_of(module)
        self.mode_readers[path] = mode_of(self._modules[path])
        return self.mode_readers[path]

    def _set_training(self, module: nn.Module, flag: bool) -> None:
        if id(module) in self._paths and mode_of(module) is not flag:
            raise TraceError(f"switches the mode of {type(module).__name__}, which a graph would forget")
        set_mode(module, flag)

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        before = module.__dict__.get(name, _MISSING)
        if isinstance(value, fx.Proxy):
            self.keeps_traced = True
            self._check_next_call(module, name)
            self._assign(module, name, value)
        elif not (value is before or (type(value) is type(before) and value == before)):
            raise TraceError(f"sets self.{name}, which a graph cannot carry to the next call")
        self._writes.append(_Write(module, name, before))
        module.__dict__[name] = value

    def _check_next_call(self, module: nn.Module, name: str) -> None:
        """Refuses a write that the next call would find where this one found something else."""
        if any(write.module is module and write.name == name for write in self._writes):
            return
        state = module.__dict__
        before = next((state[k][name] for k in ("_parameters", "_buffers") if name in state[k]), state.get(name))
        if isinstance(before, torch.Tensor):
            if self._sized(before):
                raise TraceError(f"sets self.{name}, of which it asks the size: the next call may find another")
        elif not self._read.isdisjoint({(id(module), name), (id(module), "__dict__")}):
            raise TraceError(f"keeps self.{name} for the next call, which may go another way then")
