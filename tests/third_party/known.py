"""What is known not to work, and why: a part of the error's first line. A test fails when that changes."""

from __future__ import annotations

__all__ = ["DIFFERENT", "REFUSED"]

WHOLE = "no frontend can make one graph of the model"  # it goes by data that it computes, or keeps state

# Frontend, then case.
REFUSED: dict[str, dict[str, str]] = {
    "convert": {
        "transformers/deberta": "without overflow",  # eager autocast cannot run it either
        "transformers/vilt": WHOLE,
        "transformers/detr with boxes": "sets the attribute 'persistent' of a tensor",
        "transformers/segformer": WHOLE,
        "transformers/dpt": WHOLE,
        "transformers/clipseg": WHOLE,
        "transformers/wav2vec2": WHOLE,
        "transformers/hubert": WHOLE,
        "transformers/wavlm": WHOLE,
        "transformers/time series transformer": WHOLE,
        "transformers/informer": WHOLE,
        "torch_geometric/RGCNConv": WHOLE,
        "torchdiffeq/rk4": WHOLE,
        "torchdiffeq/dopri5": WHOLE,
    },
    "backend": {
        "transformers/deberta": "without overflow",  # eager autocast cannot run these either
        "deepctr_torch/AutoInt": "making fake tensor call",
    },
}

# What Dynamo makes of these is not the model to the last bit, under torch.compile(backend="eager") neither.
EMBEDDING = "embed_tokens.weight: bits differ"
DIFFERENT: dict[str, dict[str, str]] = {
    "convert": {},
    "backend": {
        **dict.fromkeys(
            (f"transformers/{name}" for name in (
                "llama", "llama without labels", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma3",
            )),
            EMBEDDING,
        ),
        "transformers/mamba": "A_log: bits differ",
        "transformers/t5": "relative_attention_bias.weight: bits differ",
        "transformers/blip": "bits differ",
        "transformers/vilt": "bits differ",
    },
}  # fmt: skip
