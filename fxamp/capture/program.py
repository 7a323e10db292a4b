"""A model and its loss, ready to be traced under any mode and any layout of arguments.

``Program`` owns the module tree of the converted module: a clone that shares the user's tensors. Each
trace runs on a throw-away clone, so nothing a forward does to ``self`` stays.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from fxamp.capture.clone import clone_tree
from fxamp.capture.signature import CallSignature, Layout
from fxamp.capture.tracer import LIBRARY, AmpTracer
from fxamp.errors import CaptureError

__all__ = ["Program", "Traced"]


@dataclass(frozen=True)
class Traced:
    """One graph of a program.

    Attributes:
        graph: calls of torch functions, methods and leaf modules; no casts of ours.
        layout: which arguments its placeholders stand for.
        untraceable: module path to why it stayed a call.
        modes: path and ``training`` flag of every module whose flag was read.
    """

    graph: fx.Graph
    layout: Layout
    untraceable: Mapping[str, str] = field(default_factory=dict)
    modes: Mapping[str, bool] = field(default_factory=dict)


class Program:
    """A model and its loss.

    ``tree`` holds all their modules; ``extras`` the tensors that no module owns and a graph reads.

    Args:
        model: a module, a method of a module, or any callable of tensors. It is left as it is.
        loss: a callable or module of ``(output, *loss_args)``, or None.

    Raises:
        CaptureError: when a signature cannot be read.
    """

    def __init__(self, model: Callable[..., Any], loss: Callable[..., Any] | None = None) -> None:
        self.signature = CallSignature.of(model, loss)
        self.name = _name(model)
        owner = _owning_module(model)
        self._method = model.__name__ if isinstance(model, MethodType) else "forward"
        self._function = None if owner is not None else model
        self._holder = owner if owner is not None else _holder(model)
        self.tree = clone_tree(self._holder)
        self.extras: dict[str, torch.Tensor] = {}
        self.loss_path = self._adopt(loss)
        self._loss = None if self.loss_path else loss
        self.has_loss = loss is not None

    def _adopt(self, loss: Any) -> str:
        if not isinstance(loss, nn.Module):
            return ""
        path = "loss"
        while hasattr(self.tree, path):
            path += "_"
        self.tree._modules[path] = clone_tree(loss)
        return path

    def __getstate__(self) -> dict[str, Any]:
        """Without what cannot be pickled: a lambda is lost, and with it only the tracing of new calls."""
        functions = {name: _picklable(getattr(self, name)) for name in ("_function", "_loss")}
        return {**self.__dict__, **functions, "_holder": nn.Module()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        new = object.__new__(Program)
        kept = {name: self.__dict__[name] for name in ("_function", "_loss", "_holder", "signature")}
        rest = {name: value for name, value in self.__dict__.items() if name not in kept}
        new.__dict__.update(kept, **copy.deepcopy(rest, memo))
        return new

    def attribute(self, path: str) -> Any:
        """The parameter, buffer, tensor or module that a graph reads under this name; "_this" is the tree."""
        if path in self.extras:
            return self.extras[path]
        owner, _, name = path.rpartition(".")
        return getattr(self.tree.get_submodule(owner), name) if path != "_this" else self.tree

    def shared(self) -> Program:
        """A program of its own module tree over the same tensors."""
        new = copy.copy(self)
        new.__dict__.update(self.__dict__, tree=clone_tree(self.tree), extras=dict(self.extras))
        return new

    def trace(
        self, layout: Layout, training: Mapping[str, bool], ambient: tuple[str, torch.dtype] | None = None
    ) -> Traced:
        """The graph of one call.

        Args:
            layout: which arguments are placeholders.
            training: module path to the ``training`` flag it is traced with.
            ambient: the device type and dtype that ``torch.is_autocast_enabled`` and the like shall answer with.

        Raises:
            CaptureError: when the model's or the loss's own code cannot be traced, with the user's line.
        """
        # A function calls the modules it closes over, so these cannot be clones.
        root = clone_tree(self.tree) if self._function is None else self._holder_with_loss()
        model = self._function or getattr(root, self._method)
        loss = root.get_submodule(self.loss_path) if self.loss_path else self._loss
        entry = _Entry(self.signature, layout, model, loss)
        through = tuple(module for module in (root, loss) if isinstance(module, nn.Module))
        sources = tuple(f for f in (self._function, self._loss) if inspect.isroutine(f))
        tracer = AmpTracer(root, entry, through, self.extras, sources)
        with _modes(root, training), _autocast_answers(ambient):
            try:
                graph = tracer.run(entry.names())
            except Exception as error:
                raise _capture_error(self.name, error) from error
        return Traced(graph, layout, tracer.untraceable, tracer.mode_readers)

    def _holder_with_loss(self) -> nn.Module:
        root = clone_tree(nn.Module())
        root._modules.update(self._holder._modules)
        root._parameters.update(self._holder._parameters)
        if self.loss_path:
            root._modules[self.loss_path] = self.tree._modules[self.loss_path]
        return root


class _Entry:
    """Calls the model, then the loss, with proxies laid out as a layout says."""

    def __init__(self, signature: CallSignature, layout: Layout, model: Any, loss: Any) -> None:
        self._signature, self._layout, self._model, self._loss = signature, layout, model, loss

    def names(self) -> list[str]:
        names: list[str] = []
        for slot in self._layout:
            if slot.kind == "value":
                names.append(slot.name)
            elif slot.kind == "tree":
                names.extend(f"{slot.name}_{i}" for i in range(slot.detail.num_leaves))
        return names

    def __call__(self, *proxies: Any) -> Any:
        rest: Iterator[Any] = iter(proxies)
        values: dict[str, Any] = {}
        for slot in self._layout:
            if slot.kind == "constant":
                values[slot.name] = slot.detail
            elif slot.kind == "tree":
                leaves = [next(rest) for _ in range(slot.detail.num_leaves)]
                values[slot.name] = pytree.tree_unflatten(leaves, slot.detail)
            else:
                values[slot.name] = next(rest)
        args, kwargs, loss_kwargs = self._signature.split(values)
        output = self._model(*args, **kwargs)
        if self._loss is None:
            return output
        loss = self._loss(output, **loss_kwargs)
        if not isinstance(loss, fx.Proxy):
            raise CaptureError(
                f"the loss {_name(self._loss)} returns a {type(loss).__name__}: expected one tensor",
                hint="return the sum of its parts; the model's output may carry the rest",
            )
        return loss, output


@contextmanager
def _modes(root: nn.Module, training: Mapping[str, bool]) -> Iterator[None]:
    before = {module: module.training for module in root.modules()}
    try:
        for path, module in root.named_modules():
            module.__dict__["training"] = training.get(path, module.training)
        yield
    finally:
        for module, flag in before.items():
            module.__dict__["training"] = flag


@contextmanager
def _autocast_answers(ambient: tuple[str, torch.dtype] | None) -> Iterator[None]:
    """Autocast switched on for whoever asks; torch.autocast itself would refuse "cuda" without a GPU."""
    if ambient is None:
        yield
        return
    device_type, dtype = ambient
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, True)
    torch.set_autocast_dtype(device_type, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])


def _owning_module(model: Any) -> nn.Module | None:
    owner = model.__self__ if isinstance(model, MethodType) else model
    return owner if isinstance(owner, nn.Module) else None


def _holder(function: Callable[..., Any]) -> nn.Module:
    """A module that owns the modules and parameters a function closes over, under their names there."""
    holder = nn.Module()
    target = inspect.unwrap(getattr(function, "func", function))
    if not inspect.isfunction(target):
        return holder
    variables = inspect.getclosurevars(target)
    for name, value in {**variables.globals, **variables.nonlocals}.items():
        if isinstance(value, nn.Module | nn.Parameter):
            setattr(holder, name, value)
    return holder


def _capture_error(model: str, error: Exception) -> CaptureError:
    if isinstance(error, CaptureError):
        return error
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(LIBRARY)]
    where, line = model, ""
    if frames:
        where = f"{_qualified(error, model)} ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})"
        line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip().rstrip(":")
    if isinstance(error, TraceError) and str(error).startswith("branches"):
        what = f"the branch `{line}` depends on a tensor value"
    else:
        what = f"`{line}` {error}" if isinstance(error, TraceError) else f"`{line}`: {error}"
    return CaptureError(
        f"cannot trace {where}: {what}",
        hint="put that line into a submodule of its own: a module that cannot be traced stays a call",
    )


def _qualified(error: Exception, model: str) -> str:
    found, trace = model, error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(LIBRARY):
            owner = trace.tb_frame.f_locals.get("self")
            found = f"{type(owner).__name__}.{code.co_name}" if owner is not None else code.co_qualname
        trace = trace.tb_next
    return found


def _picklable(function: Any) -> Any:
    try:
        pickle.dumps(function)
    except Exception:
        return None
    return function


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__
