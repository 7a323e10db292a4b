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
from torch.utils import _pytree as pytree

from fxamp.capture.failures import NotPutBack
from fxamp.capture.patches import mode_of, set_mode
from fxamp.capture.source import is_library, user_frame

__all__ = ["Attributes"]

_MISSING: Final = object()
_PLAIN: Final = (bool, int, float, str, tuple, list, dict, torch.Size, torch.dtype, torch.device)


class _Write(NamedTuple):
    module: nn.Module
    name: str
    before: Any  # in the module's own dictionary
    calls: int = 0  # that had not been traced into by then
    refused: NotPutBack | None = None  # why the next call would not find what this one does, as it is


class Attributes:
    """The attributes that one trace reads and sets.

    After it ``keeps_traced`` says whether one was set to a traced value: then the trace counts only if reads were seen.

    Args:
        paths: identity of each module that counts, to its path.
        modules: path to the module whose mode the trace is made in.
        assign: called with a module, a name and a traced value, to put the assignment into the graph.
        sized: whether the model asked for the size of this parameter or buffer.
        meet: called with a module that does not count, when its mode is read.
        calls: how many calls of the user's modules the graph has that are not traced into.
    """

    def __init__(
        self,
        paths: Mapping[int, str],
        modules: Mapping[str, nn.Module],
        assign: Callable[[nn.Module, str, Any], None],
        sized: Callable[[torch.Tensor], bool],
        meet: Callable[[nn.Module], None],
        calls: Callable[[], int],
    ) -> None:
        self.mode_readers: dict[str, bool] = {}
        self._paths, self._modules = paths, modules
        self._assign, self._sized, self._meet, self._calls = assign, sized, meet, calls
        self.keeps_traced = False
        self._read: set[tuple[int, str]] = set()
        self._writes: list[_Write] = []

    def mark(self) -> int:
        """What ``undo`` goes back to."""
        return len(self._writes)

    def undo(self, mark: int = 0) -> None:
        """Takes back what was set since the mark."""
        while len(self._writes) > mark:
            write = self._writes.pop()
            if write.before is _MISSING:
                write.module.__dict__.pop(write.name, None)
            else:
                write.module.__dict__[write.name] = write.before

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
            refused = self._next_call(module, name)
            self._assign(module, name, value)
        elif _is_same(value, before):
            refused = ""
        elif _holds_traced(value):
            raise TraceError(f"sets self.{name}, which a graph cannot carry to the next call")
        else:
            refused = f"sets self.{name}, which a graph cannot carry to the next call"
            self._assign(module, name, value)
        later = NotPutBack(refused, user_frame(sys._getframe(1))) if refused else None
        self._writes.append(_Write(module, name, before, self._calls(), later))
        module.__dict__[name] = value

    def check(self, mark: int = 0) -> None:
        """Refuses what was set since the mark and goes on to the next call, where this one found something else.

        Raises:
            TraceError: when there is such an attribute; one that was put back is none.
        """
        written: dict[tuple[int, str], list[_Write]] = {}
        for write in self._writes[mark:]:
            written.setdefault((id(write.module), write.name), []).append(write)
        for writes in written.values():
            refused = [write.refused for write in writes if write.refused is not None]
            if refused and not self._is_put_back(writes[0]):
                raise refused[-1]

    def _is_put_back(self, write: _Write) -> bool:
        """Whether an attribute is as it was before it was written, and nobody else can have seen it in between."""
        module, name, before = write.module, write.name, write.before
        if before is _MISSING:  # what the class has was read as long as there was no other
            before = getattr(type(module), name, _MISSING)
        # A call that is not traced into knows the model itself, and the graph sets what belongs to the converted one.
        seen = self._paths[id(module)] == "" and self._calls() != write.calls
        return not seen and _is_same(module.__dict__.get(name, _MISSING), before)

    def _next_call(self, module: nn.Module, name: str) -> str:
        """Why the next call would find something else than this one where it sets a traced value; "" if not."""
        if any(write.module is module and write.name == name for write in self._writes):
            return ""
        state = module.__dict__
        before = next((state[k][name] for k in ("_parameters", "_buffers") if name in state[k]), state.get(name))
        if isinstance(before, torch.Tensor):
            return f"sets self.{name}, of which it asks the size: the next call may find another" * self._sized(before)
        was_read = not self._read.isdisjoint({(id(module), name), (id(module), "__dict__")})
        return f"keeps self.{name} for the next call, which may go another way then" if was_read else ""


def _is_same(value: Any, before: Any) -> bool:
    if value is before:
        return True
    plain = type(value) is type(before) and isinstance(value, _PLAIN)
    return plain and not (_holds_traced(value) or _holds_traced(before)) and bool(value == before)


def _holds_traced(value: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy | torch.Tensor) for leaf in pytree.tree_leaves(value))
