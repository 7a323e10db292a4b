"""What does a forward leave outside of its modules?

In the variables of the files and classes it is written in, and in caches of functions, a traced value would stay after
the trace, and what an eager call leaves there a graph would not.
"""

from __future__ import annotations

import functools
import gc
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

__all__ = ["Outside", "is_random"]

_Cache = functools._lru_cache_wrapper
_NUMBERS: Final = (bool, int, float)


class Outside:
    """The variables of the classes and files that modules are written in, torch's left out, as they are now.

    Args:
        modules: what is traced.
        function: the function that is traced, when the model is one.
    """

    def __init__(self, modules: Iterable[nn.Module], function: Callable[..., Any] | None) -> None:
        self._owners = list(_owners(modules, function))
        self._before = [dict(_variables(owner)) for owner in self._owners]
        held = [value for before in self._before for value in before.values() if type(value) in (list, deque)]
        self._held = [(value, value.copy()) for value in held]
        self._counted = [
            (value, _numbers(value)) for before in self._before for value in before.values() if _is_dict(value)
        ]

    def restore(self) -> str:
        """Takes out everything that a trace left; what that was, or "" when it was nothing that an eager call keeps."""
        found = ""
        for value, copied in self._held:
            if len(value) != len(copied) or any(a is not b for a, b in zip(value, copied, strict=True)):
                found = "keeps something in a list of a global or class variable"
                value.clear()
                value.extend(copied)
        for value, numbers in self._counted:
            if any(_is_other(value.get(key, number), number) for key, number in numbers.items()):
                found = "counts in a dict of a global or class variable, which a graph would forget"
                value.update(numbers)
        for owner, before in zip(self._owners, self._before, strict=True):
            for name, value in list(_variables(owner).items()):
                if isinstance(value, _Cache):
                    found = found or _kept_in(value)
                    value.cache_clear()
                elif _is_new(value, before.get(name)):
                    _put_back(owner, name, before)
                    found = found or f"sets the global or class variable {name}, which a graph would forget"
                elif _emptied(value):
                    found = found or "keeps a traced value in a global or class variable"
        return found

    @contextmanager
    def answering(self, answers: Mapping[Callable[..., Any], Callable[..., Any]]) -> Iterator[None]:
        """Other answers to questions that are put to torch, under whatever names the files have imported them."""
        by_id = {id(question): answer for question, answer in answers.items()}
        spaces = (vars(torch), *(owner for owner in self._owners if isinstance(owner, dict)))
        found = [(space, name, value) for space in spaces for name, value in space.items() if id(value) in by_id]
        try:
            for space, name, question in found:
                space[name] = by_id[id(question)]
            yield
        finally:
            for space, name, question in found:
                space[name] = question


def _owners(modules: Iterable[nn.Module], function: Callable[..., Any] | None) -> Iterator[Any]:
    spaces = [getattr(inspect.unwrap(function), "__globals__", {})] if function is not None else []
    kinds = {kind for module in modules for kind in type(module).__mro__}
    for kind in kinds:
        if kind.__module__.partition(".")[0] not in ("torch", "builtins"):
            yield kind
            spaces.append(getattr(inspect.unwrap(vars(kind).get("forward", _owners)), "__globals__", {}))
    yield from {id(space): space for space in spaces}.values()


def _variables(owner: Any) -> Mapping[str, Any]:
    return owner if isinstance(owner, dict) else vars(owner)


def _is_dict(value: Any) -> bool:
    return type(value) is dict and not any(isinstance(key, str) and key.startswith("__") for key in value)


def _numbers(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """What a dict counts; it may fill up while a model runs first, as a cache does."""
    return {key: value for key, value in values.items() if type(value) in _NUMBERS}


def _is_new(value: Any, before: Any) -> bool:
    if isinstance(value, _NUMBERS) and isinstance(before, _NUMBERS):
        return _is_other(value, before)
    return value is not before and any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(value))


def _is_other(value: Any, before: Any) -> bool:
    return value is not before and bool(value != before)  # a NaN is not even equal to itself


def _put_back(owner: Any, name: str, before: Mapping[str, Any]) -> None:
    if isinstance(owner, dict):
        owner.update({name: before[name]}) if name in before else owner.pop(name)
    elif name in before:
        setattr(owner, name, before[name])
    else:
        delattr(owner, name)


def _emptied(value: Any) -> bool:
    """Takes traced values out of a dict; whether there were any."""
    traced = [key for key, item in value.items() if isinstance(item, fx.Proxy)] if type(value) is dict else []
    for key in traced:
        del value[key]
    return bool(traced)


def _kept_in(cache: Any) -> str:
    """What is wrong with a function's cache: it has a value that would not be the same when made again."""
    leaves = pytree.tree_leaves(list(_results(cache)))
    if any(isinstance(leaf, fx.Proxy) and not _is_constant(leaf.node) for leaf in leaves):
        return f"keeps a traced value in the cache of {cache.__name__}()"
    return ""


def _results(cache: Any) -> Iterator[Any]:
    """What a cache holds: one with a limit refers to it itself, one without has it in a dict."""
    for value in gc.get_referents(cache):
        if not isinstance(value, dict):
            yield value
        elif value is not vars(cache):
            yield from value.values()


def _is_constant(node: fx.Node) -> bool:
    """Whether a value is made of nothing, and not drawn at random."""
    if node.op not in ("call_function", "call_method") or is_random(node.target):
        return False
    return all(map(_is_constant, node.all_input_nodes))


@functools.cache
def is_random(target: Any) -> bool:
    """Whether an operator, a function or a method of this name, draws random numbers."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, name) for name in packet.overloads()]
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)
