"""Tiny random models of every family in the table, made from their configuration classes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

_TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_TEXT, "num_key_value_heads": 2}
_HEAD = {**_GQA, "head_dim": 8}
_GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16, "patch_size": 8}
_SOUND = {
    **_TEXT,
    "conv_dim": (16, 16),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
_TOWERS = {"text_config": dict(_TEXT), "vision_config": dict(_IMAGE)}
_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_RELATIVE = {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}

# name -> (model class, configuration class where its name is not the model's stem + "Config", configuration)
MODELS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", None, _GQA),
    "mistral": ("MistralForCausalLM", None, _GQA),
    "qwen2": ("Qwen2ForCausalLM", None, _GQA),
    "qwen3": ("Qwen3ForCausalLM", None, _HEAD),
    "gemma": ("GemmaForCausalLM", None, _HEAD),
    "gemma2": ("Gemma2ForCausalLM", None, {**_HEAD, "final_logit_softcapping": 0.5}),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", _HEAD),
    "olmo": ("OlmoForCausalLM", None, _GQA),
    "olmo2": ("Olmo2ForCausalLM", None, _GQA),
    "granite": ("GraniteForCausalLM", None, {**_GQA, "logits_scaling": 2.0}),
    "granite unscaled": ("GraniteForCausalLM", None, {**_GQA, "logits_scaling": 1.0}),
    "smollm3": ("SmolLM3ForCausalLM", None, _GQA),
    "stablelm": ("StableLmForCausalLM", None, _GQA),
    "stablelm parallel": ("StableLmForCausalLM", None, {**_GQA, "use_parallel_residual": True}),
    "cohere": ("CohereForCausalLM", None, _GQA),
    "cohere2": ("Cohere2ForCausalLM", None, _GQA),
    "nemotron": ("NemotronForCausalLM", None, _GQA),
    "starcoder2": ("Starcoder2ForCausalLM", None, _GQA),
    "glm": ("GlmForCausalLM", None, _HEAD),
    "glm4": ("Glm4ForCausalLM", None, _HEAD),
    "phi": ("PhiForCausalLM", None, _TEXT),
    "phi3": ("Phi3ForCausalLM", None, _GQA),
    "mixtral": ("MixtralForCausalLM", None, {**_GQA, "num_local_experts": 4}),
    "olmoe": ("OlmoeForCausalLM", None, {**_GQA, **_MOE}),
    "gpt_oss": ("GptOssForCausalLM", None, {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        None,
        {**_GQA, **_MOE, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", None, {**_HEAD, **_MOE, "moe_intermediate_size": 16, "mlp_only_layers": [0]}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        None,
        {
            **_TEXT,
            **_MLA,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 16,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", None, _GPT),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", None, _GPT),
    "gpt_bigcode many keys": ("GPTBigCodeForCausalLM", None, {**_GPT, "multi_query": False}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        None,
        {
            "vocab_size": 97,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gptj": ("GPTJForCausalLM", None, {**_GPT, "rotary_dim": 4}),
    "codegen": ("CodeGenForCausalLM", None, {**_GPT, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXForCausalLM", None, _TEXT),
    "gpt_neox sequential": ("GPTNeoXForCausalLM", None, {**_TEXT, "use_parallel_residual": False}),
    "bloom": ("BloomForCausalLM", None, {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}),
    "falcon": ("FalconForCausalLM", None, _TEXT),
    "falcon new": ("FalconForCausalLM", None, {**_TEXT, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon sequential": ("FalconForCausalLM", None, {**_TEXT, "multi_query": False, "parallel_attn": False, "alibi": True}),
    "mpt": ("MptForCausalLM", None, {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "opt": (
        "OPTForCausalLM",
        None,
        {
            "vocab_size": 97,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            "pad_token_id": 0,
        },
    ),
    "bert": ("BertForMaskedLM", None, _TEXT),
    "roberta": ("RobertaForMaskedLM", None, _TEXT),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", None, _TEXT),
    "camembert": ("CamembertForMaskedLM", None, _TEXT),
    "electra": ("ElectraForSequenceClassification", None, {**_TEXT, "embedding_size": 16}),
    "mpnet": ("MPNetForMaskedLM", None, _TEXT),
    "deberta": ("DebertaForSequenceClassification", None, _RELATIVE),
    "deberta-v2": ("DebertaV2ForSequenceClassification", None, {**_RELATIVE, "share_att_key": False}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        None,
        {"vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    ),
    "albert": ("AlbertForMaskedLM", None, {**_TEXT, "embedding_size": 16}),
    "modernbert": ("ModernBertForMaskedLM", None, {**_TEXT, "cls_token_id": 1, "sep_token_id": 2}),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", None, {**_SOUND, "classifier_proj_size": 8}),
    "hubert": ("HubertForCTC", None, _SOUND),
    "t5": ("T5ForConditionalGeneration", None, _T5),
    "mt5": ("MT5ForConditionalGeneration", None, {**_T5, "feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", None, _SEQ2SEQ),
    "mbart": ("MBartForConditionalGeneration", None, _SEQ2SEQ),
    "marian": ("MarianMTModel", "MarianConfig", _SEQ2SEQ),
    "pegasus": ("PegasusForConditionalGeneration", None, _SEQ2SEQ),
    "blenderbot": ("BlenderbotForConditionalGeneration", None, _SEQ2SEQ),
    "whisper": (
        "WhisperForConditionalGeneration",
        None,
        {
            **{k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"},
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
        },
    ),
    "vit": ("ViTForImageClassification", None, _IMAGE),
    "deit": ("DeiTForImageClassification", None, _IMAGE),
    "beit": ("BeitForImageClassification", None, _IMAGE),
    "dinov2": ("Dinov2ForImageClassification", None, _IMAGE),
    "dinov2 gated": ("Dinov2ForImageClassification", None, {**_IMAGE, "use_swiglu_ffn": True}),
    "swin": (
        "SwinForImageClassification",
        None,
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2},
    ),
    "clip": ("CLIPModel", None, {**_TOWERS, "projection_dim": 16}),
    "clip_text_model": ("CLIPTextModelWithProjection", "CLIPTextConfig", _TEXT),
    "clip_vision_model": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", _IMAGE),
    "siglip": ("SiglipModel", None, _TOWERS),
    "siglip_text_model": ("SiglipTextModel", "SiglipTextConfig", _TEXT),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipVisionConfig", _IMAGE),
}


def config(name: str) -> Any:
    """The tiny configuration of one entry."""
    model, configuration, values = MODELS[name]
    stem = model.split("For")[0].removesuffix("LMHeadModel").removesuffix("Model")
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    return getattr(transformers, configuration or f"{stem}Config")(**values)


def build(name: str, model_class: str | None = None) -> Any:
    """A model of one entry, random weights from a fixed seed, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return getattr(transformers, model_class or MODELS[name][0])(config(name)).eval()


@cache
def shared(name: str) -> Any:
    """As :func:`build`, one for all tests that only look."""
    return build(name)


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Something the model takes."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 97, (2, 7), generator=generator)
    made = {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
        "input_values": torch.randn(2, 100, generator=generator),
        "input_features": torch.randn(2, 8, 32, generator=generator),
    }
    settings: Any = model.config
    if isinstance(settings.to_dict().get("eos_token_id"), int):
        ids[:, -1] = settings.eos_token_id
    given = {str(model.main_input_name): made[str(model.main_input_name)]}
    if settings.is_encoder_decoder and "Classification" not in type(model).__name__:
        given["decoder_input_ids"] = ids[:, :5]
    if settings.model_type in ("clip", "siglip"):
        given["pixel_values"] = made["pixel_values"]
    return given
