"""By which steps does a value follow from the arguments of a call?

A step is a value and what is wanted of it: its data, its shape or its device. The shape of a value takes the shapes of
what it is made of; it is computed on a stand-in without data.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Container
from typing import Any, Final, NamedTuple

import torch
from torch import fx, nn

from fxamp.capture.arguments import map_leaves
from fxamp.capture.builtins import NUMBERS, known_kind
from fxamp.capture.calls import MODE_CALLS
from fxamp.capture.memory import is_inplace, keeps_its_input
from fxamp.capture.outside import is_random
from fxamp.policy.spellings import CAST_METHODS, aten_name
from fxamp.policy.writes import writes_of

__all__ = ["Step", "given", "made", "needs", "slice_of"]

_MANY: Final = 8192  # steps; whoever asks has a limit below that

_OPERATOR, _BUILTINS, _MATH = operator.add.__module__, builtins.__name__, math.__name__
_INPLACE: Final = frozenset(
    "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift iconcat setitem delitem".split()
)
_PLAIN: Final = frozenset("len int float bool max min round abs sum tuple list range".split())
_QUESTIONS: Final = frozenset({torch.finfo, torch.iinfo, torch.tensor, torch.as_tensor, torch.numel, torch.is_complex})
# Of a tensor, apart from those that are operators. What it tells of autograd depends on where it is asked.
_METHODS: Final = frozenset(
    "size dim ndimension numel nelement element_size stride storage_offset is_contiguous is_floating_point is_complex "
    "is_signed get_device tolist item __len__ __bool__ __contains__".split()
)
_ATTRIBUTES: Final = frozenset(
    "shape dtype device ndim layout is_cuda is_cpu is_meta is_sparse is_quantized is_nested itemsize nbytes type index "
    "values indices min max eps tiny bits T mT H mH".split()
)
_OF_LEAVES: Final = frozenset({"requires_grad"})
_OF_SHAPES: Final = frozenset("shape ndim size dim ndimension numel nelement".split())
_SAME_SHAPE: Final = CAST_METHODS | frozenset("to cpu cuda type_as contiguous detach clone dropout".split())
_KEEP_SHAPES: Final = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase, nn.RReLU)
_length = len  # while a model is traced, the builtin is another one


class Step(NamedTuple):
    """A value of a graph, and what is wanted of it: "data", "shape", "device", or as it is "given" to the graph."""

    node: fx.Node
    what: str


def given(step: Step) -> Step:
    """The step that an argument or a tensor of the model's own is."""
    return Step(step.node, "given")


def slice_of(step: Step, known: Container[Step] = ()) -> list[Step]:
    """A step and all that it needs, in the order of the graph, the step itself last; cut off when that is very much.

    Args:
        step: what to find the slice of.
        known: steps of which it does not matter what they need.
    """
    found, rest = {step}, [step]
    while rest and _length(found) <= _MANY:
        new = set(needs(rest.pop())) - found
        found |= new
        rest.extend(each for each in new if each not in known)
    return sorted(found)


def needs(step: Step) -> tuple[Step, ...]:
    """The steps that come right before one."""
    node, what = step
    sources = node.all_input_nodes
    if what == "device":
        return _needs_for_device(node)
    if (asked := _asks_for(node)) is not None:
        return (Step(sources[0], asked), *(Step(source, "data") for source in sources[1:]))
    if what == "data":
        return tuple(Step(source, "data") for source in sources)
    if _keeps_shape(node):
        return (Step(sources[0], "shape"),)
    ignored = (_device_argument(node), node.kwargs.get("dtype"))  # of neither a shape follows
    kinds = ((source, "data" if known_kind(source) in NUMBERS else "shape") for source in sources)
    return tuple(Step(source, kind) for source, kind in kinds if source not in ignored)


def _needs_for_device(node: fx.Node) -> tuple[Step, ...]:
    argument = _device_argument(node)
    if argument is not None:
        kind = "data" if known_kind(argument) in NUMBERS else "device"
        return (Step(argument, kind),) if isinstance(argument, fx.Node) else ()
    first = [source for source in node.all_input_nodes if known_kind(source) not in NUMBERS]
    return tuple(Step(source, "device") for source in first[:1])


def made(
    step: Step,
    value_of: Callable[[Step], Any],
    call: Callable[[str, Any, Any, Any], Any],
    module: Callable[[str], nn.Module] | None = None,
) -> Any:
    """The value of a step, out of those that it needs.

    Args:
        step: what to make.
        value_of: what was made of the steps before.
        call: makes a call: of opcode, target, arguments.
        module: path to a module; None when it is known that all steps can be made.

    Raises:
        LookupError: when a step is not one that follows from arguments alone.
    """
    node, what = step
    if node.op in ("placeholder", "get_attr"):
        value = value_of(given(step))
        plain = {"data": None, "shape": (stand_in, (value,)), "device": (device_of, (value,))}[what]
        return value if plain is None else call("call_function", plain[0], plain[1], {})
    if module is not None and not _is_plain(step, module):
        raise LookupError(node.name)
    before = needs(step)
    if what == "device":
        return value_of(before[0]) if before else _device_argument(node) or torch.get_default_device()
    if (what == "data" and _asks_for(node) == "device") or (what == "shape" and _keeps_shape(node)):
        return value_of(before[0])
    by_node = {need.node: value_of(need) for need in before}
    args, kwargs = map_leaves((node.args, node.kwargs), fx.Node, lambda source: by_node.get(source))
    if what == "shape" and node.op == "call_function" and not any(need.what == "shape" for need in before):
        made_here = node.target in _QUESTIONS or aten_name(node.op, node.target, node.args, node.kwargs) is not None
        kwargs = {**kwargs, "device": "meta"} if made_here and known_kind(node) not in NUMBERS else kwargs
    return call(node.op, node.target, args, kwargs)


def stand_in(value: Any) -> Any:
    """A tensor of the same shape without data; anything else is itself."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def device_of(value: Any) -> Any:
    """The device of a tensor."""
    return value.device


def _asks_for(node: fx.Node) -> str | None:
    """What a call wants to know of its first argument, when that is less than its data."""
    if not node.all_input_nodes or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    name = node.args[1] if node.target is getattr else node.target
    if node.target is getattr and name == "device":
        return "device"
    shape = name in _OF_SHAPES and (node.target is getattr or node.op == "call_method")
    tensor = known_kind(node.args[0]) is torch.Tensor
    return "shape" if shape or node.target is torch.numel or (node.target is _length and tensor) else None


def _device_argument(node: fx.Node) -> Any:
    """The device that a call is given, or a tensor on it; None when it goes by its first tensor."""
    if node.target == "cpu":
        return torch.device("cpu")
    other = node.args[1] if node.target in ("to", "type_as") and _length(node.args) > 1 else None
    named = known_kind(other) in (torch.device, str, torch.Tensor) if other is not None else False
    return other if named else node.kwargs.get("device")


def _keeps_shape(node: fx.Node) -> bool:
    name = aten_name(node.op, node.target, node.args, node.kwargs) or ""
    return node.op == "call_module" or name in _SAME_SHAPE or (is_inplace(name) and bool(node.all_input_nodes))


def _is_plain(step: Step, module: Callable[[str], nn.Module]) -> bool:
    """Whether a call does nothing but give a value that its arguments tell, as far as that is wanted."""
    node, what = step
    if what == "data":
        return _is_plain_call(node)
    name = aten_name(node.op, node.target, node.args, node.kwargs)
    if what == "device":
        return node.target != "cuda"  # which of them, only a run tells
    if node.op == "call_module":
        found = module(str(node.target))
        return isinstance(found, _KEEP_SHAPES) and keeps_its_input(found)
    return name is not None or _is_plain_call(node)


def _is_plain_call(node: fx.Node) -> bool:
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True:
        return False
    if node.op == "call_method":
        return node.target in _METHODS or _is_plain_operator(node)
    if node.op != "call_function" or node.target in MODE_CALLS:
        return False
    if node.target is getattr:
        source = node.args[0]
        leaf = isinstance(source, fx.Node) and source.op in ("placeholder", "get_attr")
        return node.args[1] in _ATTRIBUTES or (node.args[1] in _OF_LEAVES and leaf)
    if node.target in _QUESTIONS or node.target is operator.getitem:
        return True
    name, module = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", "")
    if module in (_OPERATOR, _MATH, _BUILTINS):
        return name in _PLAIN if module == _BUILTINS else name not in _INPLACE
    return _is_plain_operator(node)


def _is_plain_operator(node: fx.Node) -> bool:
    name = aten_name(node.op, node.target, node.args, node.kwargs)
    if name is None or "empty" in name or is_inplace(name):
        return False
    return not (is_random(name) or any(writes_of(node.target, node.args, node.kwargs)))
