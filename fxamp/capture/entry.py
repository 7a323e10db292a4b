"""What does a trace call, and with which values?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

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

    def __call__(self, *proxies: Any) -> Any:
        rest: Iterator[Any] = iter(proxies)
        values: dict[str, Any] = {}
        for slot in self._layout:
            if slot.kind == "constant":
                values[slot.name] = slot.detail
            elif slot.kind == "tree":
                values[slot.name] = slot.detail.built(rest)
            else:
                values[slot.name] = next(rest)
        args, kwargs, loss_kwargs = self._signature.split(values)
        output = self.model(*args, **kwargs)
        if self._loss is None:
            return output
        loss = self._loss(output, **loss_kwargs)
        if not isinstance(loss, fx.Proxy):
            raise CaptureError(
                f"the loss {name_of(self._loss)} returns a {type(loss).__name__}: expected one tensor",
                hint="return the sum of its parts; the model's output may carry the rest",
            )
        return loss, output
