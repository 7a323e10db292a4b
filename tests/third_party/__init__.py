"""Models of other people's packages, as they are: `make third-party` installs those."""

from __future__ import annotations

from tests.third_party.attention import CONFORMER, ODES, QUANTIZERS, VIT_PYTORCH, X_TRANSFORMERS
from tests.third_party.case import Case
from tests.third_party.diffusion import DDPM, DIFFUSION
from tests.third_party.graphs import GRAPHS
from tests.third_party.language import LANGUAGE
from tests.third_party.perception import PERCEPTION
from tests.third_party.segmentation import SEGMENTATION
from tests.third_party.tables import RECOMMENDERS, TAB_TRANSFORMERS, TABNET
from tests.third_party.timm_models import TIMM

__all__ = ["CASES", "PACKAGES"]

# Package by package, under the name that it is imported by.
PACKAGES: dict[str, dict[str, Case]] = {
    "transformers": {**LANGUAGE, **PERCEPTION},
    "timm": TIMM,
    "segmentation_models_pytorch": SEGMENTATION,
    "torch_geometric": GRAPHS,
    "diffusers": DIFFUSION,
    "denoising_diffusion_pytorch": DDPM,
    "deepctr_torch": RECOMMENDERS,
    "pytorch_tabnet": TABNET,
    "tab_transformer_pytorch": TAB_TRANSFORMERS,
    "x_transformers": X_TRANSFORMERS,
    "vit_pytorch": VIT_PYTORCH,
    "conformer": CONFORMER,
    "vector_quantize_pytorch": QUANTIZERS,
    "torchdiffeq": ODES,
}
CASES: dict[str, Case] = {
    f"{package}/{name}": case for package, cases in PACKAGES.items() for name, case in cases.items()
}
