"""How is a graph of Dynamo's read?

Dynamo gives calls of torch's functions, as a trace of ours does. But all that the graph reads is an input of it, an
autocast region is a pair of calls, and where a call was made stands in a text. Here that becomes what planning reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import fx
from torch._higher_order_ops.wrap import TagActivationCheckpoint, tag_activation_checkpoint
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.utils.checkpoint import checkpoint

from fxamp.capture.regions import Region
from fxamp.capture.source import is_users

__all__ = ["Told", "checkpointed", "modules_named", "told", "translate"]

_FRAME: Final = re.compile(r'File "([^"]+)", line (\d+)')
_ROOT: Final = re.compile(r"^[LG]\['\w+'\](\.__closure__\[\d+\]\.cell_contents)?")
_TABLE: Final = re.compile(r"\._modules\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]")


class Told(NamedTuple):
    """What Dynamo told of a tensor."""

    dtype: torch.dtype
    rank: int


def told(value: Any) -> Any:
    """What is known of a fake value: of each tensor its dtype and rank, in the tuple or list it is in."""
    if isinstance(value, torch.Tensor):
        return Told(value.dtype, value.dim())
    if isinstance(value, tuple | list):
        return tuple(told(item) for item in value)
    return ()


def modules_named(stack: Mapping[str, Any]) -> str:
    """The path of the innermost module of a stack, as Dynamo names it, without the name of the model itself."""
    if not stack:
        return ""
    name = str(list(stack.values())[-1][0])
    return _TABLE.sub(lambda found: "." + next(filter(None, found.groups())), _ROOT.sub("", name)).strip(".")


def checkpointed(body: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``torch.utils.checkpoint`` of a part of a graph. Dynamo's own call is for compilers: it keeps no random state."""
    options, rest = TagActivationCheckpoint.divide_kwargs(kwargs)  # type: ignore[no-untyped-call]
    context_fn = getattr(body, "meta", {}).get("_checkpoint_context_fn")
    if context_fn is not None:
        options["context_fn"] = context_fn
    return checkpoint(body, *args, **{**options, "use_reentrant": False}, **rest)


_RUN_BY: Final[Mapping[Any, Callable[..., Any]]] = {tag_activation_checkpoint: checkpointed}


def translate(
    graph: fx.Graph,
    into: fx.Graph,
    made: dict[fx.Node, fx.Node],
    module_of: Callable[[Mapping[str, Any]], str] = modules_named,
    *,
    eager: bool = True,
) -> None:
    """Adds the calls of a graph of Dynamo's to one of ours.

    Args:
        graph: Dynamo's; it is only read.
        into: ours.
        made: Dynamo's inputs to the nodes that stand for them; the rest is added.
        module_of: the path of the module that a call was made in, from Dynamo's stack of modules.
        eager: whether the graph is run as it is, and not compiled further.
    """
    regions = _Regions()
    for node in graph.nodes:
        if node in made or node.op == "output" or regions.notes(node):
            continue
        copy = made[node] = into.node_copy(node, made.__getitem__)
        if eager and node.op == "call_function":
            copy.target = _RUN_BY.get(node.target, node.target)
        copy.meta = {
            "module": module_of(node.meta.get("nn_module_stack") or {}),
            "source": _source(node),
            "regions": regions.open,
        }
        if (value := node.meta.get("example_value")) is not None:
            copy.meta["told"] = told(value)


class _Regions:
    """The autocast regions that are open, as the calls that enter and leave them come by."""

    def __init__(self) -> None:
        self.open: tuple[Region, ...] = ()
        self._of: dict[fx.Node, tuple[Region, ...]] = {}

    def notes(self, node: fx.Node) -> bool:
        """Whether a node is one of these calls."""
        if node.target is _enter_autocast:
            self._of[node] = self.open
            self.open = (*self.open, self._entered(*node.args))
        elif node.target is _exit_autocast:
            entered: Any = node.args[0]
            self.open = self._of[entered]
        else:
            return False
        return True

    def _entered(self, device_type: Any, dtype: Any = None, enabled: Any = True, cache: Any = None) -> Region:
        if dtype is None:
            outer = (region.dtype for region in reversed(self.open) if region.device_type == device_type)
            dtype = next(outer, torch.get_autocast_dtype(device_type))
        if cache is None:
            cache = self.open[-1].cache_enabled if self.open else torch.is_autocast_cache_enabled()
        return Region(len(self._of), device_type, dtype, bool(enabled), bool(cache))


def _source(node: fx.Node) -> str:
    """The nearest line of the user's, as ``model.py:14``."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return next((f"{file}:{line}" for file, line in reversed(frames) if is_users(file)), "")
