"""The autocast of a GPU on a machine without one: its lists, in the place of those that CPU autocast has.

Inside ``cuda_rules()`` eager ``torch.autocast("cpu")`` follows the CUDA lists on CPU tensors, with real numbers. What
the lists say is read from the header that ships with torch, and what a policy does is written here as
ATen/autocast_mode.h has it, so nothing of fxamp's own tables is believed.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

HEADER = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
POLICIES = {
    "LOWER_PRECISION_FP": "lower",
    "FP32": "fp32",
    "FP32_SET_OPT_DTYPE": "fp32_dtype",
    "PROMOTE": "promote",
}
# Registered by name beside the lists, in autocast_mode.cpp.
BY_HAND = {"binary_cross_entropy": "banned", "cudnn_convolution": "lower", "cudnn_convolution_transpose": "lower"}


@functools.cache
def cuda_lists() -> Mapping[str, str]:
    """Operator, with overload, to policy, as the installed header lists them for CUDA."""
    text = HEADER.read_text().replace("\\\n", "")
    lists = dict(re.findall(r"#define AT_FORALL_(\w+)\(_\)(.*)", text))
    found = {
        ".".join(filter(None, (part.strip() for part in entry.split(",")))): rule
        for key, rule in POLICIES.items()
        for entry in re.findall(r"_\(([^()]+)\)", lists[key])
    }
    appended = dict.fromkeys(re.findall(r'"(norm\.\w+)"', text), "fp32_dtype")
    return found | appended | BY_HAND


@contextmanager
def cuda_rules() -> Iterator[None]:
    """CPU autocast with the rules of CUDA, until the block ends."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCPU")
    cache: dict[int, tuple[Tensor, Tensor]] = {}
    clear = torch.clear_autocast_cache

    def clear_both() -> None:
        cache.clear()
        clear()

    with warnings.catch_warnings(), torch.library._scoped_library("aten", "IMPL") as library:
        warnings.simplefilter("ignore")
        for name in filter(lambda name: name.startswith("aten::"), registered):
            library.impl(name.removeprefix("aten::"), torch.library.fallthrough_kernel, "AutocastCPU")
        for name, policy in cuda_lists().items():
            if not name.startswith("cudnn"):
                library.impl(name, _kernel(name, policy, cache), "AutocastCPU")
        with mock.patch.object(torch, "clear_autocast_cache", clear_both):
            yield


def overload(name: str) -> Any:
    """The operator of this name; without an overload it is the default one."""
    packet, _, rest = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), rest or "default")


def _kernel(name: str, policy: str, cache: dict[int, tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    operator = overload(name)
    # Two overloads of norm are called with a dtype, which others take, and these have no defaults.
    called = torch.ops.aten.norm if name.startswith("norm.") else operator
    defaults = {a.name: a.default_value for a in operator._schema.arguments if a.has_default_value()}
    arguments = [argument.name for argument in operator._schema.arguments]
    positional = [argument.name for argument in operator._schema.arguments if not argument.kwarg_only]
    kinds = {argument.name: str(argument.type) for argument in operator._schema.arguments}
    below = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = defaults | dict(zip(arguments, args, strict=False)) | kwargs
        with torch._C._ExcludeDispatchKeyGuard(below):
            if policy == "banned":
                raise RuntimeError(f"{name} is unsafe to autocast")
            if policy == "fp32_dtype":
                given = _with_dtype(given, arguments[0])
            else:
                low = torch.get_autocast_dtype("cpu")
                dtype = {"lower": low, "fp32": torch.float32}.get(policy) or _widest(given, kinds, low)
                # The compiler evaluates the arguments of a C++ call from the last to the first.
                cast = {key: _cast(given[key], kinds[key], dtype, cache) for key in reversed(arguments) if key in given}
                given = {key: cast[key] for key in arguments if key in cast}
            named = {key: value for key, value in given.items() if key not in positional}
            return called(*(given[key] for key in positional), **named)

    return kernel


def _with_dtype(given: dict[str, Any], first: str) -> dict[str, Any]:
    fits = _eligible(given[first]) and given.get("dtype") is None
    return {**given, "dtype": torch.float32} if fits else given


def _widest(given: Mapping[str, Any], kinds: Mapping[str, str], low: torch.dtype) -> torch.dtype:
    """``prioritize`` over the arguments that are a Tensor or a list of them; an optional one does not count."""
    current = low
    for key, value in given.items():
        for tensor in {"Tensor": [value], "List[Tensor]": value}.get(kinds[key], ()):
            if _eligible(tensor):
                if torch.float32 not in (current, tensor.dtype) and tensor.dtype != low:
                    raise RuntimeError("Unexpected floating ScalarType in at::autocast::prioritize")
                current = torch.float32 if torch.float32 in (current, tensor.dtype) else low
    return current


def _cast(value: Any, kind: str, dtype: torch.dtype, cache: dict[int, tuple[Tensor, Tensor]]) -> Any:
    if kind == "List[Tensor]":
        return [_cast(item, "Tensor", dtype, cache) for item in value]
    if kind not in ("Tensor", "Optional[Tensor]") or not _eligible(value) or value.dtype == dtype:
        return value
    low = torch.get_autocast_dtype("cpu")
    leaf = value.requires_grad and value.is_leaf and not value._is_view() and not value.is_inference()
    if not (dtype == low and value.dtype == torch.float32 and leaf and torch.is_autocast_cache_enabled()):
        return value.to(dtype)
    if id(value) not in cache:
        with torch.enable_grad():
            cache[id(value)] = value, value.to(dtype)
    return cache[id(value)][1]


def _eligible(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
