"""What does a callable reach: through its variables, its attributes and the containers in these?"""

from __future__ import annotations

import collections
import dis
import functools
import gc
import itertools
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import torch
from torch import fx, nn

from fxamp.capture.source import is_library

__all__ = ["reachable", "variables"]

_MOST: Final = 20_000
_LONGEST: Final = 1_000  # what is longer holds data
_SEQUENCES: Final = (list, tuple, set, frozenset, collections.deque)
_PLAIN: Final = (dict, collections.OrderedDict)
_ENDS: Final = (nn.Module, torch.Tensor, fx.Proxy, fx.Node, ModuleType, str, bytes, int, float, complex)


def reachable(roots: Mapping[str, Any], *, variables_of_modules: bool = True) -> Iterator[tuple[str, Any]]:
    """Path and value of what can be reached, the nearest first. Modules and tensors are ends.

    Args:
        roots: where to begin, by name; "" is left out of the paths.
        variables_of_modules: also the global variables that functions use.
    """
    queue = collections.deque(roots.items())
    seen: set[int] = set()
    while queue and len(seen) < _MOST:
        path, value = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield path, value
        if not isinstance(value, _ENDS):
            parts = _parts(value, variables_of_modules)
            queue.extend((f"{path}.{name}".strip("."), part) for name, part in parts.items() if id(part) not in seen)


def variables(function: FunctionType, *, of_module: bool = True) -> dict[str, Any]:
    """The variables that a function has from outside, by name; ``of_module``: the global ones too."""
    found: dict[str, Any] = {}
    if of_module and not is_library(function.__code__.co_filename):
        names = _global_names(function.__code__)
        found.update({name: function.__globals__[name] for name in names if name in function.__globals__})
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue  # not set yet
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    found.update(zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True))
    return found | (function.__kwdefaults__ or {})


@functools.lru_cache(maxsize=256)
def _global_names(code: CodeType) -> tuple[str, ...]:
    """The global names that code loads, that of functions inside included, in their order."""
    names = [str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.extend(_global_names(constant))
    return tuple(dict.fromkeys(names))


def _parts(value: Any, variables_of_modules: bool) -> dict[str, Any]:
    if type(value) in _PLAIN:  # the most of them, and most of these are empty
        kept = {_name(key): item for key, item in itertools.islice(value.items(), _LONGEST)} if value else {}
        return {"": type(value), **kept, **getattr(value, "__dict__", {})}
    if isinstance(value, FunctionType):
        return variables(value, of_module=variables_of_modules)
    if isinstance(value, MethodType):
        return {"": value.__self__, **({"__func__": value.__func__} if variables_of_modules else {})}
    if isinstance(value, type):
        return dict(vars(value)) if variables_of_modules and _is_users(value) else {}
    if isinstance(value, functools.partial):
        return {"": value.func, **dict(_numbered(value.args)), **value.keywords}
    found = dict(_numbered(value)) if isinstance(value, _SEQUENCES) else {}
    if isinstance(value, Mapping):
        found = {_name(key): item for key, item in itertools.islice(value.items(), _LONGEST)}
    if not found and not hasattr(value, "__dict__"):
        found = dict(_numbered(gc.get_referents(value)))  # slots, the view of a dict, and what else C keeps
    return {"": type(value), **found, **getattr(value, "__dict__", {})}


def _is_users(kind: type) -> bool:
    """Whether a class may hold what is the user's: one of torch's or of Python's own does not."""
    return kind.__module__.partition(".")[0] not in {"torch", "numpy", *sys.stdlib_module_names}


def _numbered(values: Any) -> Iterator[tuple[str, Any]]:
    return ((str(i), value) for i, value in enumerate(itertools.islice(values, _LONGEST)))


def _name(key: Any) -> str:
    return str(key).replace(".", "_")
