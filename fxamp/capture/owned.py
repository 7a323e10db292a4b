"""What did a call that Dynamo captured set, of what belongs to modules?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.fx.proxy import TraceError

from fxamp.capture.members import store_of

__all__ = ["OwnTensors", "put_back", "set_to_stand_ins"]


class OwnTensors:
    """What belongs to the parameters and buffers of modules beside their data, and cannot be set in a graph."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        own = (tensor for m in modules for tensor in (*m.parameters(recurse=False), *m.buffers(recurse=False)))
        self._before = [(tensor, tensor.detach(), tensor.requires_grad, tensor.grad) for tensor in own]

    def check(self) -> None:
        """Puts it back.

        Raises:
            TraceError: when some of it was set.
        """
        changed = ""
        for tensor, data, requires_grad, grad in self._before:
            if isinstance(tensor.data, FakeTensor) or tensor.data_ptr() != data.data_ptr():
                tensor.data, changed = data, "data"
            if tensor.requires_grad is not requires_grad:
                tensor.requires_grad_(requires_grad)
                changed = "requires_grad"
            if tensor.is_leaf and tensor.grad is not grad:
                tensor.grad, changed = grad, "grad"
        if changed:
            raise TraceError(f"sets the attribute '{changed}' of a tensor")


def set_to_stand_ins(module: nn.Module) -> Iterator[tuple[str, FakeTensor]]:
    """The attributes that the call set to a tensor of its own."""
    spaces = [module.__dict__, *(module.__dict__[table] for table in ("_parameters", "_buffers"))]
    for name, value in [item for space in spaces for item in space.items()]:
        if isinstance(value, FakeTensor):
            yield name, value


def put_back(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Gives a module a tensor back under a name that it had it under."""
    store = store_of(module, name)
    space = module.__dict__ if store in (None, "__dict__") else module.__dict__[str(store)]
    space[name] = value
