"""Networks of timm, of families that differ in their blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from tests.third_party.case import Case, images, load

__all__ = ["TIMM"]


def timm(name: str, size: int = 64, *, other: int | None = 96, slow: bool = False, **config: Any) -> Case:
    """A model of timm with random weights; ``other`` is a second size of the images, None where one is fixed."""

    def make() -> nn.Module:
        model: nn.Module = load("timm").create_model(name, pretrained=False, num_classes=5, **config)
        return model

    return Case(make, images(size, *([] if other is None else [other])), slow=slow)


fixed = partial(timm, other=None)
TINY: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
small = partial(fixed, size=32, **TINY)
patches_of_14 = partial(fixed, size=28, img_size=28, depth=2)
STAGES: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 4)}

TIMM: dict[str, Case] = {
    "resnet": timm("resnet10t"),
    "resnet18": timm("resnet18"),
    "seresnext": timm("seresnext26t_32x4d"),
    "resnest": timm("resnest14d"),
    "efficientnet": timm("efficientnet_b0", other=None),
    "mobilenetv3": timm("mobilenetv3_small_050"),
    "mobilenetv4": timm("mobilenetv4_conv_small"),
    "regnet": timm("regnety_002"),
    "densenet": timm("densenet121", other=None, slow=True),
    "inception": fixed("inception_v3", 96),
    "vgg": fixed("vgg11_bn", 32, slow=True),
    "dla": timm("dla34"),
    "hrnet": timm("hrnet_w18_small", other=None),
    "convnext": timm("convnext_atto"),
    "ghostnet": timm("ghostnet_100", other=None),
    "repvgg": timm("repvgg_a0"),
    "nfnet": timm("nfnet_l0", other=None),
    "edgenext": timm("edgenext_xx_small"),
    "fastvit": timm("fastvit_t8"),
    "efficientvit": timm("efficientvit_b0"),
    "poolformer": timm("poolformer_s12", other=None),
    "mobilevit": timm("mobilevit_xxs"),
    "lambda resnet": timm("lambda_resnet26t"),
    "vit": small("vit_tiny_patch16_224"),
    "deit3": small("deit3_small_patch16_224"),
    "dinov2": patches_of_14("vit_small_patch14_reg4_dinov2", embed_dim=32, num_heads=2),
    "beit": small("beit_base_patch16_224"),
    "eva02": patches_of_14("eva02_tiny_patch14_224", embed_dim=48, num_heads=3),
    "swin": fixed("swin_tiny_patch4_window7_224", 56, img_size=56, **STAGES),
    "swinv2": fixed("swinv2_tiny_window8_256", img_size=64, **STAGES),
    "cait": small("cait_xxs24_224"),
    "xcit": small("xcit_nano_12_p16_224"),
    "convit": small("convit_tiny", local_up_to_layer=1),
    "crossvit": fixed("crossvit_tiny_240", 240, img_size=240, slow=True),
    "mixer": fixed("mixer_s32_224", 224, slow=True),
    "gmlp": fixed("gmlp_ti16_224", 224, slow=True),
    "visformer": fixed("visformer_tiny", img_size=64),
    "pvt": timm("pvt_v2_b0"),
    "coatnet": fixed("coatnet_0_rw_224", img_size=64, slow=True),
    "focalnet": timm("focalnet_tiny_srf", other=None),
}
