"""What is one call, how is it made in a dtype, and how much does it do?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fxamp.cost.spec import Spec
from fxamp.cost.surroundings import settings

__all__ = ["ATOMS", "Call"]

# Constants among arguments that are told apart by their text.
ATOMS: Final = (
    type(None),
    type(...),
    bool,
    int,
    float,
    complex,
    str,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
# On CPUs and GPUs alike, the time in which a byte is moved is that of about ten floating-point operations or more.
_OF_A_BYTE: Final = 10.0


@dataclass(frozen=True)
class Call:
    """One call of an operator, with specs in the place of tensors.

    Attributes:
        key: the ATen name.
        function: what to call, or the name of a method of the first argument.
        args: nested, with ``Spec``.
        kwargs: the same by name.
        training: whether the gradients of what asks for one are a part of it.
        settings: what is set for all calls, and changes how long they take.
    """

    key: str
    function: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool
    settings: str = field(default_factory=settings)

    @property
    def kind(self) -> str:
        """The same for calls of one operator, whatever their arguments."""
        return f"{self.key}/{'train' if self.training else 'infer'}{self.settings}"

    def text(self) -> str | None:
        """The same for calls that no measurement tells apart; None where an argument is none that can be written."""
        try:
            given = [_text(value) for value in self.args]
            named = [f"{name}={_text(value)}" for name, value in sorted(self.kwargs.items())]
        except _NotWritten:
            return None
        return f"{self.kind} {' '.join((*given, *named))}"

    def specs(self) -> list[Spec]:
        """The tensors among its arguments."""
        return list(_specs((self.args, self.kwargs)))

    def make(self, dtype: torch.dtype, generator: torch.Generator | None) -> Callable[[], Any]:
        """A function that makes the call in a dtype, on the device of the generator; without one, on ``meta``."""
        inputs: list[Tensor] = []

        def tensor(value: Any) -> Any:
            if not isinstance(value, Spec):
                return value
            made = value.make(dtype, generator)
            inputs.extend([made] if self.training and made.requires_grad else [])
            return made

        args, kwargs = map_aggregate((self.args, self.kwargs), tensor)
        forward = _bound(self.function, tuple(args), dict(kwargs))
        if not inputs:
            return forward
        given = [_gradient(output, generator) for output in _differentiable(forward())]

        def both() -> None:
            torch.autograd.grad(_differentiable(forward()), inputs, given, allow_unused=True)

        return both if given else forward

    def work(self) -> float:
        """How much it does, in floating-point operations; every byte that it moves counts as some.

        Told from its shapes. An operator that cannot be run without data counts for its arguments alone.
        """
        moved = sum(spec.nbytes() for spec in self.specs())
        counter = _Counter()
        try:
            run = self.make(torch.float32, None)
            with counter:
                run()
        except Exception:  # whatever a kernel does not like about shapes alone
            return moved * _OF_A_BYTE
        return counter.operations + (moved + counter.moved) * _OF_A_BYTE


class _NotWritten(Exception):
    """An argument has no text."""


def _text(value: Any) -> str:
    if isinstance(value, Spec):
        return value.text()
    if isinstance(value, tuple | list):
        return f"({' '.join(_text(item) for item in value)})"
    if isinstance(value, slice):
        return f"{_text(value.start)}:{_text(value.stop)}:{_text(value.step)}"
    if isinstance(value, ATOMS):
        return repr(value)
    raise _NotWritten


def _specs(value: Any) -> Iterator[Spec]:
    if isinstance(value, Spec):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _specs(item)


def _bound(function: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any]:
    if not isinstance(function, str):
        return lambda: function(*args, **kwargs)
    method, others = getattr(args[0], function), args[1:]
    return lambda: method(*others, **kwargs)


def _differentiable(output: Any) -> list[Tensor]:
    """The tensors of an output that a gradient can come back through."""
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    if isinstance(output, tuple | list):
        return [tensor for item in output for tensor in _differentiable(item)]
    return []


def _gradient(output: Tensor, generator: torch.Generator | None) -> Tensor:
    like = Spec(tuple(output.shape), output.dtype, strides=tuple(output.stride()), fixed=True)
    return like.make(output.dtype, generator)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what kernels do, as far as torch knows it of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0.0
        self.moved = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **kwargs, out_val=output)
        results = output if isinstance(output, tuple | list) else (output,)
        self.moved += sum(result.nbytes for result in results if isinstance(result, Tensor))
        return output
