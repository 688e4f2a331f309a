"""Tiny random models under the hub names that HF peft's tests use, so that they run without a hub.

Classes and architectures are those on the hub, sizes are our own. Weights are drawn once (standard deviation 0.2, so
that outputs differ visibly). The padding token, whose embedding is zero, is not among the ids that the tests use.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

VOCABULARY = 1024
_SHARED = {"vocab_size": VOCABULARY, "pad_token_id": 3, "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.2}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_SHARED,
}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    **_SHARED,
}
_OPT = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    **_SHARED,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **_SHARED}
_GPTJ = _GPT2 | {"rotary_dim": 4}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
    "init_std": 0.2,
    **{k: v for k, v in _SHARED.items() if k != "initializer_range"},
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "dropout_rate": 0.0,
    "initializer_factor": 3.0,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPT", _OPT),
    "peft-internal-testing/opt-125m": ("OPT", _OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2", _GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2", _GPT2),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2", _GPT2),
    "gpt2": ("GPT2", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJ", _GPTJ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", _LLAMA),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("Llama", _LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2", _LLAMA),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3", _LLAMA | {"head_dim": 8}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("Mistral", _LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3Text", _LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "bert-base-uncased": ("Bert", _BERT),
    "peft-internal-testing/tiny-random-BertModel": ("Bert", _BERT),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("Bert", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("Roberta", _BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("Roberta", _BERT),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("Bart", _BART),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5", _T5),
}
"""Hub name → (prefix of the configuration class, its arguments)."""


@cache
def _root() -> Path:
    return Path(tempfile.mkdtemp(prefix="tiny-models-"))


@cache
def config_of(name: str) -> Any:
    """Return the configuration of a hub name."""
    import transformers

    kind, arguments = MODELS[name]
    return getattr(transformers, f"{kind}Config")(**arguments)


@cache
def directory_of(name: str, loader: Any) -> str:
    """Return a directory with the model of a hub name, written on the first call with this Auto class."""
    import torch

    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = loader.from_config(config_of(name))
    torch.set_rng_state(state)
    target = _root() / loader.__name__ / name.replace("/", "--")
    model.save_pretrained(target)
    return str(target)


@cache
def tokenizer() -> Any:
    """Return a tokenizer of single letters, within the models' vocabulary."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {token: index for index, token in enumerate(["<s>", "<unk>", "</s>", "<pad>", *(chr(c) for c in range(32, 127))])}
    made = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def quotes(*_: Any, **__: Any) -> Any:
    """Return a stand-in for the data set of quotes that two tests train on."""
    from datasets import Dataset, DatasetDict

    lines = [f"What is written in line {i} is there to be learnt from." for i in range(16)]
    return DatasetDict({"train": Dataset.from_dict({"quote": lines})})


def install() -> None:
    """Make transformers' Auto classes and ``load_dataset`` find these models and data under the hub names."""
    import datasets
    import transformers
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    load = _BaseAutoModelClass.from_pretrained.__func__  # pyright: ignore[reportFunctionMemberAccess]

    def model(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        if str(name) not in MODELS:
            return load(cls, name, *args, **kwargs)
        loaded = load(cls, directory_of(str(name), cls), *args, **kwargs)
        loaded.config._name_or_path = loaded.name_or_path = str(name)
        return loaded

    _BaseAutoModelClass.from_pretrained = classmethod(model)  # pyright: ignore[reportAttributeAccessIssue]
    for auto, answer in ((transformers.AutoTokenizer, lambda name: tokenizer()), (transformers.AutoConfig, config_of)):
        original = auto.from_pretrained

        def other(name: Any, *args: Any, _original: Any = original, _answer: Any = answer, **kwargs: Any) -> Any:
            return _answer(str(name)) if str(name) in MODELS else _original(name, *args, **kwargs)

        auto.from_pretrained = other
    datasets.load_dataset = quotes
