"""Which weights can be stored in the low dtype for inference?

A parameter whose every use is a cast to one low dtype is stored in that dtype and its casts go. One
that is also used as it is keeps its dtype, and its low copies become buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

__all__ = ["fold_weight_casts"]


def fold_weight_casts(tree: nn.Module, graphs: Sequence[fx.Graph]) -> None:
    """Replaces the weight casts of the graphs by weights in the low dtype, in place.

    Args:
        tree: the module tree the graphs run on; its parameters are replaced, not changed.
        graphs: all graphs that run on it.
    """
    casts: dict[str, list[fx.Node]] = {}
    plain: set[str] = set()
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "get_attr" and isinstance(_get(tree, str(node.target)), torch.Tensor):
                for user in node.users:
                    if _is_weight_cast(user):
                        casts.setdefault(str(node.target), []).append(user)
                    else:
                        plain.add(str(node.target))
    shared = _owners(tree)
    for path, nodes in casts.items():
        dtypes = {node.meta["cast"].dtype for node in nodes}
        weight = _get(tree, path)
        opaque = any(name not in casts for name in shared.get(id(weight), ()))
        if path not in plain and len(dtypes) == 1 and not opaque:
            _store(tree, shared[id(weight)], weight.detach().to(dtypes.pop()))
            for node in nodes:
                _replace(node, path)
        else:
            for node in nodes:
                dtype = node.meta["cast"].dtype
                name = f"_frozen_{path.replace('.', '_')}_{str(dtype).removeprefix('torch.')}"
                if name not in tree._buffers:
                    tree.register_buffer(name, weight.detach().to(dtype), persistent=False)
                _replace(node, name)


def _is_weight_cast(node: fx.Node) -> bool:
    cast = node.meta.get("cast")
    return cast is not None and cast.weight and not cast.leaf_only


def _replace(node: fx.Node, path: str) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        low = graph.create_node("get_attr", path, name=node.name)
    low.meta = {**{k: v for k, v in node.meta.items() if k != "cast"}, "module_of": path}
    weight = node.args[0]
    node.replace_all_uses_with(low)
    graph.erase_node(node)
    if isinstance(weight, fx.Node) and not weight.users:
        graph.erase_node(weight)


def _owners(tree: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter; tied weights have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in tree.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _store(tree: nn.Module, names: list[str], low: torch.Tensor) -> None:
    parameter = nn.Parameter(low, requires_grad=False)
    for name in names:
        path, _, last = name.rpartition(".")
        tree.get_submodule(path)._parameters[last] = parameter


def _get(tree: nn.Module, path: str) -> Any:
    owner, _, last = path.rpartition(".")
    return getattr(tree.get_submodule(owner), last, None)
