"""Which values of a traced graph have gradients?

That follows from the parameters and inputs that do, and from the grad mode that each call is made in, which the graph
switches where the model does.
"""

from __future__ import annotations

import torch
from torch import fx

from fxamp.capture.calls import enter_inference_mode, exit_inference_mode

# The question itself: a model's own is noted while it is traced.
_is_grad_enabled = torch.is_grad_enabled

__all__ = ["GradModes"]


class GradModes:
    """Follows the grad mode through a graph, from its start.

    Args:
        enabled: the one around the model; None when nobody is to be told.
    """

    def __init__(self, enabled: bool | None) -> None:
        self._enabled = enabled
        self._before: dict[fx.Node, bool | None] = {}
        self._lost: set[fx.Node] = set()
        self._follow: set[fx.Node] = set()

    def read(self, node: fx.Node) -> None:
        """Goes on to a node."""
        if node.target is _is_grad_enabled:
            self._before[node] = self._enabled
        elif node.target is torch._C._set_grad_enabled:
            mode = node.args[0]
            self._enabled = self._before.get(mode) if isinstance(mode, fx.Node) else bool(mode)
        elif node.target in (enter_inference_mode, exit_inference_mode):
            self._enabled = None
        if self._enabled is None or not self._lost.isdisjoint(node.all_input_nodes):
            self._lost.add(node)
        if not self._follow.isdisjoint(node.all_input_nodes):
            self._follow.add(node)

    def lose(self, node: fx.Node) -> None:
        """The value of a node does not say whether it has gradients."""
        self._lost.add(node)

    def enter(self) -> None:
        """Switches to the grad mode where the graph has been read to."""
        if self._enabled is not None:
            torch._C._set_grad_enabled(self._enabled)

    def tell(self, node: fx.Node) -> bool:
        """Whether it is known if the value that a node asks of has gradients."""
        self._follow.add(node)
        return node not in self._lost

    def decide(self, node: fx.Node) -> bool:
        """Whether a value follows from what has gradients."""
        return node in self._follow
