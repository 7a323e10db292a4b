"""``torch.compile(model, backend="fxamp")``: every graph that Dynamo makes goes through the same pass.

A compiled call runs under ``torch.autocast``. So what Dynamo cannot put into a graph means what it would mean under
autocast, and the dtypes that a model asks for while it is captured are those that it will find.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import fx

from fxamp.compiling.graphs import converted, device_type_of, module_of, title_of
from fxamp.compiling.running import around_a_call, inner_backend, without_autocast
from fxamp.compiling.surrounding import backend_of, surround_calls
from fxamp.errors import FxampError, PolicyError, describe, nearest
from fxamp.insight import Report, report_of
from fxamp.plan.trials import AutocastFailsError
from fxamp.policy import DEVICE_TYPES, Policy
from fxamp.runtime.asked import Asked

__all__ = ["Backend", "backend", "for_name", "hand_on_calls", "reports"]

_OPTIONS: Final = ("policy", "dtype", "device_type", "inner")


@dataclass(frozen=True)
class Backend:
    """What ``torch.compile`` calls with each graph; made by ``fxamp.backend``.

    Two that were asked for the same are equal, so that torch.compile shares what it compiled for them.
    """

    policy: Policy
    dtype: torch.dtype | None = None
    device_type: str | None = None
    inner: str | Callable[..., Any] = "eager"
    mode: str | None = None
    made: list[Report] = field(default_factory=list, compare=False, repr=False)

    __name__ = "fxamp"

    def configured(self, *, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Backend:
        """The backend for one ``torch.compile``, with what it was given beside the backend.

        Raises:
            PolicyError: for an option that does not exist, or a mode that nobody would heed.
        """
        for name in options or {}:
            if name not in _OPTIONS:
                raise PolicyError(
                    f"unknown option {name!r} of the backend: expected {', '.join(_OPTIONS)}",
                    hint=f"write {nearest(name, _OPTIONS) or 'policy'!r}",
                )
        given = {name: getattr(self, name) for name in _OPTIONS}
        new = backend(**{**given, **(options or {})})
        if mode is not None and new.inner != "inductor":
            raise PolicyError(
                f"mode={mode!r} is for Inductor, but the graphs run with {new.inner!r}",
                hint='write torch.compile(model, backend=fxamp.backend(inner="inductor"), mode=...)',
            )
        return replace(new, mode=mode)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        """The function that runs one graph."""
        if kwargs:
            return self.configured(**kwargs)(gm, example_inputs)
        run_by = inner_backend(self.inner, self.mode)
        policy = self.policy.resolved(self.device_type or device_type_of(example_inputs), self.dtype)
        if policy.name == "full":
            return run_by(gm, example_inputs)
        try:
            plan, graph = converted(gm, example_inputs, policy, eager=self.inner == "eager")
        except AutocastFailsError:
            return without_autocast(run_by(gm, example_inputs), str(policy.device_type))  # as it is, it may run
        self.made.append(report_of(f"{title_of(gm)}, graph {len(self.made)}", plan, graph, "Dynamo"))
        return without_autocast(run_by(module_of(gm, graph), example_inputs), str(policy.device_type))

    def around_a_call(self) -> AbstractContextManager[None]:
        """Autocast, and each weight cast once."""
        asked = self.device_type or self.policy.device_type
        present = [kind for kind in DEVICE_TYPES if kind == "cpu" or torch.cuda.is_available()]
        kinds = present if asked is None else [asked] if asked in present else []
        return around_a_call(kinds if self.policy.name != "full" else [], self.policy.dtype or self.dtype)


def backend(
    policy: str | Policy = "autocast",
    dtype: torch.dtype | None = None,
    device_type: str | None = None,
    inner: str | Callable[..., Any] = "eager",
) -> Backend:
    """A backend for ``torch.compile``; ``backend="fxamp"`` is ``backend=fxamp.backend()``.

    Args:
        policy: "autocast" (bitwise ``torch.autocast``), "fast", "full" (no casts), or a ``Policy``.
        dtype: ``torch.float16`` or ``torch.bfloat16``; default ``torch.get_autocast_dtype(device_type)``.
        device_type: whose rules to follow, "cuda" or "cpu"; default: for each graph, where its tensors are.
        inner: what runs the converted graphs: "eager", "inductor", or any other backend of ``torch.compile``.

    Raises:
        PolicyError: for an unknown policy, dtype, device type or inner backend.

    Example::

        >>> model = torch.nn.Linear(8, 4)
        >>> compiled = torch.compile(model, backend=backend(dtype=torch.bfloat16))
        >>> compiled(torch.zeros(2, 8)).dtype
        torch.bfloat16
    """
    asked = Asked.of(policy, device_type, dtype)
    if not callable(inner) and inner not in ("eager", *torch.compiler.list_backends(exclude_tags=())):
        known = torch.compiler.list_backends()
        raise PolicyError(
            f"unknown inner backend {inner!r}: expected 'eager' or one of {', '.join(known)}",
            hint=f"write inner={nearest(str(inner), (*known, 'eager')) or 'eager'!r}",
        )
    hand_on_calls()
    return Backend(asked.policy, dtype, device_type, inner)


def reports(compiled: Any) -> list[Report]:
    """The reports of the graphs of a compiled model or function so far, in the order they were compiled.

    Args:
        compiled: what ``torch.compile(model, backend="fxamp")`` gave. Its graphs come with its calls.

    Raises:
        FxampError: when it is not compiled with this backend.
    """
    found = backend_of(compiled)
    if not isinstance(found, Backend):
        raise FxampError(
            f"found {describe(compiled)}: expected what torch.compile made with the backend fxamp",
            hint='compiled = torch.compile(model, backend="fxamp")',
        )
    return list(found.made)


def for_name(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """What the name "fxamp" stands for among the backends of ``torch.compile``."""
    return backend()(gm, example_inputs, **kwargs)


def hand_on_calls() -> None:
    """Sees to it that torch.compile asks a backend of this kind what surrounds its calls."""
    surround_calls(_asked)


def _asked(found: Any) -> Backend | None:
    made = backend() if found is for_name else found
    return made if isinstance(made, Backend) else None
