"""The end of a model: names of task heads, and the models that change logits after the output embedding."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["AFTER_HEAD", "LAST_PARTS", "TASK_HEADS"]

TASK_HEADS = frozenset(
    {
        "classification_head",
        "classifier",
        "cls_classifier",
        "distillation_classifier",
        "logits_proj",
        "multiple_choice_head",
        "pre_classifier",
        "qa_classifier",
        "qa_outputs",
        "score",
    }
)
"""Names of task heads at the root of transformers' models."""

LAST_PARTS = frozenset(
    {"final_layer_norm", "final_layernorm", "final_norm", "layer_norm", "layernorm", "ln_f", "norm", "norm_f", "pooler", "project_out"}
)
"""Names of parts that run after the last layer. A part of another name may be read by the layers (relative positions)
or come before them although it is registered after them (BART's ``layernorm_embedding``)."""

_ALWAYS = ("", None)

AFTER_HEAD: Mapping[str, tuple[str, float | None]] = MappingProxyType(
    {
        # a bias is added
        **dict.fromkeys(
            (
                "bart",
                "bigbird_pegasus",
                "blenderbot",
                "blenderbot-small",
                "bridgetower",
                "esm",
                "led",
                "lxmert",
                "marian",
                "mbart",
                "mvp",
                "pegasus",
                "plbart",
            ),
            _ALWAYS,
        ),
        # logits are capped if a cap is set
        **dict.fromkeys(
            (
                "beam",
                "gemma2",
                "gemma3",
                "gemma3_text",
                "gemma3n",
                "gemma3n_text",
                "gemma4",
                "gemma4_text",
                "gemma4_unified",
                "gemma4_unified_text",
                "nanochat",
                "paligemma",
                "t5gemma",
                "t5gemma2",
                "vaultgemma",
            ),
            ("final_logit_softcapping", None),
        ),
        # logits are scaled unless the factor is one
        **dict.fromkeys(
            (
                "granite",
                "granite4_vision",
                "granite_docling",
                "granite_swa",
                "granitemoe",
                "granitemoe_swa",
                "granitemoehybrid",
                "granitemoeshared",
                "hyperclovax",
                "hyperclovax_vision_v2",
            ),
            ("logits_scaling", 1.0),
        ),
        **dict.fromkeys(("cohere", "cohere2", "cohere2_moe", "cohere_compass", "cohere_compass_text"), ("logit_scale", 1.0)),
        # several steps, or always
        **dict.fromkeys(
            (
                "chameleon",
                "diffusion_gemma",
                "falcon_h1",
                "inkling2",
                "inkling2_text",
                "inkling_mm_model",
                "inkling_text",
                "mistral_large4",
                "mistral_large4_text",
                "muse_glimmer",
                "muse_spark",
                "recurrent_gemma",
                "xlstm",
            ),
            _ALWAYS,
        ),
    }
)
"""``config.model_type`` of models that change logits after the output embedding -> (configuration field, the value that
changes nothing); ``("", None)``: always. From transformers 5.23."""
