"""Segmentation: encoders and decoders of segmentation_models_pytorch."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.third_party.case import Case, images, load

__all__ = ["SEGMENTATION"]


def segmentation(architecture: str, encoder: str = "tu-resnet10t", size: int = 64, **config: Any) -> Case:
    """A model with an encoder of random weights, asked for two classes, on two sizes of images."""

    def make() -> nn.Module:
        kind = getattr(load("segmentation_models_pytorch"), architecture)
        model: nn.Module = kind(encoder, encoder_weights=None, classes=2, **config)
        return model

    return Case(make, images(size, size + 32))


SEGMENTATION: dict[str, Case] = {
    "unet": segmentation("Unet"),
    "unet with attention": segmentation("Unet", decoder_attention_type="scse"),
    "unet++": segmentation("UnetPlusPlus"),
    "fpn": segmentation("FPN"),
    "pspnet": segmentation("PSPNet"),
    "deeplabv3+": segmentation("DeepLabV3Plus"),
    "linknet": segmentation("Linknet"),
    "manet": segmentation("MAnet"),
    "segformer": segmentation("Segformer"),
    "upernet": segmentation("UPerNet"),
}
