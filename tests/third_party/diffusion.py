"""Denoisers and autoencoders of diffusers, and of denoising-diffusion-pytorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.third_party.case import Calls, Case, call, each, load

__all__ = ["DDPM", "DIFFUSION"]

STAGES: dict[str, Any] = {"block_out_channels": (16, 32), "norm_num_groups": 8}
UNET: dict[str, Any] = {**STAGES, "layers_per_block": 1, "attention_head_dim": 8}
COUPLED: dict[str, Any] = {**UNET, "in_channels": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
CODER: dict[str, Any] = {
    **STAGES, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
HEADS: dict[str, Any] = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
LATENT: dict[str, Any] = {**HEADS, "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4}


def diffuser(architecture: str, calls: Calls, **config: Any) -> Case:
    """A model of diffusers with random weights."""

    def make() -> nn.Module:
        model: nn.Module = getattr(load("diffusers"), architecture)(**config)
        return model

    return Case(make, calls)


def times(batch: int) -> Tensor:
    return torch.arange(batch) * 4 + 3


def prompt(batch: int, length: int = 5) -> Tensor:
    return torch.randn(batch, length, 16)


def latents(batch: int, size: int = 8) -> Tensor:
    return torch.randn(batch, 4, size, size)


def positions(length: int) -> Tensor:
    return torch.arange(length * 3).reshape(length, 3).float()


SIZES = (2, 16), (3, 16), (2, 24)
noisy = each(lambda n, s: call(torch.randn(n, 3, s, s), times(n)), *SIZES)
one_time = each(lambda n, s: call(torch.randn(n, 3, s, s), 7), *SIZES)
coded = each(lambda n, s: call(torch.randn(n, 3, s, s)), *SIZES)
prompted = each(lambda n, s: call(latents(n, s), times(n), encoder_hidden_states=prompt(n)), *SIZES)
controlled = each(
    lambda n, s: call(latents(n, s), times(n), prompt(n), controlnet_cond=torch.randn(n, 3, 2 * s, 2 * s)), *SIZES
)
labelled = each(lambda n: call(latents(n), timestep=times(n), class_labels=torch.arange(n)), (2,), (3,))
captioned = each(
    lambda n: call(
        latents(n), prompt(n), timestep=times(n), added_cond_kwargs={"resolution": None, "aspect_ratio": None}
    ),
    (2,),
    (3,),
)
joint = each(lambda n: call(latents(n), prompt(n), torch.randn(n, 12), times(n)), (2,), (3,))
flux = each(
    lambda n: call(torch.randn(n, 16, 4), prompt(n), torch.randn(n, 12), times(n) / 10, positions(16), positions(5)),
    (2,),
    (3,),
)
embedded = each(lambda n: call(torch.randn(n, 16), times(n), torch.randn(n, 16), prompt(n)), (2,), (3,))
frames = each(lambda n: call(torch.randn(n, 4, 3, 8, 8), times(n), prompt(n)), (2,), (3,))

DIFFUSION: dict[str, Case] = {
    "UNet2DModel": diffuser(
        "UNet2DModel", noisy, **UNET, sample_size=16, in_channels=3, out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ),
    "UNet2DModel at one time": diffuser(
        "UNet2DModel", one_time, **UNET, sample_size=16, in_channels=3, out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ),
    "UNet2DConditionModel": diffuser(
        "UNet2DConditionModel", prompted, **COUPLED, sample_size=16, out_channels=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
    ),
    "UNet3DConditionModel": diffuser(
        "UNet3DConditionModel", frames, **{**UNET, "norm_num_groups": 8}, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16,
    ),
    "ControlNetModel": diffuser(
        "ControlNetModel", controlled, **COUPLED, cross_attention_dim=16, conditioning_embedding_out_channels=(8, 8),
    ),
    "AutoencoderKL": diffuser("AutoencoderKL", coded, **CODER, latent_channels=4),
    "AutoencoderTiny": diffuser(
        "AutoencoderTiny", coded, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ),
    "VQModel": diffuser("VQModel", coded, **CODER, latent_channels=3),
    "DiTTransformer2DModel": diffuser(
        "DiTTransformer2DModel", labelled, **LATENT, norm_num_groups=8, num_embeds_ada_norm=10,
        norm_type="ada_norm_zero", activation_fn="gelu-approximate", attention_bias=True,
    ),
    "PixArtTransformer2DModel": diffuser(
        "PixArtTransformer2DModel", captioned, **LATENT, cross_attention_dim=16, caption_channels=16, norm_num_groups=8,
    ),
    "SD3Transformer2DModel": diffuser(
        "SD3Transformer2DModel", joint, **LATENT, joint_attention_dim=16, caption_projection_dim=16,
        pooled_projection_dim=12,
    ),
    "FluxTransformer2DModel": diffuser(
        "FluxTransformer2DModel", flux, **HEADS, in_channels=4, num_single_layers=1, joint_attention_dim=16,
        pooled_projection_dim=12, axes_dims_rope=(2, 2, 4),
    ),
    "PriorTransformer": diffuser(
        "PriorTransformer", embedded, **HEADS, embedding_dim=16, num_embeddings=5, additional_embeddings=4,
    ),
}  # fmt: skip


def ddpm(architecture: str, calls: Calls, **config: Any) -> Case:
    """A network of denoising_diffusion_pytorch."""

    def make() -> nn.Module:
        package = load("denoising_diffusion_pytorch")
        model: nn.Module = getattr(package, architecture)(dim=16, dim_mults=(1, 2), **config)
        return model

    return Case(make, calls)


DDPM: dict[str, Case] = {
    "Unet": ddpm("Unet", noisy),
    "Unet1D": ddpm("Unet1D", each(lambda n, s: call(torch.randn(n, 4, s), times(n)), *SIZES), channels=4),
}
