"""A model and its loss, ready to be traced under any mode and any layout of arguments.

``Program`` owns the module tree of the converted module: a clone that shares the user's tensors. Each
trace runs on a throw-away clone, so nothing a forward does to ``self`` stays.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from fxamp.capture.caches import forgetting_fakes
from fxamp.capture.calls import has_hooks
from fxamp.capture.clone import clone_trees
from fxamp.capture.facts import Facts, gpu_is_away
from fxamp.capture.failures import HiddenError, name_of, untraceable_by
from fxamp.capture.holder import entry_of, holder_of
from fxamp.capture.members import find, member
from fxamp.capture.patches import mode_of, switches_plainly
from fxamp.capture.paths import free_name, paths_of
from fxamp.capture.setting import Setting, Traced
from fxamp.capture.signature import CallSignature, Layout
from fxamp.capture.state import kept_objects
from fxamp.capture.surroundings import StateChangedError, calls_of, modes
from fxamp.capture.tracer import THIS, WHOLE
from fxamp.capture.traces import Traces
from fxamp.errors import CaptureError

__all__ = ["Program", "Traced"]

_KEPT = ("_function", "_loss", "_holder", "_loss_module", "_bound", "signature")  # the user's, in a copy too


class Program(Traces):
    """A model and its loss.

    Attributes:
        tree: the modules of the model; ``loss_tree`` those of a loss that is a module, else None.
        loss_path: the name that the loss has beside the model's submodules; "" when it is no module.
        extras: tensors and objects that no module owns and a graph reads, by the name it reads them under.

    Args:
        model: a module, a method of a module, or any callable of tensors. It is left as it is.
        loss: a callable or module of ``(output, *loss_args)``, or None.

    Raises:
        CaptureError: when a signature cannot be read.
    """

    frontends = ("torch.fx", "Dynamo")

    def __init__(self, model: Callable[..., Any], loss: Callable[..., Any] | None = None) -> None:
        self.name = name_of(model)
        entry = entry_of(model)
        self._method, self._bound = (entry.method, entry.bound) if entry is not None else ("forward", None)
        self._function = None if entry is not None else model
        self._holder = entry.owner if entry is not None else holder_of(model)
        self.signature = CallSignature.of(model if entry is None else entry.signed(), loss)
        self.extras: dict[str, Any] = {}
        self._loss_module = loss if isinstance(loss, nn.Module) else None
        self._loss = loss if self._loss_module is None else None
        self.has_loss = loss is not None
        self.adopted, self._settled = 0, False
        self._strangers: list[Any] = []
        self._make_trees()
        self._check_hooks()

    def _make_trees(self) -> None:
        self.tree, self.loss_tree = clone_trees(self._holder, self._loss_module)
        self.loss_path = "" if self._loss_module is None else free_name(self.tree, "loss")
        self._top = self._top_modules()

    def _check_hooks(self) -> None:
        if has_hooks(self.tree) and (self.has_loss or self._method == "__call__"):
            what = "a loss converted with it" if self.has_loss else "a graph of its own __call__"
            raise CaptureError(
                f"{self.name} has hooks, which {what} would not see",
                hint="register them on a submodule, or put the model into a module of its own",
            )

    @property
    def hooked(self) -> bool:
        """Whether a call of the model is one that its own hooks see."""
        return self._method == "forward" and not self.has_loss

    def settle(self) -> None:
        """What the model owns is known: nothing more is adopted."""
        self._settled = True

    def __getstate__(self) -> dict[str, Any]:
        """Without what cannot be pickled: a lambda is lost, and with it only the tracing of new calls."""
        functions = {name: _picklable(getattr(self, name)) for name in ("_function", "_loss")}
        return {**self.__dict__, **functions, **_nothing()}

    def let_go(self) -> None:
        """Nothing is traced any more: the user's model, which has the weights in float32, is not kept."""
        self.__dict__.update(_nothing())

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        new = object.__new__(Program)
        kept = {name: self.__dict__[name] for name in _KEPT}
        rest = {name: value for name, value in self.__dict__.items() if name not in kept}
        new.__dict__.update(kept, **copy.deepcopy(rest, memo))
        return new

    @property
    def whole(self) -> nn.Module:
        """A module with the submodules of the model and of the loss, over the same tensors and in the same tables."""
        view = nn.Module()
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "training"):
            view.__dict__[name] = self.tree.__dict__[name]
        view.__dict__["_modules"] = self._top
        return view

    def _top_modules(self) -> dict[str, nn.Module | None]:
        own = self.tree._modules
        return {**own, self.loss_path: self.loss_tree} if self.loss_path else own

    @property
    def original(self) -> nn.Module:
        """The model as the user has it; an empty module for a program that was unpickled."""
        return self._holder

    @property
    def is_function(self) -> bool:
        """Whether a function is traced, on the user's own modules, and not a method of a clone."""
        return self._function is not None

    def attribute(self, path: str) -> Any:
        """The parameter, buffer, tensor or module that a graph reads under this name."""
        return self.reader(path)()

    def reader(self, path: str) -> Callable[[], Any]:
        """A function that gives what ``attribute`` gives, now and later."""
        if path in self.extras:
            return partial(self.extras.__getitem__, path)
        if path in (THIS, WHOLE, ""):
            return lambda: self.tree
        owner, _, name = path.rpartition(".")
        in_loss = bool(self.loss_path) and path.partition(".")[0] == self.loss_path
        return partial(member, find(self.whole if in_loss else self.tree, owner), name)

    def flags(self, mode: str) -> dict[str, bool]:
        """Module path to ``training`` flag in "train", "eval" or "as_is", as the model's own ``train`` sets it."""
        modules = paths_of(self.tree, self.loss_tree, self.loss_path)
        if mode == "as_is" or all(map(switches_plainly, modules.values())):
            return {path: mode_of(module) if mode == "as_is" else mode == "train" for path, module in modules.items()}
        tree, loss_tree = clone_trees(self.tree, self.loss_tree)
        for module in (tree, loss_tree):
            if module is not None:
                with suppress(NotImplementedError):  # an exported model has one mode
                    module.train(mode == "train")
        return {path: mode_of(module) for path, module in paths_of(tree, loss_tree, self.loss_path).items()}

    def in_mode(self, training: Mapping[str, bool]) -> AbstractContextManager[None]:
        """Its modules with these flags; they get theirs back."""
        return modes(paths_of(self.tree, self.loss_tree, self.loss_path), training)

    def become(self, clone: Callable[[Any], Any]) -> None:
        """Goes over to what ``clone`` makes of its modules."""
        self.tree, self.loss_tree, self._top = clone(self.tree), clone(self.loss_tree), clone(self._top)
        self.extras = {name: clone(value) for name, value in self.extras.items()}

    def shared(self, copies: Mapping[int, Any] | None = None) -> Program:
        """A program of its own module tree over the same tensors, or over the copies that are given for them."""
        new, known = copy.copy(self), copies or {}
        tree, loss_tree = clone_trees(self.tree, self.loss_tree, known)
        extras = {name: known.get(id(value), value) for name, value in self.extras.items()}
        new.__dict__.update(self.__dict__, tree=tree, loss_tree=loss_tree, extras=extras)
        new._top = new._top_modules()
        return new

    def trace(
        self,
        layout: Layout,
        setting: Setting,
        examples: list[Any] | None = None,
        *,
        data: bool = True,
    ) -> Traced:
        """The graph of one call.

        Args:
            layout: which arguments are placeholders.
            setting: what shall surround it: for whoever asks for the modes of modules, autocast and the grad mode.
            examples: the values of the placeholders. They decide branches on the number of dimensions, and on sizes
                too when the model cannot be traced without.
            data: they also decide branches on what follows from their data, and the graph is for such data.

        Raises:
            CaptureError: when the model's or the loss's own code cannot be traced, with the user's line.
        """
        with self.in_mode(setting.training), forgetting_fakes():
            if examples is None:
                return self._once_settled(lambda: self._trace(layout, setting, lambda: None))
            return self._by_frontends(layout, setting, examples, data=data)

    def _by_frontends(self, layout: Layout, setting: Setting, examples: list[Any], *, data: bool) -> Traced:
        grad = setting.grad.enabled and not setting.grad.inference
        facts = partial(Facts, examples, self.attribute, data=data, ambient=setting.ambient, grad=grad)

        def by_torch_fx(**how: Any) -> Callable[[], Traced]:
            return lambda: self._trace(layout, setting, partial(facts, **how))

        def by_dynamo(*, dynamic: bool) -> Callable[[], Traced]:
            return lambda: self._trace_whole(layout, setting, examples, dynamic=dynamic)

        attempts: tuple[tuple[str, Callable[[], Traced]], ...] = (
            ("torch.fx", by_torch_fx(sizes=False)),
            ("torch.fx", by_torch_fx(sizes=True)),
            ("torch.fx", lambda: by_torch_fx(sizes=True, seen=self._witnessed(layout, setting, examples))()),
            ("Dynamo", by_dynamo(dynamic=True)),
            ("Dynamo", by_dynamo(dynamic=False)),
        )
        failed: dict[str, CaptureError] = {}
        guessed: Traced | None = None
        away = setting.ambient is not None and gpu_is_away(setting.ambient[0])  # Dynamo cannot ask its autocast
        for frontend, attempt in attempts:
            if frontend not in self.frontends or (frontend == "Dynamo" and guessed is not None and away):
                continue
            try:
                found = self._once_settled(attempt)
            except CaptureError as error:
                if isinstance(error.__cause__, HiddenError):
                    raise
                failed[frontend] = error
                continue
            if not found.guessed:
                failed.pop(frontend, None)
                return replace(found, failed={name: error.message for name, error in failed.items()})
            guessed = guessed or found  # to be taken if Dynamo, which would know, does not take the model
            failed[frontend] = CaptureError(f"cannot trace {self.name} for sure: {found.guessed}")
        if guessed is not None:
            return replace(guessed, failed={name: error.message for name, error in failed.items() if name == "Dynamo"})
        raise untraceable_by(failed)

    def _once_settled(self, attempt: Callable[[], Traced]) -> Traced:
        """A trace; what it changes in Python may only be what its second run finds, and goes the same way with.

        transformers sets ``config.problem_type`` at the first call with labels, for one.
        """
        with kept_objects((*self.whole.modules(), *self._holder.modules())):
            try:
                return attempt()
            except CaptureError as error:
                changed = error.__cause__
                if not isinstance(changed, StateChangedError):
                    raise
                found = attempt()
                if calls_of(found.graph) != changed.calls:
                    raise
                return found


def _nothing() -> dict[str, Any]:
    """In the place of the user's own modules."""
    return {"_holder": nn.Module(), "_loss_module": None, "_strangers": []}


def _picklable(function: Any) -> Any:
    try:
        pickle.dumps(function)
    except Exception:
        return None
    return function
