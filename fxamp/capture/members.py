"""What does a module have under a name, whatever its class calls by the same name?

``getattr`` asks the class first: a submodule called ``type`` or ``graph`` is hidden there by a method. What a graph
reads is looked up where ``nn.Module`` keeps it.
"""

from __future__ import annotations

from typing import Any, Final

from torch import nn

__all__ = ["find", "member", "owns", "store_of"]

_STORES: Final = ("_parameters", "_buffers", "_modules")
_INHERITED: Final = frozenset(nn.Module().__dict__)


def store_of(module: nn.Module, name: str) -> str | None:
    """The attribute of the module whose dict has the name, or None when it is found in no other way than getattr."""
    for store in _STORES:
        kept = module.__dict__.get(store)
        if isinstance(kept, dict) and kept.get(name) is not None:
            return store
    return "__dict__" if name in module.__dict__ and name not in _INHERITED else None


def owns(module: nn.Module, name: str) -> bool:
    """Whether the module itself, and not its class, has the name."""
    return store_of(module, name) is not None


def member(module: nn.Module, name: str) -> Any:
    """The parameter, buffer, submodule or plain attribute of a module.

    Raises:
        AttributeError: when there is none.
    """
    store = store_of(module, name)
    return getattr(module, name) if store is None else getattr(module, store)[name]


def find(root: nn.Module, path: str) -> Any:
    """What a module tree has under a path with dots; the root itself under the empty one.

    Raises:
        AttributeError: when there is nothing.
    """
    found: Any = root
    for name in path.split(".") if path else ():
        found = member(found, name)
    return found
