"""Which scale to start with? What float16 would lose of the gradients at each.

The graph is run in float32 on some batches, and the gradients that float16 would hold are counted by their exponent:
those of values that the plan has in float16, and those of its casts to float16.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from tabulate import tabulate
from torch import fx, nn

from fxamp.errors import FxampError
from fxamp.plan import PrecisionPlan, tensors_in
from fxamp.scaling.checks import MAX_SCALE, check_loss
from fxamp.scaling.search import untouched
from fxamp.scaling.trail import tensors_of

__all__ = ["Advice", "advise"]

# A magnitude f * 2**e with f in [0.5, 1) is counted under e. Times 2**k it is less than half of the smallest number
# of float16, and becomes zero, up to e + k = -25; it has fewer bits up to e + k = -14; it is infinite from e + k = 17.
_ZERO: Final = -25
_SUBNORMAL: Final = -14
_LARGEST: Final = 16
_HEADROOM: Final = 3  # bits above the largest gradient, for batches that are not among these
_LOWEST: Final = -160  # float32 begins at 2**-149
_EXPONENTS: Final = range(_LOWEST, 140)
_MAX_BITS: Final = int(math.log2(MAX_SCALE))


@dataclass(frozen=True)
class Advice:
    """What float16 would lose of the gradients of some batches, at each scale; ``print`` it.

    Args:
        init_scale: the largest power of two, up to 2**24, at which the largest gradient has room for three bits more:
            what to start with, ``GradScaler(init_scale=advice.init_scale)``.
        counts: how many gradients there were, by exponent: ``counts[e]`` of magnitudes from ``2**(e-1)`` to ``2**e``.

    Example::

        >>> advice = Advice.of({-30: 1, -10: 3})
        >>> advice.init_scale, advice.lost(1.0), advice.lost(2.0**10)
        (8388608.0, 0.25, 0.0)
    """

    init_scale: float
    counts: dict[int, int]

    @staticmethod
    def of(counts: dict[int, int]) -> Advice:
        """The advice that follows from such counts, at least one."""
        room = _LARGEST - _HEADROOM - max(counts)
        return Advice(2.0 ** min(room, _MAX_BITS), counts)

    def lost(self, scale: float) -> float:
        """The share of the gradients that is zero in float16 at that scale, and was not in float32."""
        return self._share(scale, lambda e: e <= _ZERO)

    def rounded(self, scale: float) -> float:
        """The share that is subnormal in float16 at that scale, with fewer bits than float16 has."""
        return self._share(scale, lambda e: _ZERO < e <= _SUBNORMAL)

    def overflowing(self, scale: float) -> float:
        """The share that is infinite in float16 at that scale; any makes the step be skipped."""
        return self._share(scale, lambda e: e > _LARGEST)

    def _share(self, scale: float, counts: Callable[[int], bool]) -> float:
        bits = math.floor(math.log2(scale))
        return sum(n for e, n in self.counts.items() if counts(e + bits)) / sum(self.counts.values())

    def __str__(self) -> str:
        first = round(math.log2(self.init_scale))
        bits = sorted({first, *range(min(0, first), _MAX_BITS + 1, 4)})
        rows = [(f"2**{k}", *map(_percent, self._at(2.0**k)), "<- start" if k == first else "") for k in bits]
        table = tabulate(rows, ("scale", "becomes zero", "loses bits", "overflows", ""), disable_numparse=True)
        total, low, high = sum(self.counts.values()), min(self.counts), max(self.counts)
        title = f"{total} gradients that float16 is to hold, from 2**{low - 1} to 2**{high}; shares at each scale"
        return f"{title}\n\n{table}"

    def _at(self, scale: float) -> tuple[float, float, float]:
        return self.lost(scale), self.rounded(scale), self.overflowing(scale)


def advise(amp: Any, batches: Iterable[Any], loss: Callable[[Any, Any], torch.Tensor] | None = None) -> Advice:
    """See ``GradScaler.advise``.

    Raises:
        FxampError: when ``amp`` is no module converted to float16, there is no batch, or no gradient in float16.
    """
    conversion: Any = getattr(amp, "_conversion", None)
    if conversion is None or conversion.policy.dtype != torch.float16:
        raise FxampError(
            f"cannot advise on {type(amp).__name__}: expected a module that was converted to float16",
            hint="amp = fxamp.convert(model, loss=..., dtype=torch.float16)",
        )
    found = _Found()
    for batch in batches:
        _measure(amp, batch, loss, found)
    if found.batches == 0:
        raise FxampError("there is no batch to measure", hint="pass a list of them, or itertools.islice(loader, 4)")
    counts = {e: n for e, n in zip(_EXPONENTS, found.counts.tolist(), strict=True) if n}
    if not counts:
        raise FxampError("no gradient would be in float16", hint="print(amp.report()) shows what runs in float16")
    return Advice.of(counts)


class _Found:
    """The counts so far."""

    def __init__(self) -> None:
        self.batches = 0
        self.counts = torch.zeros(len(_EXPONENTS), dtype=torch.int64)

    def add(self, gradient: torch.Tensor) -> None:
        values = gradient.detach().to(torch.float32)
        values = values[values.isfinite() & (values != 0)]
        exponents = torch.frexp(values).exponent.long() - _LOWEST
        self.counts += torch.bincount(exponents, minlength=len(_EXPONENTS)).cpu()


def _measure(amp: Any, batch: Any, loss: Callable[[Any, Any], torch.Tensor] | None, found: _Found) -> None:
    """Adds the gradients of a batch; the module, its gradients and the random generators are then as before."""
    run = amp._run
    amp.__dict__["_run"] = partial(_run_in_float32, run, amp._root, found)
    try:
        with untouched(amp._root), torch.enable_grad():
            inputs = batch if isinstance(batch, tuple | list) else (batch,)
            value = loss(amp, batch) if loss is not None else amp(*inputs)
            if loss is None and amp._conversion.program.has_loss:
                value = value[0]
            check_loss(value)
            leaves = [parameter for parameter in amp.parameters() if parameter.requires_grad]
            torch.autograd.grad(value, leaves, allow_unused=True)
    finally:
        del amp.__dict__["_run"]
    found.batches += 1


def _run_in_float32(
    run: Callable[..., Any], root: nn.Module, found: _Found, variant: Any, values: Sequence[Any]
) -> Any:
    observed = _Observed(root, variant.traced.graph, variant.plan, found)
    return run(replace(variant, function=lambda _, *values: observed.run(*values)), values)


class _Observed(fx.Interpreter):
    """Runs a graph without casts, and asks for the gradients where the plan has float16."""

    def __init__(self, root: nn.Module, graph: fx.Graph, plan: PrecisionPlan, found: _Found) -> None:
        super().__init__(root, graph=graph)
        self._plan = plan
        self._add = found.add

    def run_node(self, n: fx.Node) -> Any:
        decision = self._plan[n.name]
        low = {cast.slot for cast in decision.casts if cast.dtype == torch.float16}
        slots = itertools.count()
        env = self.env

        def argument(node: fx.Node) -> Any:
            value = env[node]
            if next(slots) not in low or not isinstance(value, torch.Tensor) or not value.requires_grad:
                return value
            return self._noted(value.view_as(value))  # the gradient of this use alone

        args, kwargs = fx.map_arg(n.args, argument), fx.map_arg(n.kwargs, argument)
        result = getattr(self, n.op)(n.target, args, kwargs)
        if any(value.dtype == torch.float16 for value in tensors_in(decision.output)):
            for tensor in tensors_of(result):
                if tensor.grad_fn is not None:
                    self._noted(tensor)
        return result

    def _noted(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor.register_hook(self._add)  # type: ignore[no-untyped-call]
        return tensor


def _percent(share: float) -> str:
    return "0" if share == 0 else "<0.01%" if share < 1e-4 else f"{100 * share:.2f}%"
