"""A model and its loss, ready to be traced under any mode and any layout of arguments.

``Program`` owns the module tree of the converted module: a clone that shares the user's tensors. Each
trace runs on a throw-away clone, so nothing a forward does to ``self`` stays.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

from fxamp.capture.calls import has_hooks
from fxamp.capture.clone import clone_trees
from fxamp.capture.entry import Entry
from fxamp.capture.facts import Facts
from fxamp.capture.failures import capture_error, name_of
from fxamp.capture.members import find
from fxamp.capture.patches import python_state
from fxamp.capture.signature import CallSignature, Layout
from fxamp.capture.surroundings import (
    Ambient,
    autocast_answers,
    caches_emptied,
    changed_modules,
    check_root,
    modes,
    purged,
)
from fxamp.capture.tracer import THIS, WHOLE, AmpTracer
from fxamp.errors import CaptureError

__all__ = ["Program", "Traced"]

_NUMBER = re.compile(r"(int|float)\(\) argument must be|a traced value cannot be")


@dataclass(frozen=True)
class Traced:
    """One graph of a program.

    Attributes:
        graph: calls of torch functions, methods and leaf modules; no casts of ours.
        layout: which arguments its placeholders stand for.
        untraceable: module path to why it stayed a call.
        modes: path and ``training`` flag of every module whose flag was read.
        ambient: device type and dtype of the autocast that it was traced for (None: of none), in a tuple; empty when
            that made no difference.
    """

    graph: fx.Graph
    layout: Layout
    untraceable: Mapping[str, str] = field(default_factory=dict)
    modes: Mapping[str, bool] = field(default_factory=dict)
    ambient: tuple[()] | tuple[Ambient] = ()

    def serves(self, flags: Mapping[str, bool], ambient: Ambient) -> bool:
        """Whether it is also the graph for modules in these modes, under this autocast."""
        return self.ambient in ((), (ambient,)) and all(flags.get(path) == flag for path, flag in self.modes.items())


class Program:
    """A model and its loss.

    Attributes:
        tree: the modules of the model; ``loss_tree`` those of a loss that is a module, else None.
        loss_path: the name that the loss has beside the model's submodules; "" when it is no module.
        extras: tensors that no module owns and a graph reads, by the name it reads them under.

    Args:
        model: a module, a method of a module, or any callable of tensors. It is left as it is.
        loss: a callable or module of ``(output, *loss_args)``, or None.

    Raises:
        CaptureError: when a signature cannot be read.
    """

    def __init__(self, model: Callable[..., Any], loss: Callable[..., Any] | None = None) -> None:
        self.signature = CallSignature.of(model, loss)
        self.name = name_of(model)
        owner = _owning_module(model)
        self._method = model.__name__ if isinstance(model, MethodType) else "forward"
        self._function = None if owner is not None else model
        self._holder = owner if owner is not None else _holder(model)
        self.extras: dict[str, torch.Tensor] = {}
        loss_module = loss if isinstance(loss, nn.Module) else None
        self.tree, self.loss_tree = clone_trees(self._holder, loss_module)
        self.loss_path = "" if loss_module is None else _free_name(self.tree, "loss")
        self._loss = loss if loss_module is None else None
        if loss is not None and has_hooks(self.tree):
            raise CaptureError(
                f"{self.name} has hooks, which a loss converted with it would not see",
                hint="register them on a submodule, or put the model into a module of its own",
            )
        self.has_loss = loss is not None

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

    @property
    def whole(self) -> nn.Module:
        """A module with the submodules of the model and of the loss, over the same tensors."""
        view = nn.Module()
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "training"):
            view.__dict__[name] = self.tree.__dict__[name]
        view.__dict__["_modules"] = dict(self.tree._modules)
        if self.loss_path:
            view._modules[self.loss_path] = self.loss_tree
        return view

    @property
    def is_function(self) -> bool:
        """Whether a function is traced, on the user's own modules, and not a method of a clone."""
        return self._function is not None

    def attribute(self, path: str) -> Any:
        """The parameter, buffer, tensor or module that a graph reads under this name."""
        if path in self.extras:
            return self.extras[path]
        if path in (THIS, WHOLE):
            return self.tree
        in_loss = bool(self.loss_path) and path.partition(".")[0] == self.loss_path
        return find(self.whole if in_loss else self.tree, path)

    def flags(self, mode: str) -> dict[str, bool]:
        """Module path to ``training`` flag in "train", "eval" or "as_is", as the model's own ``train`` sets it."""
        tree, loss_tree = clone_trees(self.tree, self.loss_tree)
        for module in (tree, loss_tree):
            if module is not None and mode != "as_is":
                module.train(mode == "train")
        return {path: module.training for path, module in _paths(tree, loss_tree, self.loss_path).items()}

    def shared(self, copies: Mapping[int, Any] | None = None) -> Program:
        """A program of its own module tree over the same tensors, or over the copies that are given for them."""
        new, known = copy.copy(self), copies or {}
        tree, loss_tree = clone_trees(self.tree, self.loss_tree, known)
        extras = {name: known.get(id(value), value) for name, value in self.extras.items()}
        new.__dict__.update(self.__dict__, tree=tree, loss_tree=loss_tree, extras=extras)
        return new

    def trace(
        self,
        layout: Layout,
        training: Mapping[str, bool],
        ambient: Ambient = None,
        examples: list[Any] | None = None,
    ) -> Traced:
        """The graph of one call.

        Args:
            layout: which arguments are placeholders.
            training: module path to the ``training`` flag it is traced with.
            ambient: the device type and dtype that ``torch.is_autocast_enabled`` and the like shall answer with.
            examples: the values of the placeholders. They decide branches on the number of dimensions, and on sizes
                too when the model cannot be traced without.

        Raises:
            CaptureError: when the model's or the loss's own code cannot be traced, with the user's line.
        """
        if examples is not None:
            facts = partial(Facts, examples, self.attribute, ambient=ambient)
            with suppress(CaptureError):
                return self._trace(layout, training, ambient, partial(facts, sizes=False))
            return self._trace(layout, training, ambient, partial(facts, sizes=True))
        return self._trace(layout, training, ambient, lambda: None)

    def _trace(
        self,
        layout: Layout,
        training: Mapping[str, bool],
        ambient: Ambient,
        facts: Callable[[], Facts | None],
    ) -> Traced:
        untraceable: dict[str, str] = {}
        numbers = False
        while True:
            try:
                traced, changed = self._trace_once(layout, training, ambient, facts(), untraceable, numbers)
            except CaptureError as error:
                if numbers or not _NUMBER.match(str(error.__cause__)):
                    raise
                numbers = True
                continue
            if not changed:
                return traced
            for path, reason in changed.items():
                while path in untraceable:  # not the module itself but who calls it writes to it
                    path = path.rpartition(".")[0]
                if not path:
                    raise capture_error(self.name, TraceError(reason))
                untraceable[path] = reason

    def _trace_once(
        self,
        layout: Layout,
        training: Mapping[str, bool],
        ambient: Ambient,
        facts: Facts | None,
        untraceable: Mapping[str, str],
        numbers: bool,
    ) -> tuple[Traced, dict[str, str]]:
        """A graph, and the modules whose Python state the trace changed: these have to stay calls."""
        root, loss_tree = clone_trees(self.tree, self.loss_tree)
        if self._function is not None:
            root = self._holder  # a function calls the modules it closes over, so these cannot be clones
        model = self._function or getattr(root, self._method)
        entry = Entry(self.signature, layout, model, loss_tree or self._loss)
        modules = _paths(root, loss_tree, self.loss_path)
        device_type = None if ambient is None else ambient[0]
        tracer = AmpTracer(root, modules, entry, self.extras, untraceable, facts, device_type)
        if _is_library(root) and self._method == "forward":
            entry.model = tracer.call_whole
        state = {path: python_state(module) for path, module in modules.items()}
        drawn = torch.get_rng_state()
        with modes(modules, training), autocast_answers(ambient) as asked, caches_emptied(modules.values()):
            try:
                graph = tracer.run(entry.names(), numbers=numbers)
                if purged(modules.values()):
                    raise TraceError("keeps a traced value in a global or class variable")
                changed = changed_modules(modules, state)
                check_root(changed, drawn)
            except Exception as error:
                raise capture_error(self.name, error) from error
            finally:
                torch.set_rng_state(drawn)
        matters = tracer.composed or bool(asked) or (facts is not None and facts.told_dtypes)
        return Traced(graph, layout, tracer.untraceable, tracer.mode_readers, (ambient,) if matters else ()), changed


def _paths(root: nn.Module, loss: nn.Module | None, loss_path: str) -> dict[str, nn.Module]:
    """Every module by its path; one that has several keeps the first."""
    found = dict(root.named_modules())
    if loss is not None:
        found.update({f"{loss_path}.{path}".rstrip("."): module for path, module in loss.named_modules()})
    return found


def _free_name(tree: nn.Module, name: str) -> str:
    while hasattr(tree, name):
        name += "_"
    return name


def _is_library(module: nn.Module) -> bool:
    """Whether a module is torch's own and no container: its forward is not the user's to change."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(module).__module__.startswith("torch.nn.modules") and type(module) not in (
        nn.Module,
        *containers,
    )


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


def _picklable(function: Any) -> Any:
    try:
        pickle.dumps(function)
    except Exception:
        return None
    return function
