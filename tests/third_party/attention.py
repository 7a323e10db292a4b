"""Packages of one kind of network: x-transformers, vit-pytorch, conformer, vector-quantize-pytorch, torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.third_party.case import Calls, Case, call, each, ids, images, load, randn

__all__ = ["CONFORMER", "ODES", "QUANTIZERS", "VIT_PYTORCH", "X_TRANSFORMERS"]

tokens = each(lambda batch, length: call(ids(batch, length)), (2, 8), (3, 6))


def x_transformer(wrapper: str, layers: str, calls: Calls, sizes: dict[str, Any], **config: Any) -> Case:
    """A wrapper around attention layers."""

    def make() -> nn.Module:
        package = load("x_transformers")
        attention = getattr(package, layers)(dim=32, depth=2, heads=4, **config)
        model: nn.Module = getattr(package, wrapper)(max_seq_len=32, attn_layers=attention, **sizes)
        return model

    return Case(make, calls)


def vit(module: str, architecture: str, size: int = 32, **config: Any) -> Case:
    """A model of a module of vit_pytorch; the size of the images is fixed."""

    def make() -> nn.Module:
        model: nn.Module = getattr(load(f"vit_pytorch.{module}"), architecture)(**config)
        return model

    return Case(make, images(size))


def quantizer(architecture: str, **config: Any) -> Case:
    """Gives the quantized inputs, and the indices of the codes; a codebook has no gradient for integers."""
    calls = each(lambda *shape: call(torch.randn(shape)), (2, 10, 8), (3, 6, 8))
    return Case(lambda: getattr(load("vector_quantize_pytorch"), architecture)(dim=8, **config), calls, gradients=False)


class NeuralODE(nn.Module):
    """As the examples of torchdiffeq: a network is the right-hand side."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.net, self.method = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)), method
        self.odeint: Callable[..., Tensor] = load("torchdiffeq").odeint

    def forward(self, x: Tensor) -> Tensor:
        return self.odeint(lambda t, y: self.net(y), x, torch.linspace(0, 1, 4), method=self.method)[-1]


def conformer() -> nn.Module:
    model: nn.Module = load("conformer").Conformer(dim=32, depth=2, dim_head=8, heads=2, conv_kernel_size=7)
    return model


WORDS: dict[str, Any] = {"num_tokens": 64}
VIT: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48,
}  # fmt: skip

X_TRANSFORMERS: dict[str, Case] = {
    "decoder": x_transformer("TransformerWrapper", "Decoder", tokens, WORDS),
    "rotary encoder": x_transformer(
        "TransformerWrapper", "Encoder", tokens, WORDS, use_rmsnorm=True, ff_glu=True, rotary_pos_emb=True
    ),
    "continuous": x_transformer(
        "ContinuousTransformerWrapper", "Encoder", randn((2, 8, 8)), {"dim_in": 8, "dim_out": 4}, rel_pos_bias=True
    ),
}
VIT_PYTORCH: dict[str, Case] = {
    "vit": vit("vit", "ViT", **VIT, dropout=0.1, emb_dropout=0.1),
    "simple vit": vit("simple_vit", "SimpleViT", **VIT),
    "deepvit": vit("deepvit", "DeepViT", **VIT),
    "cait": vit("cait", "CaiT", cls_depth=1, **VIT),
    "xcit": vit("xcit", "XCiT", cls_depth=1, **VIT),
    "rvt": vit("rvt", "RvT", **VIT),
    "patch dropout": vit("vit_with_patch_dropout", "ViT", patch_dropout=0.25, **VIT),
    "cct": vit(
        "cct", "CCT", img_size=32, embedding_dim=32, n_conv_layers=1, kernel_size=3, num_layers=2, num_heads=2,
        mlp_ratio=2.0, num_classes=5,
    ),
}  # fmt: skip
CONFORMER: dict[str, Case] = {
    "conformer": Case(conformer, each(lambda *shape: call(torch.randn(shape)), (2, 10, 32), (3, 7, 32))),
}
QUANTIZERS: dict[str, Case] = {
    "VectorQuantize": quantizer("VectorQuantize", codebook_size=16, decay=0.8),
    "FSQ": quantizer("FSQ", levels=[8, 5, 5]),
    "ResidualVQ": quantizer("ResidualVQ", codebook_size=16, num_quantizers=2),
}
ODES: dict[str, Case] = {
    "rk4": Case(lambda: NeuralODE("rk4"), randn((3, 4))),
    "dopri5": Case(lambda: NeuralODE("dopri5"), randn((3, 4))),
}
