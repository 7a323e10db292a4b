"""The converted module: graphs, the module tree they run on, and what belongs to them.

An ``AmpModule`` is a ``torch.fx.GraphModule`` with one graph a mode; ``train()`` and ``eval()`` switch. A call
that gives other optional arguments than the first one did gets a graph of its own, traced when
it first comes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxamp.capture import Program
from fxamp.capture.calls import enter_inference_mode, leave_inference_modes
from fxamp.capture.packing import pack_graph, unpack_graph
from fxamp.errors import FxampError, describe
from fxamp.plan import PrecisionPlan
from fxamp.policy import Policy
from fxamp.runtime.casts import AmbientCall, execution_device_type
from fxamp.runtime.checkpoints import CheckpointedModule
from fxamp.runtime.checks import check_loss, other_mode
from fxamp.runtime.conversion import Conversion
from fxamp.runtime.inspection import Inspection
from fxamp.runtime.variant import Variant
from fxamp.runtime.weights import HELD, Held, leaf_cast
from fxamp.scaling import GradScaler
from fxamp.scaling.trail import Trail, draws_numbers

__all__ = ["AmpModule", "inspect"]

_PLAIN = frozenset({torch.Tensor, nn.Parameter, int, float})  # anything else may need a graph of its own
_GUARDED = frozenset({torch._C._set_grad_enabled, enter_inference_mode, leaf_cast})


class AmpModule(CheckpointedModule):
    """A mixed-precision ``GraphModule`` that shares its parameters and buffers with the model it came from.

    It is made by ``fxamp.convert``. A submodule of the model that is called ``scaler``, ``policy``, ``graph``,
    ``code`` or the like keeps its name; ``fxamp.inspect(amp)`` then reaches what is hidden.
    """

    def __init__(self, conversion: Conversion) -> None:
        super().__init__("AmpModule")
        self.__dict__["_conversion"] = conversion
        self._adopt(conversion.program)
        self._own_checkpoints()
        self._activate()
        self.__dict__["_trail"] = Trail(self)
        _ = conversion.positional  # kept from now on: torch.compile could not find it out

    # -- running -----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, or ``(loss, output)`` when a loss was converted with it.

        Raises:
            CaptureError: when a submodule was put into another mode than the graph was traced in, or replaced.
            FxampError: when the loss is not a scalar.
            TypeError: when the arguments do not fit the signature.
        """
        conversion = self._conversion
        plain = not kwargs and len(args) == conversion.positional and _PLAIN.issuperset(map(type, args))
        variant, values = (conversion.base, args) if plain else self._variant_for(args, kwargs)
        if any(not isinstance(values[i], torch.Tensor) for i in variant.asked):
            variant, values = self._variant_for(args, kwargs, bake_numbers=True)
            variant.check_kinds(values)
        if not torch.compiler.is_compiling() and not variant.footing.holds():
            self._regain_footing(variant)
            return self.forward(*args, **kwargs)
        if plain and variant.particular and not variant.serves(values):
            variant, values = self._variant_for(args, kwargs)
        if variant.observed and not variant.fits(values):
            variant = self._compiled(conversion.by_rule(variant))
        for module, training in variant.mode_flags:
            if module.training is not training:
                raise other_mode(self, module, training)
        if not torch.compiler.is_compiling() and conversion.scaler._enabled and torch.is_grad_enabled():
            result = self._trail.run(self, variant, values)
        else:
            result = self._run(variant, values)
        if conversion.program.has_loss:
            check_loss(result[0])
        return result

    def _run(self, variant: Variant, values: Any) -> Any:
        device_type = execution_device_type(self._conversion.policy.device_type or "cpu")
        if variant.ambient and (self._conversion.held is not None or torch.is_autocast_enabled(device_type)):
            self._conversion.forget_stale_copies()  # autocast itself would hand them out as long as a region is open
        shares = variant.guarded or HELD or self._conversion.held is not None
        if shares and torch.compiler.is_compiling():
            return self._run_compiling(variant, values, device_type)
        if shares:
            return self._run_guarded(variant, values, device_type)
        if variant.ambient or torch.is_autocast_enabled(device_type):
            # The graph has its casts; one context around all opaque calls lets them share autocast's cache.
            with torch.autocast(device_type, enabled=False):
                return variant.function(self._root, *values)
        return variant.function(self._root, *values)

    def _run_guarded(self, variant: Variant, values: Any, device_type: str) -> Any:
        """For graphs that switch the grad mode, which an exception must not leave switched, and held weights."""
        grad_mode, depth = torch.is_grad_enabled(), leave_inference_modes()
        HELD.append(Held(self._conversion.held if self._conversion.held is not None else {}, {}))
        try:
            with torch.autocast(device_type, enabled=False):
                return variant.function(self._root, *values)
        finally:
            HELD.pop()
            leave_inference_modes(depth)
            torch._C._set_grad_enabled(grad_mode)

    def _run_compiling(self, variant: Variant, values: Any, device_type: str) -> Any:
        """The same in what torch.compile can trace."""
        HELD.append(Held({}, {}, []))
        try:
            with torch.autocast(device_type, enabled=False):
                return variant.function(self._root, *values)
        finally:
            HELD.pop()

    def _variant_for(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, bake_numbers: bool = False
    ) -> tuple[Variant, Sequence[Any]]:
        conversion = self._conversion
        values = conversion.program.signature.bind(args, kwargs)
        variant, given = conversion.variant_for(values, bake_numbers=bake_numbers)
        return self._compiled(variant), given

    # -- graphs ------------------------------------------------------------------------------------

    def _activate(self) -> None:
        """Makes the graph of the current mode the one that ``graph`` and ``code`` show."""
        variant = self._conversion.base
        if variant.function is None:
            self._graph = variant.graph
            variant.graph.owning_module = self
            AmpModule.recompile(self)
        self._graph, self._code = variant.graph, variant.code

    def _compiled(self, variant: Variant) -> Variant:
        if variant.function is None:
            self._compile(variant)
        return variant

    def _compile(self, variant: Variant) -> None:
        shown = self._graph, self._code
        self._graph = variant.graph
        _, function = self._generate(self._conversion.program)
        self._take(variant, function)
        self._finish(variant)
        self._graph, self._code = shown

    def _finish(self, variant: Variant) -> None:
        targets = {node.target for node in variant.graph.nodes if node.op == "call_function"}
        variant.ambient = any(isinstance(target, AmbientCall) for target in targets)
        variant.draws = draws_numbers(variant.plan)
        variant.guarded = not _GUARDED.isdisjoint(targets)
        placeholders = [node for node in variant.traced.graph.nodes if node.op == "placeholder"]
        variant.asked = tuple(i for i, node in enumerate(placeholders) if node.meta.get("asked"))
        variant.mode_flags = tuple((self._member(path), flag) for path, flag in variant.traced.modes.items() if path)
        self._show_written(variant.graph)

    def _take(self, variant: Variant, function: Any) -> None:
        """Keeps the generated function, which our ``forward`` calls with bound arguments."""
        variant.function = function
        variant.code = self._code
        variant.graph = self._graph

    def recompile(self) -> Any:
        """Regenerates the code of ``graph``, as on any GraphModule."""
        if "_root" not in self.__dict__:
            code = super().recompile()
            del type(self).forward
            return code
        variant = self._conversion.base
        code, function = self._generate(self._conversion.program)
        self._take(variant, function)
        self._finish(variant)
        return code

    def train(self, mode: bool = True) -> AmpModule:
        """Switches to the graph of the mode, and every submodule to the mode."""
        super().train(mode)
        if "_conversion" in self.__dict__:
            self._conversion.mode = "train" if mode else "eval"
            self._conversion.program.tree.train(mode)  # a model may have its own idea of it
            self._activate()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> AmpModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow_tensors()
        return self

    def _follow_tensors(self) -> None:
        if self._conversion.follow_tensors():
            self._activate()

    def _regain_footing(self, variant: Variant) -> None:
        """Makes the graphs anew for modules or tensors that changed without being told of."""
        conversion = self._conversion
        if variant.footing.needs_a_trace() or not conversion.follow_tensors():
            conversion.follow_modules()
            self._note_values()
        self._activate()

    def _remade(self, conversion: Conversion) -> AmpModule:
        """A module of another conversion."""
        return AmpModule(conversion)

    # -- copies ------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        self._settle(self._conversion.program)
        return _restore, (self._conversion.packed(pack_graph), self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> AmpModule:
        function, arguments = self.__reduce__()
        new: AmpModule = function(*copy.deepcopy(arguments, memo))
        memo[id(self)] = new
        return new

    def __fxamp_clone__(self, memo: dict[int, Any], clone: Any) -> AmpModule:
        """A copy in a clone of the model that this is a part of; its mode and its modules are its own."""
        new: AmpModule = object.__new__(type(self))
        memo[id(self)] = new
        own = {**self.__dict__, "_conversion": None, "_trail": None}
        new.__dict__.update({name: clone(value, memo) for name, value in own.items()})
        new.__dict__["_conversion"] = self._conversion.cloned(functools.partial(clone, memo=memo))
        new.__dict__["_trail"] = Trail(new)
        new._note_values()
        return new

    def __copy__(self) -> AmpModule:
        if self._conversion.frozen is None:
            return inspect(self).replan(self._conversion.policy)
        return self._copied(self._conversion.program.shared())

    def _copied(self, program: Program) -> AmpModule:
        """The same graphs on the modules of another program."""
        packed = {**self._conversion.packed(pack_graph), "program": program}
        return _restore({**packed, "scaler": copy.deepcopy(packed["scaler"])}, self.training)

    # -- what belongs to it ------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """The policy, with its device type and dtype resolved."""
        return inspect(self).policy

    @property
    def plan(self) -> PrecisionPlan:
        """The decisions of the graph of the current mode."""
        return inspect(self).plan

    @property
    def scaler(self) -> GradScaler:
        """The paired gradient scaler: it scales for float16, passes through for bfloat16, and may be replaced."""
        return inspect(self).scaler

    @scaler.setter
    def scaler(self, scaler: GradScaler) -> None:
        if not isinstance(scaler, GradScaler):
            found = describe(scaler)
            raise FxampError(f"found {found}: expected an fxamp.GradScaler", hint="it takes the place of torch's")
        self._conversion.scaler = scaler

    def report(self, measure: tuple[Any, ...] | None = None) -> Any:
        """The decisions as a table; ``print`` it, or see ``fxamp.Report``.

        Args:
            measure: positional inputs; the graph is run on them call by call, and what each call takes is in the
                column "measured".
        """
        return inspect(self).report(measure)

    def replan(self, policy: str | Policy) -> AmpModule:
        """A new module under another policy; nothing is traced again and the tensors are shared.

        Raises:
            PolicyError: when the policy does not fit the model.
        """
        return inspect(self).replan(policy)

    def freeze(self) -> AmpModule:
        """A new module for inference, in eval mode, whose weights are stored in the low dtype.

        Its outputs are bitwise those of this module in eval mode, where torch has no other kernel for weights without
        gradients (of ``nn.MultiheadAttention``), and for the kinds of calls that were made before. It shares no tensor
        with this module, and keeps none of it alive. Weights that are also used in float32 keep their dtype and get a
        low copy beside it.
        """
        return inspect(self).freeze()

    def hold_weights(self) -> Any:
        """A context in which no weight is cast twice: for gradient accumulation and evaluation loops.

        Inside it, a change made through ``.data`` is not seen; one in place, as of an optimizer, is.
        """
        return inspect(self).hold_weights()


def inspect(amp: AmpModule) -> Inspection:
    """Policy, plan, report and scaler of a converted module, whatever its submodules are called.

    Raises:
        FxampError: when ``amp`` is not a converted module.
    """
    if not isinstance(amp, AmpModule):
        raise FxampError(f"found a {type(amp).__name__}: expected an AmpModule", hint="amp = fxamp.convert(model)")
    return Inspection(amp)


def _restore(packed: Any, training: bool) -> AmpModule:
    amp = AmpModule(Conversion.unpacked(packed, unpack_graph))
    amp.__dict__["training"] = training
    return amp
