"""Which autocast and grad-mode regions was each call made in?

Tracing runs the user's ``with torch.autocast(...)`` as Python, and plain torch.fx forgets it. While a
model is traced, ``__enter__`` and ``__exit__`` of the context managers are patched: an autocast region
becomes an entry of a stack that every node is stamped with; a grad-mode region becomes nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

import torch
from torch import fx
from torch.fx.proxy import TraceError

from fxamp.capture.calls import enter_inference_mode, exit_inference_mode

# Themselves; what a model calls under these names is another one while it is traced.
_is_grad_enabled, _clear_autocast_cache = torch.is_grad_enabled, torch.clear_autocast_cache

_DEVICES: Final = ("cpu", "cuda")

__all__ = ["AutocastState", "Region", "RegionRecorder", "Switched", "autocast_as", "is_device_type", "state_of"]


@dataclass(frozen=True, slots=True)
class Region:
    """One ``with torch.autocast(...)`` of the user's, as it was entered.

    ``index`` counts the regions of one trace, so that a region entered twice is two regions.
    """

    index: int
    device_type: str
    dtype: torch.dtype
    enabled: bool
    cache_enabled: bool


@dataclass(frozen=True, slots=True)
class AutocastState:
    """What autocast would do for one device type at one place of the program.

    ``epoch`` tells cast caches apart: autocast empties its cache when the outermost region ends.
    """

    dtype: torch.dtype
    enabled: bool
    cache_enabled: bool = True
    epoch: int = -1


def state_of(regions: tuple[Region, ...], device_type: str, ambient: AutocastState) -> AutocastState:
    """The autocast state inside ``regions`` (outermost first), entered under the state ``ambient``."""
    state = ambient
    for region in regions:
        if region.device_type == device_type:
            state = AutocastState(region.dtype, region.enabled, region.cache_enabled)
        else:
            state = AutocastState(state.dtype, state.enabled, region.cache_enabled)
    epoch = regions[0].index if regions and not ambient.enabled else -1
    return AutocastState(state.dtype, state.enabled, state.cache_enabled, epoch)


@contextmanager
def autocast_as(device_type: str, dtype: torch.dtype, *, enabled: bool) -> Iterator[None]:
    """The thread's autocast state as given until the block ends; torch.autocast would refuse "cuda" without a GPU."""
    # Not by the names that a model would use: whether it asks is noted while it is traced.
    before = torch._C.is_autocast_enabled(device_type), torch._C.get_autocast_dtype(device_type)
    torch._C.set_autocast_enabled(device_type, enabled)
    torch._C.set_autocast_dtype(device_type, dtype)
    try:
        yield
    finally:
        torch._C.set_autocast_enabled(device_type, before[0])
        torch._C.set_autocast_dtype(device_type, before[1])


def is_device_type(value: Any) -> bool:
    """Whether a value is the ``device.type`` of a traced one."""
    node = value.node if isinstance(value, fx.Proxy) else None
    return node is not None and node.target is getattr and node.args[1] == "type"


class Switched(TraceError):
    """Not for a submodule to become a call: what it switched may stay so for what comes after it."""


class RegionRecorder:
    """Records the regions that are open while a model is traced.

    Attributes:
        open: the autocast regions.
        asked: whether the model asked for the grad mode.
        asked_device: whether a region is for the device of a traced value, which is taken to be that of the rules.

    Args:
        device_type: whose rules the graph is for.
        emit: called with a function and its arguments to put a call into the graph; returns its proxy.
        inference: whether the model is traced as in ``torch.inference_mode``.
        counts: whether what runs now is the model's program.
    """

    def __init__(self, device_type: str, emit: Callable[..., Any], inference: bool, counts: Callable[[], bool]) -> None:
        self.open: tuple[Region, ...] = ()
        self.asked = self.asked_device = False
        self._device_type = device_type
        self._emit = emit
        self._inference = inference
        self._counts = counts
        self._state: tuple[Any, ...] = ()
        self._outer_inference: list[tuple[bool, bool]] = []
        self._count = 0
        self._outer: dict[int, list[Any]] = {}
        self._inside = self._switching = False

    @contextmanager
    def recording(self) -> Iterator[RegionRecorder]:
        """Patches the context managers of torch until the block ends."""
        with ExitStack() as stack:
            for owner, name, wrap in (
                (torch.autocast, "__init__", self._autocast_init),
                (torch.autocast, "__enter__", self._autocast_enter),
                (torch.autocast, "__exit__", self._autocast_exit),
                (torch.no_grad, "__enter__", self._grad_enter),
                (torch.no_grad, "__exit__", self._grad_exit),
                (torch.enable_grad, "__enter__", self._grad_enter),
                (torch.enable_grad, "__exit__", self._grad_exit),
                (torch.set_grad_enabled, "__init__", self._grad_enter),
                (torch.set_grad_enabled, "__exit__", self._grad_exit),
                (torch.inference_mode, "__enter__", self._inference_enter),
                (torch.inference_mode, "__exit__", self._inference_exit),
            ):
                patched = self._while_the_model_runs(wrap, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, patched))
            before = self._state = _thread_state()
            try:
                yield self
            finally:
                _set_thread_state(before)

    def clear_autocast_cache(self) -> None:
        """The answer to ``torch.clear_autocast_cache()`` of the model, and of regions that end."""
        if self._counts() and not self._switching:
            raise TraceError("empties the cache of autocast, which a graph would forget")
        _clear_autocast_cache()

    def check(self) -> None:
        """Refuses a model that switched autocast or the grad mode by hand: a graph has regions only.

        Raises:
            Switched: when the state of the thread is not the one that the open regions made.
        """
        if self._state != _thread_state():
            _set_thread_state(self._state)
            raise Switched("switches autocast or the grad mode without a `with`, which a graph would forget")

    def _while_the_model_runs(self, wrap: Callable[..., Any], original: Any) -> Callable[..., Any]:
        def patched(region: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._counts():
                return original(region, *args, **kwargs)
            return wrap(original, region, *args, **kwargs)

        return patched

    def _autocast_init(
        self,
        original: Any,
        region: Any,
        device_type: Any,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        if is_device_type(device_type):
            self.asked_device, device_type = True, self._device_type
        # Without a GPU torch.autocast("cuda") warns and disables itself; what counts here is what was asked for.
        blind = device_type == "cuda" and not torch.cuda.is_available()
        original(region, device_type, dtype, enabled and not blind, cache_enabled)
        if blind:
            region._enabled = enabled

    def _autocast_enter(self, original: Any, region: Any) -> Any:
        entry = Region(self._count, region.device, region.fast_dtype, region._enabled, region._cache_enabled)
        self._count += 1
        result = original(region)
        self.open = (*self.open, entry)
        self._state = _thread_state()
        return result

    def _autocast_exit(self, original: Any, region: Any, *exc: Any) -> Any:
        self.open = self.open[:-1]
        self._switching = True
        result = original(region, *exc)
        self._switching = False
        self._state = _thread_state()
        return result

    # The mode to come back to is the caller's at run time, so it is read in the graph, not while tracing.
    def _grad_enter(self, original: Any, region: Any, *args: Any) -> None:
        # torch.no_grad enters through torch.set_grad_enabled: only the outer one is recorded.
        if self._inside:
            original(region, *args)
            return
        before = self._emit(_is_grad_enabled)
        self._inside = True
        original(region, *args)
        self._inside = False
        self._state = _thread_state()
        self._emit(torch._C._set_grad_enabled, _is_grad_enabled())
        self._outer.setdefault(id(region), []).append(before)

    def _grad_exit(self, original: Any, region: Any, *exc: Any) -> None:
        before = self._outer.get(id(region))
        self._inside = True
        original(region, *exc)
        self._inside = False
        self._state = _thread_state()
        if before:
            self._emit(torch._C._set_grad_enabled, before.pop())

    # Not entered for real: what tracing itself creates must not become inference tensors.
    def _inference_enter(self, original: Any, region: Any) -> None:
        mode = bool(region.mode)
        self._outer_inference.append((_is_grad_enabled(), self._inference))
        self._inference = mode
        torch._C._set_grad_enabled(not mode)
        self._state = _thread_state()
        self._emit(enter_inference_mode, mode)

    def _inference_exit(self, original: Any, region: Any, *exc: Any) -> None:
        grad, self._inference = self._outer_inference.pop()
        torch._C._set_grad_enabled(grad)
        self._state = _thread_state()
        self._emit(exit_inference_mode)

    def is_grad_enabled(self) -> bool:
        """The answer to ``torch.is_grad_enabled()`` of the model."""
        self.asked |= self._counts() and not self._inside
        return _is_grad_enabled()

    def is_inference_mode_enabled(self) -> bool:
        """The answer to ``torch.is_inference_mode_enabled()`` of the model."""
        self.asked |= self._counts()
        return self._inference


def _thread_state() -> tuple[Any, ...]:
    """What regions switch: the grad mode, autocast's cache, and autocast for each device type."""
    enabled, dtypes = map(torch._C.is_autocast_enabled, _DEVICES), map(torch._C.get_autocast_dtype, _DEVICES)
    return _is_grad_enabled(), torch.is_autocast_cache_enabled(), *enabled, *dtypes


def _set_thread_state(state: tuple[Any, ...]) -> None:
    torch._C._set_grad_enabled(state[0])
    torch._C.set_autocast_cache_enabled(state[1])
    for device, enabled, dtype in zip(_DEVICES, state[2 : 2 + len(_DEVICES)], state[2 + len(_DEVICES) :], strict=True):
        torch._C.set_autocast_enabled(device, enabled)
        torch._C.set_autocast_dtype(device, dtype)
