"""The models that two ranks train in the tests of the scaler, and what spreads them over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy, fully_shard

import fxamp


def small_model() -> nn.Sequential:
    """The same on all ranks."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


class Words(nn.Sequential):
    """A model whose first gradient is sparse."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(nn.Embedding(6, 3, sparse=True), nn.Linear(3, 1))

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward((x * 100).long() % 6)


class First(nn.Linear):
    """One parameter with one number, which a rank alone has when it is spread."""

    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)
        nn.init.constant_(self.weight, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[:, :1])


class Squares(nn.Module):
    """Squares that float16 holds of small inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.inner(x) ** 2).sum()


def converted(model: nn.Module, **lower: str) -> nn.Module:
    """To float16, with rules for operators."""
    policy = fxamp.Policy.autocast().with_ops(lower)
    return fxamp.convert(model, dtype=torch.float16, device_type="cpu", policy=policy)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "small": small_model,
    "sparse": Words,
    "float16": lambda: small_model().half(),
    "one number": First,
    "converted": lambda: converted(small_model()),
}

# -- fully_shard ---------------------------------------------------------------------------------------------


def _layers(model: nn.Sequential) -> nn.Module:
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def _first_layer(model: nn.Sequential) -> nn.Module:
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
    return model


SHARDED: dict[str, Callable[[Any], nn.Module]] = {
    "whole": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (2,))),
    "layers": _layers,
    "converted": lambda model: fully_shard(converted(model), mesh=init_device_mesh("cpu", (2,))),
    "first layer": _first_layer,
}

# -- FullyShardedDataParallel ----------------------------------------------------------------------------------

FLAT: dict[str, dict[str, Any]] = {
    "full": {"sharding_strategy": ShardingStrategy.FULL_SHARD, "use_orig_params": False},
    "full, original": {"sharding_strategy": ShardingStrategy.FULL_SHARD, "use_orig_params": True},
    "gradients": {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP, "use_orig_params": False},
    "gradients, original": {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP, "use_orig_params": True},
    "float16 gradients": {"mixed_precision": MixedPrecision(torch.float16, keep_low_precision_grads=True)},
}


def flat(model: nn.Module, layout: str = "full") -> FullyShardedDataParallel:
    """Parameters in one vector, of which each rank has a part."""
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **FLAT[layout])
