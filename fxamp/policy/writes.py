"""Which of its arguments does a call write to?

Most calls that write say so in their name (``add_``) or by ``out=``; operators, the user's own among them, say so in
their schema. A few functions of torch write to an argument all the same, some only when another argument asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F

from fxamp.policy.spellings import given_argument

__all__ = ["may_write", "writes_of"]

# The arguments that are written, and the one that has to be given for that.
_SILENT: Final[Mapping[Any, tuple[tuple[str, ...], str]]] = {
    F.embedding: (("weight",), "max_norm"),
    F.embedding_bag: (("weight",), "max_norm"),
    F.batch_norm: (("running_mean", "running_var"), "training"),
    F.instance_norm: (("running_mean", "running_var"), "use_input_stats"),
}
# Their builtins, by place: these have no signature that Python could read.
_SILENT_BUILTINS: Final[Mapping[Any, tuple[int, ...]]] = {torch.batch_norm: (3, 4), torch.instance_norm: (3, 4)}


def writes_of(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments that a call writes to although its name does not say so; each may hold several tensors.

    Example::

        >>> writes_of(F.embedding, ("indices", "table"), {"max_norm": 1.0}), writes_of(F.embedding, ("i", "t"), {})
        (('table',), ())
    """
    return tuple(value for value in _written(target, args, kwargs) if value is not None)


def may_write(target: Any) -> bool:
    """Whether there are arguments with which a call writes to one of them, ``out=`` apart."""
    silent = callable(target) and (target in _SILENT_BUILTINS or target in _SILENT)
    return silent or any(True for _ in _marked(target))


def _written(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    yield kwargs.get("out")
    for argument, place in _marked(target):
        yield kwargs.get(argument, args[place] if place < len(args) else None)
    for place in _SILENT_BUILTINS.get(target, ()) if callable(target) else ():
        yield args[place] if place < len(args) else None
    names, condition = _SILENT.get(target, ((), "")) if callable(target) else ((), "")
    if names and given_argument(target, condition, args, kwargs) not in (None, False):
        yield from (given_argument(target, name, args, kwargs) for name in names)


def _marked(target: Any) -> Iterator[tuple[str, int]]:
    """Name and place of the arguments that an operator's schema marks as written."""
    if isinstance(target, torch._ops.OpOverload):
        overloads = [target]
    elif isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]  # type: ignore[no-untyped-call]
    else:
        return
    for overload in overloads:
        for place, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write and not argument.is_out:
                yield argument.name, place
