"""What does a trace call, and with which values?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.fx.proxy import TraceError

from fxamp.capture.containers import Contents
from fxamp.capture.failures import name_of
from fxamp.capture.signature import CallSignature, Layout
from fxamp.errors import CaptureError

__all__ = ["Entry"]


class Entry:
    """Calls the model, then the loss, with proxies laid out as a layout says."""

    def __init__(self, signature: CallSignature, layout: Layout, model: Any, loss: Any) -> None:
        self._signature, self._layout, self.model, self._loss = signature, layout, model, loss

    def names(self) -> list[str]:
        names: list[str] = []
        for slot in self._layout:
            if slot.kind in ("value", "object"):
                names.append(slot.name)
            elif slot.kind == "tree":
                names.extend(f"{slot.name}_{i}" for i in range(slot.detail.count))
        return names

    def arguments(self, *stand_ins: Any) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        """What the model is called with, positional and by keyword, and the loss by keyword."""
        rest: Iterator[Any] = iter(stand_ins)
        values: dict[str, Any] = {}
        for slot in self._layout:
            if slot.kind == "constant":
                values[slot.name] = slot.detail
            elif slot.kind == "tree":
                values[slot.name] = slot.detail.built(rest)
            else:
                values[slot.name] = next(rest)
        return self._signature.split(values)

    def plainly(self, args: tuple[Any, ...], kwargs: dict[str, Any], loss_kwargs: dict[str, Any]) -> Any:
        """The call itself, for Dynamo."""
        output = self.model(*args, **kwargs)
        return output if self._loss is None else (self._loss(output, **loss_kwargs), output)

    def __call__(self, *proxies: Any) -> Any:
        args, kwargs, loss_kwargs = self.arguments(*proxies)
        given = Contents(args, kwargs)
        output = self.model(*args, **kwargs)
        if (written := given.gained()) is not None:
            raise TraceError(f"puts something into the {type(written).__name__} it is given, which a graph would not")
        if self._loss is None:
            return output
        loss = self._loss(output, **loss_kwargs)
        if not isinstance(loss, fx.Proxy):
            raise CaptureError(
                f"the loss {name_of(self._loss)} returns a {type(loss).__name__}: expected one tensor",
                hint="return the sum of its parts; the model's output may carry the rest",
            )
        return loss, output
