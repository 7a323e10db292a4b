"""What is known not to work, and why: a part of the error's first line. A test fails when that changes."""

from __future__ import annotations

__all__ = ["DIFFERENT", "REFUSED"]

MASK = "padding_mask"  # transformers asks whether a mask masks anything
OUTPUT = "this call goes another way through the model"  # what the trace decided about its own output does not hold
OBJECT = "of a tensor"  # an attribute of what an opaque call returned is set
HOOKS = "changes self._forward_hooks"
NUMPY = "draws from numpy's random numbers"
KIND = "asks for the type of a value"
LAYOUT = "`if src.layout == torch.sparse_coo`"

# Frontend, then case.
REFUSED: dict[str, dict[str, str]] = {
    "convert": {
        "transformers/bert": MASK,
        "transformers/deberta": "without overflow",  # eager autocast cannot run it either
        "transformers/canine": "if self.config.pad_token_id in input_ids",
        "transformers/gpt2 without labels": MASK,
        "transformers/llama without labels": MASK,
        "transformers/mixtral": OUTPUT,
        "transformers/mamba": OUTPUT,
        "transformers/mamba2": OUTPUT,
        "transformers/m2m100": OUTPUT,
        "transformers/clip": OBJECT,
        "transformers/vilt": KIND,
        "transformers/detr": OUTPUT,
        "transformers/detr with boxes": OBJECT,
        "transformers/conditional detr": OUTPUT,
        "transformers/deformable detr": "cannot be interpreted as an integer",
        "transformers/segformer": HOOKS,
        "transformers/dpt": HOOKS,
        "transformers/clipseg": OBJECT,
        "transformers/wav2vec2": NUMPY,
        "transformers/hubert": NUMPY,
        "transformers/wavlm": NUMPY,
        "transformers/time series transformer": KIND,
        "transformers/informer": KIND,
        "torch_geometric/TransformerConv": "sets self._alpha",
        "torch_geometric/ChebConv": LAYOUT,
        "torch_geometric/RGCNConv": "depends on a tensor value",
        "torch_geometric/PointTransformerConv": LAYOUT,
        "torch_geometric/GCN on graphs": KIND,
        "torch_geometric/GAT on graphs": KIND,
        "denoising_diffusion_pytorch/Unet": OUTPUT,
        "deepctr_torch/AutoInt": "must have the same dtype",  # eager autocast cannot run it either
        "pytorch_tabnet/TabNet": "switches autocast or the grad mode without a `with`",
        "tab_transformer_pytorch/TabTransformer": "if is_special_token.any()",
        "x_transformers/decoder": OBJECT,
        "x_transformers/rotary encoder": OBJECT,
        "vit_pytorch/xcit": OUTPUT,
        "vector_quantize_pytorch/VectorQuantize": "input_requires_grad",
        "vector_quantize_pytorch/ResidualVQ": KIND,
        "torchdiffeq/rk4": "depends on a tensor value",
        "torchdiffeq/dopri5": "depends on a tensor value",
    },
    "backend": {},
}

# Wrong results that are known, and the first difference.
DIFFERENT: dict[str, dict[str, str]] = {
    "convert": {
        # A cache of the user's code keeps a tensor that the planning made.
        "transformers/maskformer": "FakeTensor, expected Tensor",
        # A write to a new tensor counts as one to the input, which is then cast again where autocast keeps its copy.
        "torch_geometric/SignedGCN": "gradients.input 0: bits differ",
    },
    "backend": {},
}
