"""Images, detection, segmentation, video, speech, and series of transformers: default configurations but for sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.third_party.case import Call, Calls, Case, call, each, ids, images
from tests.third_party.language import PAIR, SPECIAL, TINY, transformer

__all__ = ["PERCEPTION"]

VIT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
FRAMES: dict[str, Any] = {**VIT, "num_frames": 4}
SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
HEADS: dict[str, Any] = {**STAGES, "num_attention_heads": [1, 2, 2, 2]}
RESNET: dict[str, Any] = {"model_type": "resnet", "embedding_size": 8, **STAGES, "out_features": ["stage4"]}
PYRAMID: dict[str, Any] = {**RESNET, "out_features": ["stage2", "stage3", "stage4"]}
BACKBONE: dict[str, Any] = {
    "backbone_config": RESNET,
    "backbone": None,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
}
DETR: dict[str, Any] = {
    **BACKBONE, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 5, "num_labels": 3,
}  # fmt: skip
SPEECH: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "mask_time_length": 2,
}  # fmt: skip
SERIES: dict[str, Any] = {
    "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 4], "num_time_features": 2, "d_model": 16,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 1, "decoder_layers": 1,
}  # fmt: skip


def one_label(batch: int) -> Tensor:
    return torch.arange(batch) % 2


def masks(batch: int) -> Tensor:
    return torch.randint(0, 2, (batch, 64, 64))


def boxes(batch: int) -> list[dict[str, Tensor]]:
    return [{"class_labels": torch.tensor([0, 2]), "boxes": torch.rand(2, 4) * 0.4 + 0.3} for _ in range(batch)]


def captioned(batch: int, length: int) -> Call:
    mask = torch.ones(batch, length, dtype=torch.long)
    return call(input_ids=ids(batch, length), pixel_values=torch.randn(batch, 3, 32, 32), attention_mask=mask)


def video(batch: int, **given: Tensor) -> Call:
    return call(pixel_values=torch.randn(batch, 4, 3, 32, 32), **given)


def series(batch: int) -> Call:
    return call(
        past_values=torch.randn(batch, 12), past_time_features=torch.randn(batch, 12, 2),
        past_observed_mask=torch.ones(batch, 12), future_values=torch.randn(batch, 4),
        future_time_features=torch.randn(batch, 4, 2),
    )  # fmt: skip


def transcribed(batch: int, length: int) -> Call:
    return call(input_values=torch.randn(batch, length), labels=torch.randint(1, 32, (batch, 4)))


pixels = partial(images, name="pixel_values")
plain, labelled, wide = pixels(), pixels(labels=one_label), pixels(64, labels=one_label)
detected, found = pixels(64, 48, labels=boxes), pixels(64, 48)
described = each(captioned, (2, 8), (3, 6))
sound: Calls = each(transcribed, (2, 800), (3, 600))
films, classes = each(video, (2,), (3,)), each(lambda n: video(n, labels=one_label(n)), (2,), (3,))
spoken = each(
    lambda batch, length: call(input_features=torch.randn(batch, 16, 40), labels=ids(batch, length)), (2, 6), (3, 4)
)


def speech(architecture: str, **config: Any) -> Case:
    return transformer(architecture, sound, **SPEECH, **config)._replace(gradients=False)


two = {"text_config": TINY, "vision_config": VIT}

PERCEPTION: dict[str, Case] = {
    "vit": transformer("ViTForImageClassification", labelled, **VIT),
    "deit": transformer("DeiTModel", plain, **VIT),
    "beit": transformer("BeitForImageClassification", labelled, **VIT),
    "dinov2": transformer("Dinov2Model", plain, **VIT),
    "swin": transformer("SwinForImageClassification", labelled, **SWIN),
    "swinv2": transformer("Swinv2ForImageClassification", labelled, **SWIN),
    "convnext": transformer("ConvNextForImageClassification", labelled, **STAGES),
    "resnet": transformer("ResNetForImageClassification", labelled, embedding_size=8, **STAGES),
    "mobilevit": transformer(
        "MobileViTForImageClassification", wide, image_size=64, hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 16], num_attention_heads=2,
    ),
    "clip": transformer("CLIPModel", described, text_config={**TINY, "eos_token_id": 2}, vision_config=VIT),
    "siglip": transformer("SiglipModel", described, text_config={**TINY, "projection_size": 32}, vision_config=VIT),
    "blip": transformer("BlipModel", described, **two, image_text_hidden_size=16, projection_dim=16),
    "vilt": transformer("ViltModel", described, **TINY, image_size=32, patch_size=8),
    "detr": transformer("DetrForObjectDetection", found, **DETR),
    "detr with boxes": transformer("DetrForObjectDetection", detected, **DETR),
    "conditional detr": transformer("ConditionalDetrForObjectDetection", found, **DETR),
    "deformable detr": transformer("DeformableDetrForObjectDetection", found, **{
        **DETR, "backbone_config": PYRAMID, "num_feature_levels": 3, "encoder_n_points": 2, "decoder_n_points": 2,
    }),
    "yolos": transformer("YolosForObjectDetection", found, **{**VIT, "image_size": [64, 64]}, num_detection_tokens=5),
    "segformer": transformer("SegformerForSemanticSegmentation", pixels(64, labels=masks), **HEADS,
                             decoder_hidden_size=16),
    "upernet": transformer(
        "UperNetForSemanticSegmentation", pixels(64, labels=masks), hidden_size=16, pool_scales=[1, 2],
        auxiliary_in_channels=16, auxiliary_channels=8, use_auxiliary_head=True,
        backbone_config={**RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
    ),
    "dpt": transformer(
        "DPTForDepthEstimation", plain, **{**VIT, "num_hidden_layers": 4}, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
    ),
    "maskformer": transformer(
        "MaskFormerForInstanceSegmentation", pixels(64), fpn_feature_size=32, mask_feature_size=32,
        backbone_config={"model_type": "swin", **SWIN, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2],
                         "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        decoder_config={"model_type": "detr", **{k: v for k, v in DETR.items() if "backbone" not in k}},
    ),
    "clipseg": transformer(
        "CLIPSegForImageSegmentation", described, text_config={**TINY, "eos_token_id": 2}, vision_config=VIT,
        projection_dim=16, extract_layers=[0, 1], reduce_dim=16, decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
    ),
    "videomae": transformer("VideoMAEForVideoClassification", classes, **FRAMES, tubelet_size=2),
    "timesformer": transformer("TimesformerForVideoClassification", classes, **FRAMES),
    "vivit": transformer("VivitForVideoClassification", classes, **FRAMES, tubelet_size=[2, 8, 8]),
    "x-clip": transformer(
        "XCLIPModel", each(lambda n, m: video(n, input_ids=ids(m, 8), attention_mask=torch.ones(m, 8).long()),
                           (2, 3), (3, 2)),
        text_config={**TINY, "eos_token_id": 2}, projection_dim=16, prompt_layers=1, prompt_num_attention_heads=2,
        vision_config={**FRAMES, "mit_hidden_size": 16, "mit_intermediate_size": 24, "mit_num_hidden_layers": 1,
                       "mit_num_attention_heads": 2},
    ),
    "wav2vec2": speech("Wav2Vec2ForCTC"),
    "wav2vec2 without masks": speech("Wav2Vec2ForCTC", mask_time_prob=0.0),
    "hubert": speech("HubertForCTC"),
    "wavlm": speech("WavLMForCTC"),
    "wavlm without masks": speech("WavLMForCTC", mask_time_prob=0.0),
    "whisper": transformer(
        "WhisperForConditionalGeneration", spoken, num_mel_bins=16, max_source_positions=20, max_target_positions=32,
        **{k: v for k, v in PAIR.items() if k != "max_position_embeddings"}, **SPECIAL, decoder_start_token_id=1,
    ),
    "audio spectrogram transformer": transformer(
        "ASTForAudioClassification", each(lambda n: call(torch.randn(n, 40, 16), labels=one_label(n)), (2,), (3,)),
        **{k: v for k, v in VIT.items() if k != "image_size"}, max_length=40, num_mel_bins=16,
    ),
    "patchtst": transformer(
        "PatchTSTForPrediction",
        each(lambda n: call(past_values=torch.randn(n, 16, 3), future_values=torch.randn(n, 4, 3)), (2,), (3,)),
        num_input_channels=3, context_length=16, patch_length=4, patch_stride=4, d_model=16, num_hidden_layers=2,
        num_attention_heads=2, ffn_dim=24, prediction_length=4,
    ),
    "time series transformer": transformer("TimeSeriesTransformerForPrediction", each(series, (2,), (3,)), **SERIES),
    "informer": transformer("InformerForPrediction", each(series, (2,), (3,)), **SERIES),
}  # fmt: skip
