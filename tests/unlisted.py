"""Tiny random models of families that the table does not list, so that their facts come from their structure alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {**_TEXT, "head_dim": 8}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "num_kv_shared_layers": 0}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_MAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 4, "mamba_d_conv": 4, "mamba_expand": 2}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
_NEOX = {name: value for name, value in _TEXT.items() if name != "num_key_value_heads"}

# name -> (model class, configuration class, configuration)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma4_text": ("Gemma4ForCausalLM", "Gemma4TextConfig", {**_HEAD, **_PER_LAYER, "global_head_dim": 8}),
    "gemma3n_text": ("Gemma3nForCausalLM", "Gemma3nTextConfig", {**_HEAD, **_PER_LAYER, "laurel_rank": 4}),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
            "vision_config": {**_VISION, "patch_size": 4},
        },
    ),
    "modernbert-decoder": ("ModernBertDecoderForCausalLM", "ModernBertDecoderConfig", {**_NEOX, "cls_token_id": 1, "sep_token_id": 2}),
    "falcon_h1": ("FalconH1ForCausalLM", "FalconH1Config", {**_HEAD, **_MAMBA2}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", {**_TEXT, **_MLA, **_MOE, "first_k_dense_replace": 1}),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {**_TEXT, "layer_types": ["full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "pixtral": ("PixtralVisionModel", "PixtralVisionConfig", {**_NEOX, "image_size": 16, "patch_size": 4, "head_dim": 8}),
    "biogpt": ("BioGptForCausalLM", "BioGptConfig", _NEOX),
    "ernie": ("ErnieForMaskedLM", "ErnieConfig", _NEOX),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"vocab_size": 97, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}),
    "falcon_mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}),
    "mobilebert": (
        "MobileBertForMaskedLM",
        "MobileBertConfig",
        {**_NEOX, "embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32, "num_hidden_layers": 2},
    ),
    "jamba": ("JambaForCausalLM", "JambaConfig", {**_TEXT, **_MAMBA, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}),
}


def build(name: str) -> Any:
    """A model of one entry, random weights from a fixed seed, in evaluation mode."""
    model, configuration, values = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return getattr(transformers, model)(getattr(transformers, configuration)(**values)).eval()
