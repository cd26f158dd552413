"""GLM-4 of April 2025 (model type `glm4`): `glm` with norms after attention and MLP, too."""

from __future__ import annotations

from ml_models.families import decoder, glm
from ml_models.families.entries import Always
from ml_models.families.family import Family
from ml_models.families.rules import Same

_0414 = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5}

GLM4 = Family(
    name="glm4",
    model_types=("glm4",),
    architectures=("Glm4ForCausalLM",),
    config=(*glm.CONFIG, Always(post_norm=True)),
    rules=(
        *glm.RULES,
        Same(f"{decoder.LAYER}.post_attn_norm", f"{decoder.HF_LAYER}.post_self_attn_layernorm"),
        Same(f"{decoder.LAYER}.post_mlp_layernorm", f"{decoder.HF_LAYER}.post_mlp_layernorm"),
    ),
    sizes=(decoder.size("glm4-9b-0414", 9_400_279_040, glm.SHAPE_9B, _0414),),
)
