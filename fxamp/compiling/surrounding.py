"""What surrounds every call of what torch.compile makes?"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["Surrounded", "backend_of", "surround_calls"]


class Surrounded(Protocol):
    """A backend that has something to do around each call."""

    def around_a_call(self) -> AbstractContextManager[Any]:
        """What surrounds one call."""


@functools.cache
def surround_calls(backend_of_ours: Callable[[Any], Any]) -> None:
    """Lets backends say what surrounds every call of what torch.compile makes with them.

    A backend is asked for graphs only. Dynamo knows a ``backend_ctx_ctor``, but torch.compile hides it, and Dynamo puts
    autocast back to where that had switched it.

    Args:
        backend_of_ours: the backend that counts for what torch.compile was given, or None.
    """
    from torch._dynamo import eval_frame

    original = torch._dynamo.optimize

    class Surrounding(eval_frame.OptimizeContext):
        fxamp: Surrounded

        def __call__(self, fn: Any) -> Any:
            made = super().__call__(fn)
            return _surrounded(made, self.fxamp) if inspect.isfunction(made) else made

    @functools.wraps(original)
    def optimize(*args: Any, **kwargs: Any) -> Any:
        asked: Any = kwargs.get("backend", args[0] if args else None)
        found = getattr(asked, "compiler_fn", asked)  # what torch.compile wrapped
        made = backend_of_ours(found)
        if made is None:
            return original(*args, **kwargs)
        if found is not asked:
            made = asked.compiler_fn = made.configured(**asked.kwargs)
            asked.kwargs = {}
        context = original(*args, **kwargs)
        if isinstance(context, eval_frame.OptimizeContext):  # torch.compile may be switched off
            context.__class__ = Surrounding
            context.fxamp = made  # type: ignore[attr-defined]
        return context

    torch._dynamo.optimize = optimize


def _surrounded(compiled: Callable[..., Any], made: Surrounded) -> Callable[..., Any]:
    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        with made.around_a_call():
            return compiled(*args, **kwargs)

    call.fxamp = made  # type: ignore[attr-defined]
    return call


def backend_of(compiled: Any) -> Any:
    """The backend of what torch.compile made; None when it is none that surrounds calls."""
    own = compiled._compiled_call_impl if isinstance(compiled, nn.Module) else None  # of model.compile()
    return getattr(own or getattr(compiled, "dynamo_ctx", compiled), "fxamp", None)
