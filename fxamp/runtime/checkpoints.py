"""What is the checkpoint of a converted module? That of the model, whatever the model's own class makes of it.

The root's own ``state_dict``, extra state and the like are asked on the clone of the model, which has the same tensors
and submodules. After loading, what was derived from the state is made anew: the low copies of a frozen module, and
graphs that have Python values of modules in them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxamp.capture.state import python_state
from fxamp.capture.tracer import WHOLE
from fxamp.errors import CaptureError
from fxamp.runtime.conversion import Conversion
from fxamp.runtime.frozen import refresh
from fxamp.runtime.names import NamedGraphModule

__all__ = ["CheckpointedModule"]

_MODULE_STATE = frozenset(vars(nn.Module()))


class CheckpointedModule(NamedGraphModule):
    """A module that saves and loads what the model does, in its way."""

    _conversion: Conversion
    _values: Mapping[str, Any]  # what modules keep in Python, as it is in the graphs

    def _own_checkpoints(self) -> None:
        self._note_values()
        self.__dict__["_load_state_dict_post_hooks"] = OrderedDict(self._load_state_dict_post_hooks)
        super().register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]  # called also when a module around this one loads

    def _note_values(self) -> None:
        self.__dict__["_values"] = _python_values(self._conversion)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the model, and of the loss when it has parameters."""
        program = self._conversion.program
        if _is_torchs(program.tree.state_dict):
            return super().state_dict(*args, **kwargs)
        found = program.tree.state_dict(*args, **kwargs)
        if program.loss_tree is not None:
            prefix = f"{kwargs.get('prefix', '')}{program.loss_path}."
            keep = kwargs.get("keep_vars", False)
            found.update(program.loss_tree.state_dict(prefix=prefix, keep_vars=keep))
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the model does, from its checkpoints and those of this module."""
        program = self._conversion.program
        if _is_torchs(program.tree.load_state_dict):
            return super().load_state_dict(state_dict, *args, **kwargs)
        own, loss = _split(state_dict, program.loss_path)
        result = program.tree.load_state_dict(own, *args, **kwargs)
        if program.loss_tree is not None:
            program.loss_tree.load_state_dict(loss, *args, **kwargs)
        _loaded(self, result)
        return result

    def _save_to_state_dict(self, *args: Any) -> None:
        self._conversion.program.tree._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        program = self._conversion.program
        own, _ = _split(state_dict, f"{prefix}{program.loss_path}" if program.loss_path else "")
        program.tree._load_from_state_dict(own, prefix, *args)


def _loaded(module: Any, _: Any) -> None:
    conversion: Conversion = module._conversion
    refresh(conversion)
    module._follow_tensors()  # ``assign=True`` may bring other dtypes
    traced, now = module._values, _python_values(conversion)
    if now != traced:
        _check_traceable(conversion, next(path for path in now if now[path] != traced.get(path)))
        conversion.follow_modules()
        module._activate()
        module._note_values()


def _check_traceable(conversion: Conversion, path: str) -> None:
    """Refuses a change that graphs cannot be made anew for."""
    if conversion.frozen is None and not conversion.program.is_function:
        return
    name = conversion.program.name
    raise CaptureError(
        f"load_state_dict changed what '{path or name}' keeps in Python, which the graphs of {name} have as it was",
        hint="load it into the module and convert that again",
    )


def _python_values(conversion: Conversion) -> dict[str, Any]:
    """What the modules that were traced into keep in Python: it is in the graphs."""
    return {path: _values_of(module) for path, module in _traced_into(conversion)}


def _traced_into(conversion: Conversion) -> Iterator[tuple[str, nn.Module]]:
    graphs = [variant.traced.graph for _, variant in conversion.variants]
    called = tuple(f"{node.target}." for graph in graphs for node in graph.nodes if node.op == "call_module")
    tree = conversion.program.tree
    named = [("", tree), *((path, m) for path, m in conversion.program.whole.named_modules() if path)]
    return iter([] if f"{WHOLE}." in called else [(p, m) for p, m in named if not f"{p}.".startswith(called)])


def _values_of(module: nn.Module) -> dict[str, Any]:
    """What a module keeps beside tensors, submodules and functions, in a form that can be compared."""
    others = nn.Module | torch.Tensor
    own = {name for name, value in vars(module).items() if not (callable(value) or isinstance(value, others))}
    return {name: value for name, value in python_state(module).items() if name in own - _MODULE_STATE}


def _split(state_dict: Any, path: str) -> tuple[Any, dict[str, Any]]:
    """What belongs to the model, and what to its loss, without its path."""
    loss = {key: value for key, value in state_dict.items() if path and key.startswith(f"{path}.")}
    if not loss:
        return state_dict, {}
    own = type(state_dict)((key, value) for key, value in state_dict.items() if key not in loss)
    return own, {key.removeprefix(f"{path}."): value for key, value in loss.items()}


def _is_torchs(method: Any) -> bool:
    return getattr(method, "__func__", None) in (nn.Module.state_dict, nn.Module.load_state_dict)
