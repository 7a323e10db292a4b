"""Which modules are traced, under which names?"""

from __future__ import annotations

from torch import nn

__all__ = ["free_name", "is_torchs", "paths_of"]


def paths_of(root: nn.Module, loss: nn.Module | None, loss_path: str) -> dict[str, nn.Module]:
    """Every module by its path; one that has several keeps the first."""
    found = dict(root.named_modules())
    if loss is not None:
        found.update({f"{loss_path}.{path}".rstrip("."): module for path, module in loss.named_modules()})
    return found


def free_name(tree: nn.Module, name: str) -> str:
    """The name, with as many ``_`` behind it as it takes for the module to have nothing of that name."""
    while hasattr(tree, name):
        name += "_"
    return name


def is_torchs(module: nn.Module) -> bool:
    """Whether a module is torch's own and no container: its forward is not the user's to change."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(module).__module__.startswith("torch.nn.modules") and type(module) not in (
        nn.Module,
        *containers,
    )
