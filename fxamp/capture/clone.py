"""How can a model be traced without being touched?

A clone of the module tree has its own modules and containers, and shares every parameter
and buffer. What a forward does to ``self`` while it is traced stays in the clone.
"""

from __future__ import annotations

import copy
import functools
import random
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from types import MethodType, SimpleNamespace
from typing import Any, Final

import torch
from torch import nn
from torch.fx.proxy import TraceError
from torch.jit._recursive import wrap_cpp_module
from torch.utils import _pytree as pytree

__all__ = ["clone_tree", "clone_trees", "draws", "is_compiled", "stop_iterators", "tensor_copies"]


def clone_tree(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares all tensors with ``model``.

    Modules and the plain lists, dicts and sets they hold are new; a module used twice stays one
    module. The model is left as it is.

    Example::

        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> clone = clone_tree(model)
        >>> clone[0] is model[0], clone[0].weight is model[0].weight
        (False, True)
    """
    return clone_trees(model, None)[0]


def clone_trees(
    model: nn.Module, loss: nn.Module | None, known: Mapping[int, Any] | None = None
) -> tuple[nn.Module, nn.Module | None]:
    """Copies of two module trees as ``clone_tree`` makes them; what they share, the copies share.

    Args:
        model: the one tree.
        loss: the other.
        known: by identity, what is to be in the place of a tensor or a module.
    """
    memo: dict[int, Any] = dict(known or {})
    return _clone(model, memo), None if loss is None else _clone(loss, memo)


def tensor_copies(modules: Iterable[nn.Module], *others: Any) -> dict[int, Any]:
    """Copies of the tensors that modules and containers keep, and of scripted modules, by identity of the original."""
    copies: dict[int, Any] = {}
    storages: dict[int, Any] = {}  # what shares memory does so in the copies
    values, seen = pytree.tree_leaves([list(modules), *map(list, others)]), set()
    for value in values:
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            copies[id(value)] = copy.deepcopy(value if value.is_leaf else value.detach(), storages)
        elif isinstance(value, torch.jit.ScriptModule):
            copies[id(value)] = copy.deepcopy(value, storages)
        elif isinstance(value, nn.Module):
            values.extend(pytree.tree_leaves(list(vars(value).values())))
    return copies


class _Stopped:
    """In the place of an iterator while a model is traced: a step of it would be made once, and in the user's own."""

    def __iter__(self) -> _Stopped:
        return self

    def __next__(self) -> Any:
        raise TraceError("takes the next item of an iterator that it keeps, which a graph would forget")


def stop_iterators(modules: Iterable[nn.Module]) -> None:
    """Takes the iterators out of modules that are about to be traced and thrown away."""
    for module in modules:
        for name, value in module.__dict__.items():
            if hasattr(type(value), "__next__"):
                module.__dict__[name] = _Stopped()


def draws(value: Any) -> bool:
    """Whether this is a generator of random numbers, Python's or numpy's: it moves on when it is asked."""
    return isinstance(value, random.Random) or type(value).__module__.startswith("numpy.random")


# Most of what modules keep; of these only a tensor may have something else in its place.
_ATOMS: Final = frozenset({type(None), bool, int, float, str})
_TENSORS: Final = frozenset({torch.Tensor, nn.Parameter})
_CONTAINERS: Final = frozenset({dict, list, set, OrderedDict})


def _clone(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    known = memo.get(id(value))
    if known is not None or kind in _TENSORS:
        return value if known is None else known
    if kind in _CONTAINERS:
        return _clone_container(value, memo)
    if draws(value):
        memo[id(value)] = copied = copy.deepcopy(value)
        return copied
    if isinstance(value, torch.jit.ScriptModule):
        return _clone_scripted(value, memo)
    if isinstance(value, nn.Module):
        return _clone_module(value, memo)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, _clone(value.__self__, memo))
    if type(value) is functools.partial:
        arguments = [_clone(argument, memo) for argument in value.args]
        return functools.partial(_clone(value.func, memo), *arguments, **value.keywords)
    if type(value) is SimpleNamespace:
        memo[id(value)] = new = SimpleNamespace()
        new.__dict__.update({name: _clone(item, memo) for name, item in vars(value).items()})
        return new
    if _is_ordered_dict(value):
        return _clone_container(value, memo)
    if type(value) is tuple and any(_holds_state(item) for item in value):
        return tuple(_clone(item, memo) for item in value)
    return value


def _clone_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    own_way = getattr(type(module), "__fxamp_clone__", None)
    if own_way is not None:
        return own_way(module, memo, _clone)  # type: ignore[no-any-return]
    if is_compiled(module):
        memo[id(module)] = compiled = type(module)(_clone(module._orig_mod, memo), module.dynamo_ctx)
        return compiled
    new: nn.Module = object.__new__(type(module))
    memo[id(module)] = new
    new.__dict__.update({name: _clone(value, memo) for name, value in module.__dict__.items()})
    return new


def is_compiled(module: Any) -> bool:
    """Whether ``torch.compile`` made a module of another one."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in getattr(module, "_modules", ())


def _clone_scripted(module: Any, memo: dict[int, Any]) -> nn.Module:
    """A scripted module with attributes of its own, such as the mode; its tensors are shared."""
    new: nn.Module = wrap_cpp_module(_clone_cpp(module._c))  # type: ignore[no-untyped-call]
    memo.update({id(old): copied for old, copied in zip(module.modules(), new.modules(), strict=True)})
    for name, value in module.__dict__.items():  # such as __len__ of a container
        if name not in new.__dict__ and not isinstance(value, torch._C.ScriptMethod):
            new.__dict__[name] = _clone(value, memo)
    return new


def _clone_cpp(module: Any) -> Any:
    new = module.__copy__()
    for name, child in torch._C.ModuleDict(module).items():
        new.setattr(name, _clone_cpp(child))
    return new


def _clone_container(value: Any, memo: dict[int, Any]) -> Any:
    new = type(value)()
    memo[id(value)] = new
    if not value:
        return new
    if isinstance(value, dict):
        new.update({key: _clone(item, memo) for key, item in value.items()})
    elif isinstance(value, list):
        new.extend(_clone(item, memo) for item in value)
    else:
        new.update(value)
    return new


def _is_ordered_dict(value: Any) -> bool:
    return type(value).__name__ == "OrderedDict" and isinstance(value, dict)


def _holds_state(value: Any) -> bool:
    return isinstance(value, nn.Module | dict | list | set)
