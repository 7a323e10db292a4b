"""The casts of weights: how many calls do they take, and who keeps what they make?

The weights of a group are cast by one multi-tensor call, and so are their gradients in backward. In inference on a CPU
the memory of the low copies is used again by the next forward, when nothing else holds it; what is in it is written
anew each time, as a change through ``.data`` leaves no trace. ``hold_weights`` and graphs that share casts at run time
keep the copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Final, NamedTuple

import torch
from torch.autograd import forward_ad

from fxamp.dtypes import abbreviate
from fxamp.runtime.casts import soft_cast

__all__ = ["HELD", "Held", "WeightCasts", "cast_weight", "leaf_cast"]

Copies = dict[tuple[int, torch.dtype, int, int], tuple[torch.Tensor, int, torch.Tensor]]

Traced = list[tuple[torch.Tensor, tuple[torch.dtype, int, int], torch.Tensor]]


class Held(NamedTuple):
    """Low copies that outlive one cast: of weights and of other tensors, by identity and dtype.

    ``compiling`` is None, or has all of them in a forward that torch.compile traces: it knows no identity but ``is``.
    """

    weights: Copies
    others: Copies
    compiling: Traced | None = None


# One entry for each forward that is running and shares casts at run time.
HELD: list[Held] = []


def leaf_cast(value: Any, dtype: torch.dtype, epoch: int = -1, writes: int = 0) -> Any:
    """The cast of a value that may be a leaf of autograd, or autocast's kept copy of it.

    autocast keeps the low copy of a float32 leaf and casts anything else again; for a tensor without
    gradient the two are the same. A tensor that was written to since is cast again (``writes`` counts what the graph
    itself writes, which through ``.data`` leaves no trace), and so is one in another ``epoch``: autocast empties its
    cache when the outermost region ends.
    """
    if not isinstance(value, torch.Tensor) or not HELD or value.dtype != torch.float32:
        return soft_cast(value, dtype)
    compiling = HELD[-1].compiling
    if compiling is not None:
        return _kept_compiling(compiling, value, (dtype, epoch, writes)) if value.is_leaf else value.to(dtype)
    if (value.requires_grad and (not value.is_leaf or value._is_view())) or value.is_inference():
        return value.to(dtype)
    held = HELD[-1]
    copies = held.weights if isinstance(value, torch.nn.Parameter) else held.others
    return _kept(copies, [value], (dtype, epoch, writes))[0]


def cast_weight(weight: torch.Tensor, dtype: torch.dtype, epoch: int = -1, writes: int = 0) -> torch.Tensor:
    """The weight in the low dtype: cast now, or the copy that is held."""
    if HELD:
        return _held([weight], (dtype, epoch, writes))[0]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not weight.requires_grad:
        return weight.to(dtype)
    return _as_trained([weight], (weight.to(dtype),))[0]


@dataclass(frozen=True, eq=False)
class WeightCasts:
    """The casts of a group of weights, by one call; called with the weights, it gives their low copies.

    Gradients become ready together, when all of the group have theirs. Each is that of a cast on its own, bit by bit.

    Attributes:
        dtype: the low dtype.
        epoch: which outermost autocast region they are in.
        detached: nobody asks for the gradients of the low copies.
    """

    dtype: torch.dtype
    epoch: int = -1
    detached: bool = False
    _buffers: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def __name__(self) -> str:
        return f"cast_weights_{abbreviate(self.dtype)}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {}}

    def __call__(self, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if HELD:
            return _held(weights, (self.dtype, self.epoch, 0))
        if torch.compiler.is_compiling() or _one_by_one(weights):
            return tuple([weight.to(self.dtype) for weight in weights])
        if self.detached:
            with torch.no_grad():
                return _copied(weights, _like(weights, self.dtype))
        return _cast_together(weights, self.dtype, self._buffers)


def _held(weights: Sequence[torch.Tensor], key: tuple[torch.dtype, int, int]) -> tuple[torch.Tensor, ...]:
    compiling = HELD[-1].compiling
    if compiling is not None:
        return tuple([_kept_compiling(compiling, weight, key) for weight in weights])
    return _kept(HELD[-1].weights, weights, key)


def _kept(copies: Copies, values: Sequence[torch.Tensor], key: tuple[torch.dtype, int, int]) -> tuple[Any, ...]:
    stale = [value for value in values if not _is_kept(copies, value, key)]
    if stale:
        # With gradients, whatever the mode: a later use may be in another.
        with torch.inference_mode(False), torch.enable_grad():
            if len(stale) == 1 or _one_by_one(stale):
                low: Sequence[torch.Tensor] = [value.to(key[0]) for value in stale]
            else:
                low = _cast_together(stale, key[0], {})
        for value, made in zip(stale, low, strict=True):
            copies[id(value), *key] = (value, _version(value), made)
    return tuple([copies[id(value), *key][2] for value in values])


def _is_kept(copies: Copies, value: torch.Tensor, key: tuple[torch.dtype, int, int]) -> bool:
    kept = copies.get((id(value), *key))
    return kept is not None and kept[1] == _version(value)


def _version(value: torch.Tensor) -> int:
    return -1 if value.is_inference() else value._version


def _kept_compiling(copies: Traced, value: torch.Tensor, key: tuple[torch.dtype, int, int]) -> torch.Tensor:
    for known, made, low in copies:
        if known is value and made == key:
            return low
    with torch.enable_grad():
        low = value.to(key[0])
    copies.append((value, key, low))
    return low


# -- many at once --------------------------------------------------------------------------------------

_PLAIN: Final = frozenset({torch.Tensor, torch.nn.Parameter})
_DENSE: Final = frozenset({torch.strided})
_layout_of: Final = attrgetter("layout")
_TRACING: Final = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
    torch._C._TorchDispatchModeKey.PROXY,
)


def _one_by_one(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether something is on that has to see each cast: transforms of functions, tangents, other kinds of tensors."""
    return (
        not _PLAIN.issuperset(map(type, tensors))
        or not _DENSE.issuperset(map(_layout_of, tensors))
        or forward_ad._current_level >= 0
        or torch._C._functorch.maybe_current_level() is not None
        or (torch._C._len_torch_dispatch_stack() > 0 and any(map(torch._C._get_dispatch_mode, _TRACING)))
    )


def _cast_together(
    weights: Sequence[torch.Tensor], dtype: torch.dtype, buffers: dict[int, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The low copies: those with gradients by one call, and those without by another."""
    if not torch.is_grad_enabled():
        return _as_trained(weights, _copied(weights, [_buffer(buffers, i, w, dtype) for i, w in enumerate(weights)]))
    buffers.clear()  # kept over a backward they would add to what that takes at its most
    if all(map(_is_trained, weights)):
        return _Together.apply(dtype, *weights)  # type: ignore[no-any-return, no-untyped-call]
    made: dict[int, torch.Tensor] = {}
    trained = [i for i, weight in enumerate(weights) if _is_trained(weight)]
    made.update(zip(trained, _Together.apply(dtype, *[weights[i] for i in trained]), strict=True))  # type: ignore[no-untyped-call]
    others = [i for i in range(len(weights)) if i not in made]
    made.update((i, weights[i].to(dtype)) for i in others if weights[i].requires_grad)
    frozen = [weights[i] for i in others if i not in made]
    made.update(zip([i for i in others if i not in made], _copied(frozen, _like(frozen, dtype)), strict=True))
    return tuple([made[i] for i in range(len(weights))])


def _is_trained(weight: torch.Tensor) -> bool:
    """Whether its gradient comes with those of others: a hook would be called without one where only others have."""
    return weight.requires_grad and not weight._backward_hooks and not weight._post_accumulate_grad_hooks


def _like(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]


def _copied(tensors: Sequence[torch.Tensor], to: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The tensors in the memory of others, which stay what they are."""
    if tensors:
        torch._foreach_copy_(to, list(tensors))
    return tuple([tensor.detach() for tensor in to])


def _as_trained(weights: Sequence[torch.Tensor], low: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The low copies with the flags of their weights, as autocast has them: matmul goes by these, not by the mode."""
    if not torch.is_inference_mode_enabled() and torch._C._functorch.maybe_current_level() is None:
        for weight, tensor in zip(weights, low, strict=True):
            tensor.requires_grad_(weight.requires_grad)
    return low


def _buffer(buffers: dict[int, torch.Tensor], place: int, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a low copy; on a CPU, where new memory is dear, that of an earlier forward when nothing holds it."""
    found = buffers.pop(place, None)  # nobody else gets it meanwhile
    if found is None or not (found.shape == weight.shape and found.stride() == weight.stride() and _is_free(found)):
        with torch.inference_mode(False):
            found = torch.empty_like(weight, dtype=dtype, requires_grad=False)
    if weight.device.type == "cpu":
        buffers[place] = found
    return found


def _is_free(tensor: torch.Tensor) -> bool:
    """Whether no other tensor has its memory: neither a view, nor what autograd saved."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) <= 2  # the tensor, and ``storage``


class _Together(torch.autograd.Function):
    """Weights to their low copies, and gradients back, each by one call."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [weight.dtype for weight in weights]
        low = _like(weights, dtype)
        if low:
            torch._foreach_copy_(low, weights)
        return tuple(low)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        given = [g for g in gradients if g is not None]
        dtypes = [dtype for dtype, g in zip(ctx.dtypes, gradients, strict=True) if g is not None]
        if torch.is_grad_enabled() or _one_by_one(given):
            wide = [g.to(dtype) for g, dtype in zip(given, dtypes, strict=True)]
        else:
            wide = [torch.empty_like(g, dtype=dtype) for g, dtype in zip(given, dtypes, strict=True)]
            if wide:
                torch._foreach_copy_(wide, given)
        found = iter(wide)
        return (None, *[None if g is None else next(found) for g in gradients])
