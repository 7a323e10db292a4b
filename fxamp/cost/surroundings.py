"""What could a measurement disturb, or be disturbed by?

Calls are measured as a converted model makes them: without autocast, in a grad mode of their own, past every mode of
the user's. What is global is left as it was found; what the user has set for speed or for exactness stays in force,
and is a part of what was measured.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["settings", "undisturbed"]


@contextlib.contextmanager
def undisturbed(device: torch.device, *, training: bool) -> Iterator[None]:
    """Run calls so that nothing of them stays, and nothing of what is around reaches them."""
    queued = device.type != "cpu"
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch._C.DisableTorchFunction())  # `with torch.device(...)`, default devices
        stack.enter_context(_disable_current_modes())  # fake tensors, counters
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(training))
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        if queued:
            stack.enter_context(torch.get_device_module(device).device(device))
        devices = [device] if queued else []
        kind = {"device_type": device.type} if queued else {}
        stack.enter_context(torch.random.fork_rng(devices, **kind))
        stack.enter_context(_no_autocast(device.type))
        yield


@contextlib.contextmanager
def _no_autocast(device_type: str) -> Iterator[None]:
    # `torch.autocast(enabled=False)` would drop the casts that the user's own region holds, where it is the outermost.
    enabled = torch.is_autocast_enabled(device_type)
    torch.set_autocast_enabled(device_type, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, enabled)


def settings() -> str:
    """What is set otherwise than by default, and changes how long a call takes."""
    found = [f"/{name}={value}" for name, value, usual in _read_settings() if value != usual]
    return "".join(found)


def _read_settings() -> Iterator[tuple[str, object, object]]:
    backends: Any = torch.backends
    yield "cuda.matmul", backends.cuda.matmul.fp32_precision, "none"
    yield "cuda.matmul.f16", backends.cuda.matmul.allow_fp16_accumulation, False
    yield "cudnn.conv", backends.cudnn.conv.fp32_precision, "tf32"
    yield "mkldnn.matmul", backends.mkldnn.matmul.fp32_precision, "none"
    yield "mkldnn.conv", backends.mkldnn.conv.fp32_precision, "none"
    yield "mkldnn", backends.mkldnn.enabled, True
    yield "cudnn", backends.cudnn.enabled, True
    yield "cudnn.benchmark", backends.cudnn.benchmark, False
    yield "cudnn.deterministic", backends.cudnn.deterministic, False
    yield "deterministic", torch.are_deterministic_algorithms_enabled(), False
