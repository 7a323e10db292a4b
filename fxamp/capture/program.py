"""A model and its loss, ready to be traced under any mode and any layout of arguments.

``Program`` owns the module tree of the converted module: a clone that shares the user's tensors. Each
trace runs on a throw-away clone, so nothing a forward does to ``self`` stays.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx.proxy import TraceError

from fxamp.capture.calls import has_hooks
from fxamp.capture.clone import clone_trees, stop_iterators
from fxamp.capture.entry import Entry
from fxamp.capture.facts import Facts
from fxamp.capture.failures import Tried, capture_error, name_of
from fxamp.capture.holder import adopt, bound_to, entry_of, holder_of, unowned
from fxamp.capture.members import find, member
from fxamp.capture.outside import Outside
from fxamp.capture.patches import mode_of, python_state
from fxamp.capture.setting import Setting, Traced, grad_mode_as
from fxamp.capture.signature import CallSignature, Layout
from fxamp.capture.surroundings import (
    autocast_answers,
    changed_modules,
    check_root,
    modes,
    put_back,
)
from fxamp.capture.tracer import THIS, WHOLE, AmpTracer
from fxamp.errors import CaptureError

__all__ = ["Program", "Traced"]

_KEPT = ("_function", "_loss", "_holder", "_loss_module", "_bound", "signature")  # the user's, in a copy too
_NUMBER = re.compile(r"(int|float)\(\) argument must be|a traced value cannot be")


class Program:
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
        self.loss_path = "" if self._loss_module is None else _free_name(self.tree, "loss")
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
        return {**self.__dict__, **functions, "_holder": nn.Module(), "_loss_module": None, "_strangers": []}

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
        tree, loss_tree = clone_trees(self.tree, self.loss_tree)
        for module in (tree, loss_tree):
            if module is not None and mode != "as_is":
                with suppress(NotImplementedError):  # an exported model has one mode
                    module.train(mode == "train")
        return {path: mode_of(module) for path, module in _paths(tree, loss_tree, self.loss_path).items()}

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
        if examples is not None:
            grad = setting.grad.enabled and not setting.grad.inference
            facts = partial(Facts, examples, self.attribute, data=data, ambient=setting.ambient, grad=grad)
            with suppress(CaptureError):
                return self._trace(layout, setting, partial(facts, sizes=False))
            return self._trace(layout, setting, partial(facts, sizes=True))
        return self._trace(layout, setting, lambda: None)

    def _trace(
        self,
        layout: Layout,
        setting: Setting,
        facts: Callable[[], Facts | None],
    ) -> Traced:
        untraceable: dict[str, str] = {}
        numbers = False
        while True:
            try:
                traced, changed = self._trace_once(layout, setting, facts(), untraceable, numbers)
            except CaptureError as error:
                if self._adopts():
                    continue
                if numbers or not _NUMBER.match(str(error.__cause__)):
                    raise
                numbers = True
                continue
            if self._adopts():
                continue
            if not changed:
                return traced
            for path, reason in changed.items():
                while path in untraceable:  # not the module itself but who calls it writes to it
                    path = path.rpartition(".")[0]
                if not path:
                    raise capture_error(self.name, TraceError(reason), self._tried(facts()))
                untraceable[path] = reason

    def _adopts(self) -> bool:
        """Whether a callable turned out to reach modules that were not known to be its own: they are now."""
        met, self._strangers = self._strangers, []
        found = unowned(self._holder, self._function, met) if self._function is not None else {}
        if not found:
            return False
        if self._settled:
            raise CaptureError(
                f"this call of {self.name} uses {', '.join(found)}, which no call before did",
                hint="convert with example_inputs of such a call",
            )
        adopt(self._holder, found)
        self.adopted += 1
        self.extras.clear()
        self._make_trees()
        return True

    def _tried(self, facts: Facts | None) -> Tried:
        models = "model, loss" if self.has_loss else "model"
        call = f"fxamp.convert({models}, example_inputs={self.signature.spelled_examples()})"
        return Tried(call, facts is not None, not self.signature.required and not self.signature.starred)

    def _trace_once(
        self,
        layout: Layout,
        setting: Setting,
        facts: Facts | None,
        untraceable: Mapping[str, str],
        numbers: bool,
    ) -> tuple[Traced, dict[str, str]]:
        """A graph, and the modules whose Python state the trace changed: these have to stay calls."""
        root, loss_tree = clone_trees(self.tree, self.loss_tree)
        stop_iterators(root.modules())
        if self._function is not None:
            root = self._holder  # a function calls the modules it closes over, so these cannot be clones
        model = self._function or bound_to(getattr(root, self._method), self._bound)
        entry = Entry(self.signature, layout, model, loss_tree or self._loss)
        modules = _paths(root, loss_tree, self.loss_path)
        originals = _paths(self._holder, self._loss_module, self.loss_path)
        of_parameters = partial(Facts, [], self.attribute, sizes=True, ambient=setting.ambient)
        tracer = AmpTracer(root, modules, originals, entry, self.extras, untraceable, facts, setting, of_parameters)
        self._strangers = tracer.strangers
        if _is_library(root) and self._method == "forward" and self._bound is None:
            entry.model = tracer.call_whole
        state = [{path: python_state(module) for path, module in owner.items()} for owner in (modules, originals)]
        drawn = torch.get_rng_state()
        outside = Outside(modules.values(), self._function)
        with ExitStack() as stack:
            stack.enter_context(put_back(originals))
            stack.enter_context(modes(modules, setting.training))
            stack.enter_context(grad_mode_as(setting.grad))
            asked = stack.enter_context(autocast_answers(setting.ambient, outside))
            stack.enter_context(outside.answering(tracer.answers()))
            try:
                graph = tracer.run(entry.names(), numbers=numbers)
                if left := outside.restore():
                    raise TraceError(left)
                changed = changed_modules(originals, state[1]) | changed_modules(modules, state[0])
                check_root(changed, drawn)
            except Exception as error:
                raise capture_error(self.name, error, self._tried(facts)) from error
            finally:
                outside.restore()
                torch.set_rng_state(drawn)
        matters = tracer.composed or bool(asked) or tracer.of_one_autocast
        given = facts.real if facts is not None else None
        return tracer.traced(graph, layout, (setting.ambient,) if matters else (), given), changed


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


def _picklable(function: Any) -> Any:
    try:
        pickle.dumps(function)
    except Exception:
        return None
    return function
