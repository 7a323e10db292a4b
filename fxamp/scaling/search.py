"""Which call of a graph made the first value that is not finite, in the forward or in the backward pass?

The graph is run again by an interpreter that looks at every value and every gradient. An infinity that the model means,
as in ``masked_fill(mask, -inf)`` or a mask in a buffer, is no overflow, and neither is one that leaves no trace.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxamp.dtypes import LOW_DTYPES
from fxamp.scaling.ranks import alone
from fxamp.scaling.sights import Origin, Sight, look
from fxamp.scaling.trail import Call, tensors_of

__all__ = ["origin_of", "untouched"]


def origin_of(module: Any, call: Call) -> Origin | None:
    """The origin of what is not finite in a call of a converted module or its gradients; None: all of it is finite."""
    root = module._root
    watched = _Watched(root, call.variant.graph)
    with untouched(root), torch.enable_grad(), alone():
        call.restore_random_state()
        variant = replace(call.variant, function=lambda _, *values: watched.run(*values))
        values = [value.clone() if isinstance(value, torch.Tensor) else value for value in call.values]
        outputs = tensors_of(module._run(variant, values))  # which may write to them
        places = [n for n in call.variant.graph.nodes if n.op == "placeholder"]
        named = (*zip(places, call.values, strict=True), *root.named_parameters())
        leaves = {name: leaf for name, leaf in named if isinstance(leaf, torch.Tensor) and leaf.requires_grad}
        used = watched.sources_of([outputs[i] for given in call.passes for i in given])
        found = watched.forward_origin(_last(used)) or watched.backward_origin(outputs, call.passes, leaves)
        if found is not None and found.is_outside and found.phase == "backward":
            found = watched.forward_origin(used) or found
        return found


@contextmanager
def untouched(root: nn.Module) -> Iterator[None]:
    """A context that leaves the buffers of a module and the random generators as they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    buffers = [(buffer, buffer.clone()) for buffer in root.buffers()]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.data.copy_(before)  # no news to a backward pass that is to come


class _Watched(fx.Interpreter):
    """Runs a graph and notes what is seen of every value."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self._sights: dict[fx.Node, Sight] = {}
        self._meant: set[fx.Node] = set()  # those whose infinities the model means
        self._fits: dict[fx.Node, bool | None] = {}
        self._owners: dict[Any, fx.Node] = {}  # of the nodes of autograd
        self._output: fx.Node | None = None
        self._sources: dict[int, fx.Node] = {}  # of outputs, by the ids of these
        self._found: Origin | None = None

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        tensors = tensors_of(result)
        self._sights[n] = look(tensors)
        if self._is_meant(n):
            self._meant.add(n)
        self._claim(n, tensors)
        if n.op == "output":
            self._output = n
            self._sources = {id(tensor): source for source in _inputs(n) for tensor in tensors_of(self.env[source])}
        elif self._is_origin(n):
            self._fits[n] = self._fits_float32(n)
        return result

    # -- forward -----------------------------------------------------------------------------------

    def sources_of(self, outputs: Iterable[torch.Tensor]) -> list[fx.Node]:
        """The nodes with these outputs."""
        return list(dict.fromkeys(self._sources[id(output)] for output in outputs))

    def forward_origin(self, ends: Iterable[fx.Node]) -> Origin | None:
        """Where one of the values of these nodes stopped to be finite."""
        return self._trace_back(node for node in ends if not self._sights[node].finite)

    def _trace_back(self, ends: Iterable[fx.Node]) -> Origin | None:
        """The first of all calls that the values of these nodes come from and that made something not finite."""
        waiting, seen = list(ends), set()
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += [source for source in _inputs(node) if not self._sights[source].finite]
        places = {node.name: i for i, node in enumerate(self._sights)}
        # Weights are cast before the first call; what matters is the place of the call that they are cast for.
        for node in sorted(seen, key=lambda node: places.get(node.meta.get("for", ""), places[node.name])):
            if self._is_origin(node):
                sight, tensor = self._sights[node], self._bad_tensor(node)
                how = "given" if node.op == "placeholder" or tensor else _how(node)
                largest = max((self._sights[source].largest for source in _inputs(node)), default=sight.largest)
                return Origin("forward", node, how, sight.nan, largest, sight.dtype, self._fits.get(node), tensor)
        return None

    def _bad_tensor(self, node: fx.Node) -> str:
        """The path of what is not finite in the model itself: the node's tensor, or one of the module it calls."""
        paths = [str(n.target) for n in (node, *node.all_input_nodes) if n.op in ("get_attr", "call_module")]
        for path in paths:
            value = self.fetch_attr(path)
            named = _tensors_of_module(value) if isinstance(value, nn.Module) else [("", value)]
            for name, tensor in named:
                sight = look([tensor])
                if not (sight.finite or (sight.masks and not isinstance(tensor, nn.Parameter))):
                    return f"{path}.{name}" if name else path
        return ""

    def _is_origin(self, node: fx.Node) -> bool:
        """Whether something of its value is not finite that neither its inputs have nor the model means."""
        return self._is_stray(node) and not any(map(self._is_stray, _inputs(node)))

    def _is_stray(self, node: fx.Node) -> bool:
        return not self._sights[node].finite and node not in self._meant

    def _is_meant(self, node: fx.Node) -> bool:
        """Whether its infinities are a mask's, or come from what the model itself names; a NaN is never meant."""
        sight, sources = self._sights[node], [n for n in _inputs(node) if not self._sights[n].finite]
        if sight.finite or sight.nan or not self._meant.issuperset(sources):
            return False
        if node.op == "placeholder" or (node.op == "get_attr" and not self._is_parameter(node)):
            return sight.masks
        named = _infinities(node)
        return (
            math.inf in named
            or any(self._sights[n].plus for n in sources)
            or (bool(named or sources) and not sight.plus)
        )

    def _is_parameter(self, node: fx.Node) -> bool:
        return isinstance(self.fetch_attr(str(node.target)), nn.Parameter)

    def _fits_float32(self, node: fx.Node) -> bool | None:
        """Whether the call gives finite values when its inputs come in float32."""
        if node.op not in ("call_function", "call_method"):
            return None
        if "cast" in node.meta:
            return True
        with suppress(Exception), torch.random.fork_rng(), torch.no_grad():
            args, kwargs = fx.node.map_aggregate(self.fetch_args_kwargs_from_env(node), _in_float32)
            return look(tensors_of(getattr(self, node.op)(node.target, args, kwargs))).finite
        return None

    # -- backward ----------------------------------------------------------------------------------

    def backward_origin(
        self,
        outputs: list[torch.Tensor],
        passes: list[dict[int, torch.Tensor | None]],
        leaves: Mapping[str | fx.Node, torch.Tensor],
    ) -> Origin | None:
        """Where a gradient stopped to be finite, with these gradients of the outputs; inputs go by their nodes."""
        handles = [node.register_hook(functools.partial(self._passed, node)) for node in self._owners]
        try:
            return next(filter(None, (self._origin_of_pass(outputs, given, leaves) for given in passes)), None)
        finally:
            for handle in handles:
                handle.remove()

    def _origin_of_pass(
        self,
        outputs: list[torch.Tensor],
        given: Mapping[int, torch.Tensor | None],
        leaves: Mapping[str | fx.Node, torch.Tensor],
    ) -> Origin | None:
        assert self._output is not None
        kept = {i: g for i, g in given.items() if g is not None and outputs[i].grad_fn is not None}
        if not kept:
            return None
        ends: list[Any] = [outputs[i] for i in kept]
        handles = [
            end.grad_fn.register_prehook(functools.partial(self._arrived, end.grad_fn, end.output_nr, gradient))
            for end, gradient in zip(ends, kept.values(), strict=True)
        ]
        nothing = [torch.zeros_like(end) for end in ends]
        found = torch.autograd.grad(ends, [*leaves.values()], nothing, retain_graph=True, allow_unused=True)
        for handle in handles:
            handle.remove()
        for leaf, gradient in zip(leaves, found, strict=True):
            if self._found is None and gradient is not None and not (sight := look([gradient])).finite:
                node, how, name = (self._output, "hooked", leaf) if isinstance(leaf, str) else (leaf, "summed", "")
                self._found = Origin("backward", node, how, sight.nan, sight.largest, sight.dtype, None, name)
        return self._found

    def _arrived(self, function: Any, number: int, gradient: torch.Tensor, gradients: tuple[Any, ...]) -> Any:
        """Puts the gradient that an output got in the place of what the rest of the graph gives it, which is a part."""
        here = look(part for part in gradients[number : number + 1] if part is not None)
        if self._found is None and not (sight := look([gradient])).finite:
            node, how = (self._output, "given") if here.finite else (self._owners[function], "summed")
            assert node is not None
            self._found = Origin("backward", node, how, sight.nan, sight.largest, sight.dtype)
        return (*gradients[:number], gradient, *gradients[number + 1 :])

    def _claim(self, node: fx.Node, tensors: list[torch.Tensor]) -> None:
        """Notes that the nodes of autograd which are new belong to a node of the graph."""
        waiting = [tensor.grad_fn for tensor in tensors]
        while waiting:
            function = waiting.pop()
            if function is not None and function not in self._owners:
                self._owners[function] = node
                waiting += [before for before, _ in function.next_functions]

    def _passed(self, function: Any, made: tuple[Any, ...], given: tuple[Any, ...]) -> None:
        if self._found is not None:
            return
        before, after = (look(g for g in gradients if isinstance(g, torch.Tensor)) for gradients in (given, made))
        if before.finite and after.finite:
            return
        node = self._owners[function]
        if before.finite:
            # Of a value that was infinite on the way and left no trace in the outputs, as of 1 / exp(100).
            ends = [source for source in (node, *_inputs(node)) if not self._sights[source].finite]
            found = self._trace_back(ends)
            self._found = found or Origin("backward", node, _how(node), after.nan, before.largest, after.dtype)
        else:
            self._found = Origin("backward", node, "summed", before.nan, before.largest, before.dtype)


def _tensors_of_module(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values it computes with; of a cast of one weight among several, that weight."""
    if "cast" in node.meta and node.target is operator.getitem:
        together, index = node.args
        return [together.all_input_nodes[index]]  # type: ignore[union-attr, index]
    return node.all_input_nodes


def _last(nodes: list[fx.Node]) -> list[fx.Node]:
    """Those among them that no other is computed with."""
    waiting, seen = [source for node in nodes for source in _inputs(node)], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += _inputs(node)
    return [node for node in nodes if node not in seen]


def _how(node: fx.Node) -> str:
    return "cast" if "cast" in node.meta else "made"


def _infinities(node: fx.Node) -> list[float]:
    """Those among the constants of a call."""
    given: list[Any] = []
    fx.node.map_aggregate((node.args, dict(node.kwargs)), given.append)
    return [value for value in given if isinstance(value, float) and math.isinf(value)]


def _in_float32(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().float() if value.dtype in LOW_DTYPES else value.detach()
    return torch.float32 if isinstance(value, torch.dtype) and value in LOW_DTYPES else value
