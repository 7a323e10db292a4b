"""What do example inputs tell of a traced value?

Each call of a trace can be run on fake tensors: its shape is that of a real run, nothing is computed. So a branch on
``x.dim()`` goes the way it would go for such inputs, and the graph checks that at every call. Data is never told, nor
is a dtype under the rules of a GPU where the autocast of fake tensors could not be asked.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxamp.capture.arguments import map_leaves
from fxamp.capture.away import cast_all, prepared
from fxamp.capture.builtins import plain_builtins
from fxamp.capture.caches import note_run
from fxamp.capture.calls import MODE_CALLS, has_hooks, set_objects
from fxamp.capture.clone import clone_tree
from fxamp.capture.gradients import GradModes
from fxamp.capture.regions import AutocastState, autocast_as, state_of
from fxamp.capture.slices import UNTOLD
from fxamp.capture.unknown import SYMBOLIC, fake_mode, has_unknown
from fxamp.dtypes import is_castable

# The question itself: a model's own is noted while it is traced.
_is_grad_enabled = torch.is_grad_enabled

__all__ = [
    "UNTOLD",
    "Facts",
    "gpu_is_away",
    "has_nested",
    "moved",
    "run_on_fakes",
    "without_log",
]

_length = len  # while a model is traced, the builtin is another one

# What a tensor tells of itself apart from its sizes.
_NO_SIZES: Final = frozenset(
    "dim ndimension ndim layout device dtype is_floating_point is_complex is_signed is_sparse is_quantized is_nested "
    "is_cuda is_cpu is_meta get_device itemsize element_size".split()
)
_OF_DTYPES: Final = frozenset("dtype is_floating_point is_complex is_signed itemsize element_size".split())
_NOT_TOLD: Final = frozenset("is_contiguous data_ptr item tolist requires_grad is_leaf grad_fn grad names".split())
# Calls that no autocast touches, and that fail for a fake tensor on a GPU that is not there.
_COPIES: Final = (operator.getitem, "contiguous", "clone")


class _CastableDtype:
    """The dtype of a floating tensor that autocast may have changed."""

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _CastableDtype) or (isinstance(other, torch.dtype) and is_castable(other)):
            raise LookupError("autocast decides about this dtype")
        return False

    __hash__ = object.__hash__

    is_floating_point = True
    is_complex = False


_CASTABLE: Final = _CastableDtype()


class Facts:
    """The fake values of a graph that is being traced.

    Args:
        examples: the values of the graph's placeholders, in order.
        attribute: path to the parameter, buffer, tensor or module of that name.
        sizes: tell sizes too, and not only what follows from the number of dimensions.
        data: answer for what follows from the data of the examples, too.
        ambient: the device type and dtype of autocast around the model, if there is any.
        grad: whether gradients are recorded around it; None: nobody is told what has some.
        seen: what modules gave when the model was run, by path: for those that cannot be run on fake tensors.

    Attributes:
        real: the examples as they are.
        tells_sizes, tells_data: as asked for.
        running: whether a call is being run right now.
        told_dtypes, told_grads: whether anything was told that follows from the dtypes of values, from the grad mode.
    """

    def __init__(
        self,
        examples: list[Any],
        attribute: Callable[[str], Any],
        *,
        sizes: bool,
        data: bool = False,
        ambient: tuple[str, torch.dtype] | None = None,
        grad: bool | None = None,
        seen: Mapping[str, Any] | None = None,
    ) -> None:
        self._grads = GradModes(grad)
        self._seen = seen or {}
        self.real, self.tells_sizes, self.tells_data = examples, sizes, data
        self._ambient = None if ambient is None else AutocastState(ambient[1], enabled=True)
        self._device_type = "cpu" if ambient is None else ambient[0]
        self._mode = fake_mode()
        self.running = self.told_dtypes = self.told_grads = False
        self._examples = iter([self._fake(example) for example in examples])
        self._attribute = attribute
        self._values: dict[fx.Node, Any] = {}
        self._sized: set[fx.Node] = set()
        self._typed: set[fx.Node] = set()
        self._doubtful: set[fx.Node] = set()  # whose dtypes are a guess

    def kind(self, node: fx.Node) -> type | None:
        """The type of a node's value, or None when it is not told."""
        value = self._value(node)
        return None if value is UNTOLD else SYMBOLIC.get(type(value)) or _kind_of(value)

    def told(self, node: fx.Node, *, sizes: bool = False) -> Any:
        """The value of a node that holds no tensor, or ``UNTOLD``; ``sizes``: also one that follows from sizes."""
        value = self._value(node)
        self.told_dtypes |= node in self._typed
        self.told_grads |= self._grads.decide(node)
        sized = node in self._sized and not (sizes or self.tells_sizes)
        return UNTOLD if sized or isinstance(value, torch.Tensor | _CastableDtype) or has_unknown(value) else value

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """The shape of a node's value, or None when it is not told."""
        value = self._value(node)
        return tuple(value.shape) if isinstance(value, torch.Tensor) and not has_unknown(value) else None

    def length_here(self, node: fx.Node) -> int | None:
        """How many parts a tuple has with these examples, whatever that follows from."""
        value = self._value(node)
        return len(value) if isinstance(value, tuple | list) else None

    def length(self, node: fx.Node) -> int | None:
        """How many parts a tuple has, or a tensor when sizes are told; None when that is not known."""
        value = self._value(node)
        if not isinstance(value, torch.Size) and node in self._sized and not self.tells_sizes:
            return None
        if isinstance(value, torch.Tensor):
            known = self.tells_sizes and value.dim() and not has_unknown(value.shape[0])
            return len(value) if known else None
        return len(value) if isinstance(value, tuple | list) else None

    def _value(self, node: fx.Node) -> Any:
        # In graph order and up to the last call, for a call may change the shape of an earlier value.
        unseen = list(itertools.takewhile(lambda each: each not in self._values, reversed(node.graph.nodes)))
        for each in reversed(unseen):
            with self.alone():
                found = self._found(each)
                if found is UNTOLD and each.op == "call_module" and each.target in self._seen:
                    found = self._fake(self._seen[str(each.target)])
                self._values[each] = found
            if self._is_sized(each):
                self._sized.add(each)
            if self._is_typed(each):
                self._typed.add(each)
        return self._values[node]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What runs now is no part of the model's program: nothing of it is to be recorded."""
        grad_mode = _is_grad_enabled()
        self.running = True
        try:
            # torch's own code goes by what int and float are, too.
            with torch._C.DisableTorchFunction(), without_log(), plain_builtins():
                yield
        finally:
            self.running = False
            torch._C._set_grad_enabled(grad_mode)

    def _found(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return next(self._examples, UNTOLD)
        if node.op == "get_attr":
            return self._fake(self._attribute(str(node.target)))
        for each in set_objects(node):
            self._values[each] = UNTOLD  # it is not what the call gave any more
        name = str(node.args[1]) if node.target is getattr else node.target
        self._grads.read(node)
        if name == "requires_grad" and isinstance(value := self._values[node.args[0]], torch.Tensor):  # type: ignore[index]
            return value.requires_grad if self._grads.tell(node) else UNTOLD
        if node.target in MODE_CALLS or name in _NOT_TOLD:
            return UNTOLD
        if any(self._values[source] is UNTOLD for source in node.all_input_nodes):
            return UNTOLD
        try:
            return self._run(node)
        except Exception:
            return UNTOLD

    def _run(self, node: fx.Node) -> Any:
        """What a call gives. In which dtypes is a guess where the autocast of the rules could not be asked."""
        sources = node.all_input_nodes
        doubtful = any(source in self._doubtful for source in sources)
        if node.target is getattr:
            value = self._called(node, self._values.__getitem__)
            return _CASTABLE if doubtful and isinstance(value, torch.dtype) and is_castable(value) else value
        compares = getattr(node.target, "__module__", None) == operator.eq.__module__
        if not doubtful and (self._device_type == "cpu" or node.target in _COPIES):
            return self._called(node, self._values.__getitem__)
        if not doubtful:
            values = {source: self._values[source] for source in sources}
            prepare = prepared(node, values.values(), self._state(node), self._device_type)
            if prepare is not None:
                return self._called(node, lambda source: prepare(values[source]))
            with suppress(Exception), self._mode:  # fake tensors can be said to be on a GPU, and its autocast asked
                self._grads.lose(node)
                away = {source: moved(value, "cuda") for source, value in values.items()}
                return moved(self._called(node, away.__getitem__, "cuda"), "cpu")
        self._doubtful.add(node)

        def in_float32(source: fx.Node) -> Any:
            # In one dtype: autocast would have seen to it that dtypes fit, and only shapes count.
            value = cast_all(self._values[source], dtype=torch.float32)
            return torch.float32 if value is _CASTABLE and not compares else value

        return self._called(node, in_float32)

    def _state(self, node: fx.Node) -> AutocastState:
        """The autocast state that a call is made in."""
        off = AutocastState(torch._C.get_autocast_dtype(self._device_type), enabled=False)
        return state_of(node.meta.get("regions", ()), self._device_type, self._ambient or off)

    def _called(self, node: fx.Node, value_of: Callable[[fx.Node], Any], device: str = "") -> Any:
        args, kwargs = map_leaves((node.args, node.kwargs), fx.Node, value_of)
        state = self._state(node)
        self._grads.enter()
        with self._mode, autocast_as(self._device_type, state.dtype, enabled=state.enabled):
            if node.op == "call_module":
                fake = (lambda value: moved(self._fake(value), device)) if device else self._fake
                return run_on_fakes(self._attribute(str(node.target)), args, kwargs, fake)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)

    def _is_sized(self, node: fx.Node) -> bool:
        """Whether a value is no tensor and follows from the sizes of some."""
        if isinstance(self._values[node], torch.Tensor):
            return False
        if node.op == "placeholder":
            return isinstance(self._values[node], int | float)
        name = str(node.args[1]) if node.target is getattr else node.target
        of_tensors = any(isinstance(self._values[source], torch.Tensor) for source in node.all_input_nodes)
        if node.target is _length:
            return of_tensors
        if _is_structure(node, self._values[node]):
            return False
        return (of_tensors and name not in _NO_SIZES) or any(source in self._sized for source in node.all_input_nodes)

    def _is_typed(self, node: fx.Node) -> bool:
        """Whether a value is no tensor and follows from the dtypes of some."""
        if isinstance(self._values[node], torch.Tensor):
            return False
        name = str(node.args[1]) if node.target is getattr else getattr(node.target, "__name__", node.target)
        return name in _OF_DTYPES or any(source in self._typed for source in node.all_input_nodes)

    def _fake(self, value: Any) -> Any:
        if has_nested(value):
            return UNTOLD
        return pytree.tree_map_only(torch.Tensor, self._mode.from_tensor, value)


def _kind_of(value: Any) -> type:
    return torch.Tensor if isinstance(value, torch.Tensor) else type(value)


def has_nested(value: Any) -> bool:
    """Whether there is a nested tensor in it: no fake one can be made of these."""
    return any(isinstance(leaf, torch.Tensor) and leaf.is_nested for leaf in pytree.tree_leaves(value))


def _is_structure(node: fx.Node, value: Any) -> bool:
    """Whether a call gives a tuple that has as many parts for any sizes, as the state of a recurrent module."""
    if not isinstance(value, tuple) or isinstance(value, torch.Size) or node.op == "call_module":
        return isinstance(value, tuple) and not isinstance(value, torch.Size)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    packet = getattr(torch.ops.aten, name, None)
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()] if packet is not None else []
    return any(_length(schema.returns) == _length(value) > 1 for schema in schemas)


def gpu_is_away(device_type: str) -> bool:
    """Whether the rules are those of a GPU that is not there; fake tensors can be said to be on it all the same."""
    return device_type == "cuda" and not torch.cuda.is_available()


def moved(value: Any, device: str) -> Any:
    """Fake tensors said to be on another device; a build without GPUs refuses to move even these."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    return value if isinstance(value, torch.Size) else pytree.tree_map_only(torch.Tensor, move, value)


def run_on_fakes(module: nn.Module, args: Any, kwargs: Mapping[str, Any], fake: Callable[[Any], Any]) -> Any:
    """What a module gives back for fake tensors; what it writes goes to a clone.

    Raises:
        NotImplementedError: when it has hooks, which are the user's and not to be run for this.
    """
    if any(map(has_hooks, module.modules())):
        raise NotImplementedError("hooks are the user's, and not run here")
    note_run(module)
    module = clone_tree(module)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    fakes = {name: fake(tensor) for name, tensor in state.items()}
    return torch.func.functional_call(module, fakes, args, dict(kwargs))


@contextmanager
def without_log() -> Iterator[None]:
    """Fake tensors log a traceback of what fails; here that is an answer."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
