"""Under which names does a graph read what is not computed in it?

Parameters and buffers by their path, tensors and objects that no module owns by names of our own. An object that holds
traced values is made again in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

from fxamp.capture.builtins import unpatched
from fxamp.capture.deciding import DecidingTracer
from fxamp.capture.facts import Facts
from fxamp.capture.generators import Generators
from fxamp.capture.members import owns
from fxamp.capture.objects import is_literal, is_remade, parts_of, refuse_what_is_traced
from fxamp.capture.proxy import AmpParameterProxy
from fxamp.capture.reach import reachable
from fxamp.capture.setting import Setting

__all__ = ["ReadingTracer"]

_AS_THEY_ARE: Final = frozenset({int, float, bool, str, type(None), torch.dtype})


class ReadingTracer(DecidingTracer):
    """A tracer that knows what the modules own.

    After a trace ``strangers`` has the modules and tensors that were used and are not of these modules.

    Args:
        modules: path to module.
        originals: the user's own modules by path; a function put into one may still reach these.
        extras: tensors and objects that no module owns, by the name they are read under; new ones are added.
        function: what is traced when it is no module.
        facts, setting, of_parameters: as for ``DecidingTracer``.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        originals: Mapping[str, nn.Module],
        extras: dict[str, Any],
        facts: Facts | None,
        setting: Setting,
        of_parameters: Callable[[], Facts] | None,
        function: Any = None,
    ) -> None:
        super().__init__(facts, setting, of_parameters)
        self.extras = extras
        self.strangers: list[Any] = []
        self._made: list[nn.Module] = []  # by the program itself, while it is traced
        self._returned = False  # from the entry point: what comes now is the output
        self._generators = Generators(modules.values(), function)
        self._proxies: dict[str, AmpParameterProxy] = {}
        self._by_path = modules
        self._originals = {id(module) for module in originals.values()}.difference(map(id, modules.values()))
        known = [*((path, originals[path]) for path in modules if path in originals), *modules.items()]
        self._modules = {id(module): path for path, module in known}
        self._tensors: dict[int, str] = {}
        for path, module in modules.items():
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, tensor in own:
                self._tensors.setdefault(id(tensor), f"{path}.{name}".lstrip("."))

    def path_of_module(self, mod: nn.Module) -> str:
        path = self._modules.get(id(mod))
        if path is None:
            raise NameError(f"calls a {type(mod).__name__} that is no submodule of the model")
        return path

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if isinstance(attr_val, torch.Tensor) and id(attr_val) in self._tensors and not self._facts_run():
            return self._tensor_proxy(attr_val)
        return attr_val

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if kind in _AS_THEY_ARE:
            return a
        if isinstance(a, fx.Proxy):
            return a.node
        if kind is tuple:  # the arguments of most calls: torch.fx would ask many more questions
            return tuple([self.create_arg(item) for item in a])
        if isinstance(a, torch.Tensor):
            return self._tensor_proxy(a).node
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        return super().create_arg(a) if is_literal(a) else self._object(a)

    def _tensor_proxy(self, tensor: torch.Tensor) -> fx.Proxy:
        name = self._path_of(tensor) or self._from_outside(tensor)
        if name not in self._proxies:
            node = self.create_node("get_attr", name, (), {})
            self._proxies[name] = AmpParameterProxy(node, self, tensor)
        return self._proxies[name]

    def _path_of(self, tensor: torch.Tensor) -> str | None:
        """Where a module has a tensor, as a parameter, a buffer or a plain attribute."""
        return self._tensors.get(id(tensor)) or self.tensor_attrs.get(tensor)

    def _tensor_of(self, path: str) -> torch.Tensor | None:
        """The parameter, buffer or constant of this name; a plain attribute is none, for a graph may set it."""
        if path in self.extras:
            found = self.extras[path]
        else:
            owner, _, name = path.rpartition(".")
            module = self._by_path.get(owner)
            kept = ({**module._parameters, **module._buffers}) if module is not None else {}
            found = kept.get(name)
        return found if isinstance(found, torch.Tensor) else None

    def _from_outside(self, tensor: torch.Tensor) -> str:
        """The name of a tensor that no module has."""
        self._meet(tensor)
        name = self._tensors[id(tensor)] = self._extra(tensor)
        return name

    def _was_sized(self, tensor: torch.Tensor) -> bool:
        return any(proxy.node.meta.get("sized") and proxy._tensor is tensor for proxy in self._proxies.values())

    def _check_forwards(self, module: nn.Module) -> None:
        """Refuses to leave a module a call that would go on to the user's own modules, and to their modes."""
        for path, part in module.named_modules():
            own = part.__dict__.get("forward") if not isinstance(part, torch.jit.ScriptModule) else None
            for _, value in reachable({"": own}) if own is not None else ():
                if id(value) in self._originals:
                    what = f"calls the forward that was set on {type(part).__name__} '{path}'".replace(" ''", "")
                    raise TraceError(f"{what}, which uses the model that was converted and not the result")

    def _meet(self, stranger: nn.Module | torch.Tensor) -> None:
        """Notes what is used and was not known to be the model's; a function turns out to own it."""
        if not self._facts_run() and not any(stranger is made for made in self._made):
            self.strangers.append(stranger)

    def _extra(self, value: Any) -> str:
        name = next((key for key, known in self.extras.items() if known is value), None)
        if name is None:
            name = f"_constant_{len(self.extras)}"
            while owns(self._by_path[""], name):
                name += "_"
            self.extras[name] = value
        return name

    def _object(self, value: Any) -> fx.Node:
        """An object of Python's: made again at every call, or handed on when it holds no traced value."""
        value = unpatched(value)
        if isinstance(value, torch.Generator):
            self._generators.check(value)
        if not is_remade(value):
            try:
                refuse_what_is_traced(value)
                return self.create_node("get_attr", self._extra(value), (), {})
            except TraceError:
                if not self._returned or callable(value):
                    raise  # whom it is handed to may write to it, which this trace could not see
        made, parts = parts_of(value)
        return self.create_node("call_function", made, tuple(self.create_arg(part) for part in parts), {})
