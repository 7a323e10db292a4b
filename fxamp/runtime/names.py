"""How does generated code reach what a model has, whatever it is called?

torch.fx writes ``self.fc.weight``. That is wrong where a name is a keyword, or one that a class on the way uses for
something else. ``self`` is a root with the model's own names and none of ours, and a step that an attribute would
not take is a look-up in the dict in which ``nn.Module`` keeps it.
"""

from __future__ import annotations

import functools
import inspect
import keyword
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _format_target

from fxamp.capture import Program, assign
from fxamp.capture.calls import CALL_HOOKS
from fxamp.capture.members import find, member, owns, store_of
from fxamp.capture.tracer import THIS, WHOLE

__all__ = ["NamedGraphModule"]

_SELF, _COUNTER = "self", "# COUNTER: "

# What torch.fx keeps on a GraphModule for itself.
_FX_STATE = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(vars(nn.Module()))


class NamedGraphModule(fx.GraphModule):
    """A ``GraphModule`` in which the names of the model win over those of ours and of torch.fx."""

    _root: nn.Module  # what generated code reads from

    def __init__(self, class_name: str) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name=class_name)

    def _adopt(self, program: Program) -> None:
        """Becomes the root of the module tree: its tensors, submodules, hooks and mode."""
        inherited = nn.Module().__dict__
        for name, value in program.tree.__dict__.items():
            if name in inherited and (program.hooked or name not in CALL_HOOKS):
                self.__dict__[name] = value
        self.__dict__["_modules"] = program.whole._modules
        for module in program.loss_tree.modules() if program.loss_tree is not None else ():
            module._non_persistent_buffers_set = set(module._buffers)
        self.__dict__["_root"] = root = _root_of(self, program)
        plain = (name for name in vars(root) if owns(root, name))
        self._show(*root._parameters, *root._buffers, *root._modules, *plain)

    def _show(self, *names: str) -> None:
        """What the model has under a public name hides the attribute of ours, or of torch.fx, that has it."""
        for name in names:
            hidden = hasattr(type(self), name) or name in self.__dict__
            if hidden and not name.startswith("_") and not hasattr(nn.Module, name):
                ours = inspect.getattr_static(type(self), name, None)
                setattr(type(self), name, property(functools.partial(_own, name=name, ours=ours)))

    def _show_written(self, graph: fx.Graph) -> None:
        """As ``_show``, for the attributes of the model itself that a graph sets."""
        calls = graph.find_nodes(op="call_function", target=assign)
        self._show(*(call.args[1] for call in calls if call.args[0].target == THIS))

    def __getattr__(self, name: str) -> Any:
        root = self.__dict__.get("_root")
        # A hook of the model's is given this module, and reads what the model's own constructor set.
        for own in (vars(root), vars(root.__dict__[WHOLE])) if root is not None else ():
            if name in own:
                return own[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        root = self.__dict__.get("_root")
        if name.startswith("_") and name in _FX_STATE:
            self.__dict__[name] = value
        elif root is not None and owns(root, name):
            setattr(root, name, value)
        else:
            super().__setattr__(name, value)

    def _member(self, path: str) -> Any:
        return find(self._root, path)

    def _generate(self, program: Program) -> tuple[Any, Any]:
        """The code of ``_graph``, as ``recompile`` gives it, and the function; ``forward`` of the class stays ours."""
        self._root.__dict__.update(program.extras)
        with _own_spelling(self._graph, self._root), _generated_class(self) as kind:
            code = fx.GraphModule.recompile(self)
            function = kind.__dict__["forward"]
            del kind.forward
        return code, function

    def _settle(self, program: Program) -> None:
        """Puts the plain tensors that forwards have set to where a copy takes them from."""
        tree = vars(program.tree)
        for name, value in vars(self._root).items():
            if isinstance(tree.get(name), torch.Tensor) and isinstance(value, torch.Tensor):
                tree[name] = value.detach()


@contextmanager
def _generated_class(module: nn.Module) -> Iterator[Any]:
    """A context in which the module is of the class that torch.fx made for it, and of no later one.

    ``fully_shard`` makes a subclass of it, and a call that torch.fx generates for a subclass calls itself.
    """
    kind = module.__class__
    module.__class__ = next((each for each in kind.__mro__ if "_wrapped_call" in vars(each)), kind)
    try:
        yield module.__class__
    finally:
        module.__class__ = kind


def _own(amp: NamedGraphModule, name: str, ours: Any) -> Any:
    if owns(amp._root, name):
        return member(amp._root, name)
    return amp.__dict__[name] if ours is None else ours.__get__(amp)


def _root_of(amp: nn.Module, program: Program) -> nn.Module:
    """A module over the tensors and submodules of ``amp``, with the plain tensors of the model and nothing else."""
    root, inherited = nn.Module(), vars(nn.Module())
    for store in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        root.__dict__[store] = amp.__dict__[store]
    own = program.tree.__dict__.items()
    plain = {name: value for name, value in own if isinstance(value, torch.Tensor) and name not in inherited}
    root.__dict__.update(plain)
    root.__dict__.update({THIS: root, WHOLE: program.tree})
    return root


@contextmanager
def _own_spelling(graph: fx.Graph, root: nn.Module) -> Iterator[None]:
    """A context in which the code of ``graph`` has free names for its inputs, and paths that reach what they name."""
    paths = _other_paths(graph, root)
    inputs = [(node, node.target) for node in graph.find_nodes(op="placeholder")]
    for node, _ in inputs:
        node.target = node.name  # the user's may be one that the code needs, such as ``torch``
    try:
        with graph.on_generate_code(lambda before: lambda lines: _respelled(before(lines) if before else lines, paths)):
            yield
    finally:
        for node, name in inputs:
            node.target = name


def _other_paths(graph: fx.Graph, root: nn.Module) -> dict[int, tuple[str, str]]:
    """By the number of the node that reads it: a path as torch.fx writes it, and as it has to be."""
    paths = {i: str(n.target) for i, n in enumerate(graph.nodes) if n.op in ("get_attr", "call_module")}
    spelled = {i: (_format_target(_SELF, path), _spelled(root, path)) for i, path in paths.items()}
    return {i: (theirs, ours) for i, (theirs, ours) in spelled.items() if theirs != ours}


def _respelled(lines: Iterable[str], paths: Mapping[int, tuple[str, str]]) -> list[str]:
    new, current = [], -1
    for line in lines:
        if line.startswith(_COUNTER):  # torch.fx marks where a node begins
            current = int(line.removeprefix(_COUNTER))
        elif current in paths:
            theirs, ours = paths[current]
            line = line.replace(f" = {theirs}", f" = {ours}", 1)
        new.append(line)
    return new


def _spelled(root: nn.Module, path: str) -> str:
    owner, text = root, _SELF
    for name in path.split("."):
        found, store = member(owner, name), store_of(owner, name)
        if store is None or (_is_word(name) and _reaches(owner, name, found)):
            text = _format_target(text, name)
        else:
            text = f"{text}.{store}[{name!r}]"
        owner = found
    return text


def _is_word(name: str) -> bool:
    """Whether a name can stand in the code as it is: a number too, which torch.fx writes in quotes."""
    return name.isdigit() or (name.isascii() and name.isidentifier() and not keyword.iskeyword(name))


def _reaches(owner: nn.Module, name: str, found: Any) -> bool:
    try:
        return getattr(owner, name) is found
    except Exception:  # a property of the user's
        return False
