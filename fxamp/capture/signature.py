"""How do the arguments of a call reach the graph?

A graph has placeholders; a Python signature has defaults, ``*args`` and keywords. A *layout* says which
arguments of a call are placeholders of a graph and which are constants baked into it: required ones
are placeholders, an optional one that was not given stays its default. Two calls with the same layout
share a graph. With a loss, one call carries the arguments of both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fxamp.capture.calls import calls_itself
from fxamp.capture.failures import name_of as _name
from fxamp.capture.trees import Tree, is_constant
from fxamp.errors import CaptureError

__all__ = ["CallSignature", "Layout", "Slot"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Slot(NamedTuple):
    """One argument of a layout.

    ``kind`` is "value" (a tensor or number), "object" (one of a class that nothing is known of), "tree" (its leaves
    are placeholders) or "constant".
    """

    name: str
    kind: str
    detail: Any = None  # the constant, or the tree


Layout = tuple[Slot, ...]


@dataclass(frozen=True)
class CallSignature:
    """The combined signature of a model and, optionally, its loss.

    ``signature`` is what the user sees; ``owners`` says for each parameter whether it goes to the
    "model" or the "loss", and under which name.
    """

    signature: inspect.Signature
    owners: Mapping[str, tuple[str, str]]

    def __post_init__(self) -> None:
        # Asked at every call that is not plain; nothing of it changes.
        parameters = self.signature.parameters.values()
        named = all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
        places = {p.name: i for i, p in enumerate(parameters) if p.kind in _POSITIONAL}
        self.__dict__["_base"] = {slot.name: slot for slot in self.base_layout()}
        self.__dict__["_named"] = tuple(parameters) if named else None
        self.__dict__["_places"] = places

    @staticmethod
    def of(model: Callable[..., Any], loss: Callable[..., Any] | None) -> CallSignature:
        """The signature of ``model``, followed by the required and then the optional arguments of ``loss``."""
        ours = _parameters(model)
        owners = {parameter.name: ("model", parameter.name) for parameter in ours}
        if loss is None:
            return CallSignature(inspect.Signature(ours), owners)
        theirs = _loss_parameters(loss)
        merged = [p for p in ours if p.kind in _POSITIONAL and p.default is p.empty]
        stars = [p for p in ours if p.kind is p.VAR_POSITIONAL]
        for parameter in theirs:
            if parameter.default is not parameter.empty:
                continue
            name = parameter.name if parameter.name not in owners else f"loss_{parameter.name}"
            owners[name] = ("loss", parameter.name)
            merged.append(parameter.replace(name=name, kind=parameter.POSITIONAL_OR_KEYWORD))
        merged = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in merged]
        optional = [p for p in ours if p.default is not p.empty or p.kind is p.KEYWORD_ONLY]
        for parameter in theirs:
            if parameter.default is not parameter.empty and parameter.name not in owners:
                owners[parameter.name] = ("loss", parameter.name)
                optional.append(parameter)
        merged += stars + [p.replace(kind=p.KEYWORD_ONLY) for p in optional]
        merged += [p for p in ours if p.kind is p.VAR_KEYWORD]
        return CallSignature(inspect.Signature(merged), owners)

    @property
    def required(self) -> tuple[str, ...]:
        """The names of the positional parameters that have no default."""
        parameters = self.signature.parameters.values()
        return tuple(p.name for p in parameters if p.kind in _POSITIONAL and p.default is p.empty)

    @property
    def starred(self) -> bool:
        """Whether the model takes ``*args``."""
        return any(p.kind is p.VAR_POSITIONAL for p in self.signature.parameters.values())

    def spelled_examples(self) -> str:
        """Example inputs as a user would write them."""
        needed = [p.name for p in self.signature.parameters.values() if p.kind in _POSITIONAL and p.default is p.empty]
        if not needed and (optional := next(iter(self.signature.parameters.values()), None)) is not None:
            starred = optional.kind is optional.VAR_POSITIONAL
            return "(x,)" if starred else f"((), {{{optional.name!r}: ...}})".replace("'", '"')
        return f"({needed[0]},)" if len(needed) == 1 else f"({', '.join(needed)})"

    def base_layout(self, stars: int = 1) -> Layout:
        """The layout of a call that gives the required arguments only, and ``stars`` values for ``*args``."""
        slots = []
        for p in self.signature.parameters.values():
            if p.kind is p.VAR_POSITIONAL:
                slots.append(Slot(p.name, "tree", Tree.of((0,) * stars)[0]))
            elif p.default is not p.empty:
                slots.append(Slot(p.name, "constant", p.default))
            elif p.kind is not p.VAR_KEYWORD:
                slots.append(Slot(p.name, "value"))
        return tuple(slots)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Argument names to values, defaults included; ``**kwargs`` of the model are spread out.

        Raises:
            TypeError: as the model itself would, when the arguments do not fit.
        """
        simply = self._bound_simply(args, kwargs) if self.__dict__["_named"] is not None else None
        if simply is not None:
            return simply
        bound = self.signature.bind(*self._loss_last(args, kwargs), **kwargs)
        bound.apply_defaults()
        values = dict(bound.arguments)
        for p in self.signature.parameters.values():
            if p.kind is p.VAR_KEYWORD:
                values.update(values.pop(p.name))
        return values

    def _bound_simply(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """As ``inspect`` binds them, for a signature without stars; None when the arguments do not fit."""
        values: dict[str, Any] = {}
        used = 0
        for i, p in enumerate(self.__dict__["_named"]):
            if i < len(args) and p.name in self.__dict__["_places"] and p.name not in kwargs:
                values[p.name] = args[i]
            elif p.name in kwargs and i >= len(args) and p.kind is not p.POSITIONAL_ONLY:
                values[p.name] = kwargs[p.name]
                used += 1
            elif i >= len(args) and p.default is not p.empty:
                values[p.name] = p.default
            else:
                return None
        return values if used == len(kwargs) and len(args) <= len(values) else None

    def _loss_last(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """``*inputs, *loss_args`` as the user writes them, in the order of the signature."""
        if not self.starred:
            return args
        required = self.required
        loss = [name for name in required if self.owners[name][0] == "loss" and name not in kwargs]
        split = len(args) - len(loss)
        if not loss or split < 0:
            return args
        leading = len(required) - len(loss)
        return args[:leading] + args[split:] + args[leading:split]

    def laid_out(self, values: Mapping[str, Any], *, bake_numbers: bool = False) -> tuple[Layout, list[Any]]:
        """The layout that these argument values ask for, and the values of its placeholders."""
        base = self.__dict__["_base"]
        found = [_slot(name, value, base.get(name), bake_numbers) for name, value in values.items()]
        return tuple([slot for slot, _ in found]), [leaf for _, leaves in found for leaf in leaves]

    def split(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        """Argument values as (positional of the model, keywords of the model, keywords of the loss)."""
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        loss: dict[str, Any] = {}
        parameters = self.signature.parameters
        for name, value in values.items():
            owner, original = self.owners.get(name, ("model", name))
            kind = parameters[name].kind if name in parameters else inspect.Parameter.VAR_KEYWORD
            if owner == "loss":
                loss[original] = value
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                positional.extend(value)
            elif kind is inspect.Parameter.POSITIONAL_ONLY or (self.starred and kind in _POSITIONAL):
                positional.append(value)
            else:
                keywords[original] = value
        return tuple(positional), keywords, loss


def values_of(layout: Layout, values: Mapping[str, Any]) -> list[Any]:
    """The values of a layout's placeholders, in order."""
    flat: list[Any] = []
    for slot in layout:
        if slot.kind in ("value", "object"):
            flat.append(values[slot.name])
        elif slot.kind == "tree":
            flat.extend(slot.detail.leaves(values[slot.name]))
    return flat


def _slot(name: str, value: Any, base: Slot | None, bake_numbers: bool) -> tuple[Slot, list[Any]]:
    """The slot of an argument, and the values of its placeholders."""
    if base is not None and base.kind == "constant" and _same(value, base.detail):
        return base, []
    if isinstance(value, torch.Tensor):
        return Slot(name, "value"), [value]
    tree, leaves = Tree.of(value)
    required = base is not None and base.kind != "constant"
    if tree is not None and _has_values(leaves, numbers=required):
        tree, leaves = Tree.of(value, numbers=True) if bake_numbers else (tree, leaves)
        return Slot(name, "tree", tree), leaves
    if isinstance(value, int | float) and not isinstance(value, bool) and not bake_numbers:
        return Slot(name, "value"), [value]
    if required and tree is None and not is_constant(value, numbers=True):
        return Slot(name, "object"), [value]
    return Slot(name, "constant", value), []


def _has_values(leaves: list[Any], *, numbers: bool) -> bool:
    """Whether a container is one of tensors, or of numbers where these count, or holds nothing to say what it is."""
    kinds = torch.Tensor | int | float if numbers else torch.Tensor
    return not leaves or any(isinstance(leaf, kinds) for leaf in leaves)


def _same(value: Any, default: Any) -> bool:
    if value is default:
        return True
    plain = (bool, int, float, str, tuple)
    return type(value) is type(default) and isinstance(value, plain) and bool(value == default)


def _loss_parameters(loss: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = _parameters(loss)
    if not parameters:
        raise CaptureError(
            f"the loss {_name(loss)} takes no argument: expected (output, *loss_args)",
            hint="write loss=lambda output, target: ...",
        )
    return [p for p in parameters[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters, without annotations: these may not pickle, and nothing here reads them."""
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        if isinstance(function, nn.Module) and calls_itself(function) and not _hands_on(function.__call__):
            target = function.__call__
        found = inspect.signature(target).parameters.values()
        return [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found]
    except (TypeError, ValueError) as error:
        raise CaptureError(
            f"the signature of {_name(function)} is not known to Python",
            hint=f"wrap it in a function of your own: lambda x: {_name(function)}(x)",
        ) from error


def _hands_on(function: Callable[..., Any]) -> bool:
    """Whether a function takes whatever comes, which says nothing."""
    parameters = inspect.signature(function).parameters.values()
    return all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
