"""A merge between files is the base with its adapter: against peft's merge, our own in memory, and the unmerged model."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from byway import AdapterError, ConfigError, LoRA, RunError, attach, load, load_base
from byway.base.quiet import quiet
from byway.core.disk.shards import stored_tensors
from byway.core.merge import merge
from byway.workshop.merge.files import merge_files
from tests.workshop.conftest import adapter_for, chat_tokenizer, contents, llama, moved_off_zero, saved

IDS = torch.arange(3, 40)[None]


def reloaded(path: Path, cls: str = "AutoModelForCausalLM"):
    import transformers

    with quiet():
        return getattr(transformers, cls).from_pretrained(path)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("tied", "dtype", "targets", "limit"),
    [
        (False, torch.float32, ["q_proj", "v_proj"], 1e-5),
        (False, torch.float32, "all-linear", 1e-5),
        (True, torch.float32, ["q_proj", "embed_tokens"], 1e-5),
        (True, torch.float32, ["lm_head"], 1e-5),
        (True, torch.float32, ["embed_tokens", "lm_head"], 1e-5),
        (True, torch.bfloat16, "all-linear", 3e-2),
        (False, torch.bfloat16, ["lm_head", "o_proj"], 3e-2),
    ],
)
def test_the_merged_directory_answers_like_base_and_adapter(tmp_path, seed, logits, tied, dtype, targets, limit):
    base = saved(llama(tied=tied, dtype=dtype), tmp_path / "base", max_shard_size="20KB")
    adapter = adapter_for(base, tmp_path / "adapter", targets=targets)
    result = merge_files(base, adapter, tmp_path / "out", samples=4)
    torch.manual_seed(seed + 1)  # weights that were not read must not look right by chance
    unmerged, _ = load_base(base)
    bare = logits(unmerged, IDS)
    load(unmerged, adapter)
    wanted, found = logits(unmerged, IDS), logits(reloaded(tmp_path / "out"), IDS)
    assert relative(found, wanted) <= limit
    assert relative(bare, wanted) > 100 * limit or limit > 1e-3  # the adapter does something
    merge(unmerged)
    in_memory = unmerged.state_dict()
    assert all(torch.equal(tensor, in_memory[name]) for name, tensor in reloaded(tmp_path / "out").state_dict().items())
    assert result.certificate.passed and result.certificate.share > 0.99


def test_merged_files_are_those_of_pefts_merge_and_unload(tmp_path, seed):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = saved(llama(), tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}, use_rslora=True)
    with quiet():
        theirs = get_peft_model(reloaded(base), config)
        moved_off_zero(theirs, 0.1)
        theirs.save_pretrained(tmp_path / "adapter")
    merge_files(base, tmp_path / "adapter", tmp_path / "out", samples=2)
    torch.manual_seed(seed + 1)
    merged = PeftModel.from_pretrained(reloaded(base), tmp_path / "adapter").merge_and_unload().state_dict()
    ours = reloaded(tmp_path / "out").state_dict()
    assert ours.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


def test_gpt2_keeps_its_transposed_weights(tmp_path, seed, logits):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64, initializer_range=0.2))
    base = saved(model, tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter", targets=["c_attn", "c_fc"], bias="lora_only")
    merge_files(base, adapter, tmp_path / "out", samples=2)
    unmerged, _ = load_base(base)
    load(unmerged, adapter)
    assert relative(logits(reloaded(tmp_path / "out"), IDS), logits(unmerged, IDS)) < 1e-5


def test_encoder_decoder(tmp_path, seed):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=100, decoder_start_token_id=0)
    base = saved(T5ForConditionalGeneration(config), tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter", targets=["q", "v", "wo"])
    merge_files(base, adapter, tmp_path / "out", samples=2)
    unmerged, _ = load_base(base)
    load(unmerged, adapter)
    merged = reloaded(tmp_path / "out", "AutoModelForSeq2SeqLM")
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
    with torch.no_grad():
        assert relative(merged(**inputs).logits, unmerged(**inputs).logits) < 1e-5


def test_a_classifier_is_written_with_its_new_head_though_the_base_is_a_bare_encoder(tmp_path, seed, logits):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=100, max_position_embeddings=64
    )
    base = saved(BertModel(config), tmp_path / "base")  # its names lack the prefix "bert."
    model, _ = load_base(base, task="classification", num_labels=3)
    adapter = moved_off_zero(attach(model, LoRA(rank=4, targets=["query", "value"])))
    adapter.save(tmp_path / "adapter")
    wanted = logits(model, IDS)
    torch.manual_seed(seed + 1)
    result = merge_files(base, tmp_path / "adapter", tmp_path / "out", samples=4)
    merged = reloaded(tmp_path / "out", "AutoModelForSequenceClassification")
    assert merged.config.num_labels == 3
    assert relative(logits(merged, IDS), wanted) < 1e-5
    assert "classifier" in result.merged


def sentiment(path: Path, *, labels: int = 2, kind: str | None = None) -> Path:
    """A saved classifier whose classes have names, as those on the hub do."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
    names = dict(enumerate(("NEGATIVE", "POSITIVE", "NEUTRAL")[:labels]))
    config = BertConfig(vocab_size=100, id2label=names, label2id={v: k for k, v in names.items()}, problem_type=kind, **sizes)
    return saved(BertForSequenceClassification(config), path)


@pytest.mark.parametrize(("labels", "kind"), [(2, None), (3, "multi_label_classification"), (2, "multi_label_classification")])
@pytest.mark.parametrize("through", ["files", "python"])
def test_the_merged_model_answers_with_the_names_of_the_run(tmp_path, seed, labels, kind, through):
    base = sentiment(tmp_path / "base", labels=labels, kind=kind)
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_labels": labels}))  # older files have it too
    model, _ = load_base(base, task="classification", label_names=("ham", "spam"))
    moved_off_zero(attach(model, LoRA(rank=4, targets=["query", "value"]))).save(tmp_path / "adapter")
    if through == "files":  # from the adapter's own directory, without the run
        assert merge_files(base, tmp_path / "adapter", tmp_path / "out", samples=2).certificate.passed
    else:
        other, _ = load_base(base, task="classification", num_labels=2)
        adapter = load(other, tmp_path / "adapter")
        assert labels != 2 or "the model's classes are named as in training: ham, spam" in adapter.notes
        merge(other)
        saved(other, tmp_path / "out")
    config = reloaded(tmp_path / "out", "AutoModelForSequenceClassification").config
    assert config.id2label == {0: "ham", 1: "spam"} and config.label2id == {"ham": 0, "spam": 1}
    assert config.problem_type == "single_label_classification"


def test_an_adapter_without_its_run_still_knows_its_kind_of_problem(tmp_path, seed):
    base = sentiment(tmp_path / "base", labels=3, kind="multi_label_classification")
    model, _ = load_base(base, task="classification", num_labels=3)
    moved_off_zero(attach(model, LoRA(rank=4, targets=["query"]))).save(tmp_path / "adapter")
    merge_files(base, tmp_path / "adapter", tmp_path / "out", samples=2)
    assert (tmp_path / "out" / "config.json").read_text() == (base / "config.json").read_text()


def test_a_regression_head_and_a_language_model_keep_what_their_authors_wrote(tmp_path, seed, chat_base, chat_adapter):
    base = sentiment(tmp_path / "score", labels=1, kind="regression")
    model, _ = load_base(base, task="classification", num_labels=1)
    moved_off_zero(attach(model, LoRA(rank=4, targets=["query"]))).save(tmp_path / "own")
    merge_files(base, tmp_path / "own", tmp_path / "out", samples=2)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert after == before
    merge_files(chat_base, chat_adapter, tmp_path / "chat", samples=2)
    assert json.loads((tmp_path / "chat" / "config.json").read_text()) == json.loads((chat_base / "config.json").read_text())


def test_wrong_names_fail_the_certificate(tmp_path, seed, monkeypatch):
    base = sentiment(tmp_path / "base")
    model, _ = load_base(base, task="classification", label_names=("ham", "spam"))
    moved_off_zero(attach(model, LoRA(rank=4, targets=["query"]))).save(tmp_path / "adapter")
    monkeypatch.setattr("byway.workshop.merge.decisions.write", lambda *arguments: None)
    with pytest.raises(RunError, match=r"says id2label: \{0: 'NEGATIVE', 1: 'POSITIVE'\}, not \{0: 'ham', 1: 'spam'\}"):
        merge_files(base, tmp_path / "adapter", tmp_path / "out", samples=2)
    assert not (tmp_path / "out").exists()


def test_trained_tokens_and_a_head_to_save(tmp_path, seed, logits):
    for number, options in enumerate(({"trained_tokens": (5, 7)}, {"modules_to_save": ("lm_head",)})):
        base = saved(llama(tied=True), tmp_path / f"base{number}")
        adapter = adapter_for(base, tmp_path / f"adapter{number}", targets=["q_proj"], **options)
        out = tmp_path / f"out{number}"
        merge_files(base, adapter, out, samples=2)
        unmerged, _ = load_base(base)
        load(unmerged, adapter)
        assert relative(logits(reloaded(out), IDS), logits(unmerged, IDS)) < 1e-5
        tie = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
        assert tie is (number == 0)  # rows of both ends stay one; a head of its own is not tied


def test_two_adapters_of_one_run_are_both_merged(tmp_path, seed, logits, chat_base):
    model, _ = load_base(chat_base)
    for name, target in (("lora", "q_proj"), ("lora-2", "up_proj")):
        moved_off_zero(attach(model, LoRA(rank=2, targets=[target]), name)).save(tmp_path / "run" / "adapter" / name)
    merge_files(chat_base, tmp_path / "run", tmp_path / "out", samples=2)
    assert relative(logits(reloaded(tmp_path / "out"), IDS), logits(model, IDS)) < 1e-5


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_trained_beside_a_quantized_base_is_folded_into_the_dequantized_weights(tmp_path, seed, logits, kind):
    pytest.importorskip("bitsandbytes", reason="needs byway[quant]")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    base = saved(LlamaForCausalLM(config).to(torch.bfloat16), tmp_path / "base")
    model, _ = load_base(base, "bf16", kind)
    adapter = moved_off_zero(attach(model, LoRA(rank=4, targets=["q_proj", "v_proj"])))
    adapter.save(tmp_path / "adapter")
    result = merge_files(base, tmp_path / "adapter", tmp_path / "out", samples=4)  # the fingerprint says how it was quantized
    assert result.certificate.effect_lost < 0.1
    merged, plain = reloaded(tmp_path / "out"), reloaded(base)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = logits(model, IDS)
    assert relative(logits(merged, IDS), wanted) < 3e-2
    untouched = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(merged.state_dict()[untouched], plain.state_dict()[untouched])  # dequantized, not the 16-bit original


def test_untouched_tensors_keep_their_bytes_and_side_files_come_along(chat_base, chat_adapter, tmp_path):
    result = merge_files(chat_base, chat_adapter, tmp_path / "out", samples=2)
    old, new = stored_tensors([chat_base / "model.safetensors"]), stored_tensors([tmp_path / "out" / "model.safetensors"])
    touched = ("q_proj", "v_proj", "down_proj")
    assert old.keys() == new.keys()
    for name, was in old.items():
        now = new[name]
        same = was.file.read_bytes()[was.begin : was.end] == now.file.read_bytes()[now.begin : now.end]
        assert same is not any(t in name for t in touched)
    assert result.certificate.untouched == sum(not any(t in name for t in touched) for name in old)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (chat_base / name).read_bytes()
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    mask = os.umask(0)
    os.umask(mask)
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


def test_a_byte_order_mark_of_the_bases_template_is_not_merged(chat_base, tmp_path):
    template = chat_base / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.write_text("\ufeff" + text, encoding="utf-8")
    merge_files(chat_base, adapter_for(chat_base, tmp_path / "adapter"), tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text(encoding="utf-8") == text


def test_the_dtype_can_be_chosen(chat_base, chat_adapter, tmp_path, logits):
    merge_files(chat_base, chat_adapter, tmp_path / "out", dtype="bf16", samples=2)
    merged = reloaded(tmp_path / "out")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    unmerged, _ = load_base(chat_base)
    load(unmerged, chat_adapter)
    assert relative(logits(merged, IDS), logits(unmerged, IDS)) < 5e-2


def test_mixture_of_experts_is_merged_with_its_experts_untouched(tmp_path, seed, logits):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=100,
        num_local_experts=2, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    base = saved(MixtralForCausalLM(config), tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter", targets=["q_proj", "o_proj"])
    result = merge_files(base, adapter, tmp_path / "out", samples=2)
    unmerged, _ = load_base(base)
    load(unmerged, adapter)
    assert relative(logits(reloaded(tmp_path / "out"), IDS), logits(unmerged, IDS)) < 1e-5
    assert result.certificate.untouched > 8


# ------------------------------------------------------------ refusals


def test_bad_requests_are_refused_and_write_nothing(chat_base, chat_adapter, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    cases = [
        (lambda: merge_files(chat_base, chat_adapter, tmp_path / "full"), ConfigError, "not empty"),
        (lambda: merge_files(chat_base, chat_adapter, chat_base / "out"), ConfigError, "inside"),
        (lambda: merge_files(chat_base, chat_adapter, tmp_path / "out", dtype="bf15"), ConfigError, "bf15"),
        (lambda: merge_files(chat_base, chat_adapter, tmp_path / "out", samples=0), ConfigError, "samples"),
        (lambda: merge_files(chat_base, tmp_path / "nowhere", tmp_path / "out"), ConfigError, "nowhere"),
        (lambda: merge_files(tmp_path / "nobase", chat_adapter, tmp_path / "out"), ConfigError, "nobase"),
        (lambda: merge_files(chat_base, chat_base, tmp_path / "out"), ConfigError, "model, not a run"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
    assert contents(tmp_path) == before


def test_another_base_is_refused(chat_adapter, tmp_path, seed):
    other = saved(llama(tied=True), tmp_path / "other", chat_tokenizer())
    with pytest.raises(AdapterError, match="another base"):
        merge_files(other, chat_adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_untrained_adapter_is_refused_since_the_merge_would_be_a_copy_of_the_base(chat_base, tmp_path):
    model, _ = load_base(chat_base)
    attach(model, LoRA(rank=2, targets=["q_proj"])).save(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="changes no weight"):
        merge_files(chat_base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_earlier_merge_is_replaced_only_when_asked(chat_base, chat_adapter, tmp_path):
    merge_files(chat_base, chat_adapter, tmp_path / "out", samples=2)
    with pytest.raises(ConfigError, match="not empty"):
        merge_files(chat_base, chat_adapter, tmp_path / "out", samples=2)
    merge_files(chat_base, chat_adapter, tmp_path / "out", samples=2, overwrite=True)


# ------------------------------------------------------------ sabotage


def lost(monkeypatch, broken):
    """Replace what a fold gives for writing; the certificate works from its own reading of the files."""
    module = importlib.import_module("byway.workshop.merge.files")  # the package's attribute of that name is the function
    real = module._value
    monkeypatch.setattr(module, "_value", lambda name, plan, stored: broken(name, plan, real(name, plan, stored)))


def base_weight(name, plan, value):
    """The adapter is not merged at all."""
    fold, key = plan.changed[name]
    return lambda: fold.before()[key]


def one_layer_lost(name, plan, value):
    return base_weight(name, plan, value) if "layers.1.self_attn.q_proj" in name else value


def doubled(name, plan, value):
    """The scale is applied twice."""
    fold, key = plan.changed[name]
    return lambda: fold.before()[key] + 2 * (fold.after()[key] - fold.before()[key])


def transposed(name, plan, value):
    fold, key = plan.changed[name]

    def wrong():
        delta = fold.after()[key] - fold.before()[key]
        return fold.before()[key] + (delta.T if delta.shape[0] == delta.shape[1] else delta)

    return wrong


@pytest.mark.parametrize("broken", [base_weight, one_layer_lost, doubled, transposed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sabotaged_merge_does_not_pass_and_leaves_nothing(tmp_path, seed, monkeypatch, broken, dtype):
    base = saved(llama(dtype=dtype), tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter", targets=["q_proj", "v_proj"])
    before = contents(tmp_path)
    lost(monkeypatch, broken)
    with pytest.raises(RunError, match="does not equal base \\+ adapter") as raised:
        merge_files(base, adapter, tmp_path / "out", samples=4)
    assert raised.value.exit_code == 3
    assert contents(tmp_path) == before


def test_a_changed_untouched_tensor_is_noticed(chat_base, chat_adapter, tmp_path, monkeypatch):
    from byway.core.disk import shards

    real = shards._copy

    def off_by_one_bit(source, target):
        if source.shape == (32,):  # norms
            data = bytearray(source.file.read_bytes()[source.begin : source.end])
            data[0] ^= 1
            target.write(bytes(data))
        else:
            real(source, target)

    monkeypatch.setattr(shards, "_copy", off_by_one_bit)
    with pytest.raises(RunError, match=r"not the base's"):
        merge_files(chat_base, chat_adapter, tmp_path / "out", samples=2)
    assert not (tmp_path / "out").exists()


def test_the_certificate_is_valid_json_and_says_what_was_measured(chat_base, chat_adapter, tmp_path):
    merge_files(chat_base, chat_adapter, tmp_path / "out", prompts=["the cat", "a mat and"])
    found = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert found["passed"] is True and found["prompts"] == 2 and found["source"] == "given"
    assert found["relative_difference"] < 1e-5 < found["adapter_relative_effect"]
    assert {m["path"].rpartition(".")[2] for m in found["modules"]} == {"q_proj", "v_proj", "down_proj"}
    assert "PASSED" in (tmp_path / "out" / "certificate.md").read_text()


def test_memory_stays_far_below_the_model(tmp_path):
    """Streaming 40 MB of weights must not hold them: measured on the anonymous memory of a process that plans and writes only."""
    script = f"""
import torch
from pathlib import Path
torch.set_num_threads(1)
from tests.workshop.conftest import adapter_for, saved
from transformers import LlamaConfig, LlamaForCausalLM
from byway.workshop.merge.files import _stream
from byway.workshop.merge.plan import plan_files
import byway.base.directory as s, byway.inference.runs as r
def anon():
    return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1]) / 1024
folder = Path({str(tmp_path)!r})
config = LlamaConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=10, num_attention_heads=4, vocab_size=1000)
base = saved(LlamaForCausalLM(config), folder / 'base')
adapter = adapter_for(base, folder / 'adapter', targets='all-linear')
found = r.find(adapter, base)
import gc; gc.collect()
before = anon()
stored = s.stored_files(base)
model, _ = found.load_base(s.stored_dtype(base))
found.attach(model)
plan = plan_files(model, stored)
(folder / 'out').mkdir()
_stream(plan, stored, folder / 'out', None, None)
print(anon() - before, sum(e.size for e in stored.values()) / 2**20)
"""
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    used, size = map(float, done.stdout.split()[-2:])
    assert size > 40 and used < size / 2, (used, size)


def test_what_cannot_be_streamed_is_merged_in_memory_and_certified_all_the_same(chat_base, chat_adapter, tmp_path, monkeypatch, logits):
    module = importlib.import_module("byway.workshop.merge.files")

    def refuse(model, stored):
        raise module.Unplannable("for this test")

    monkeypatch.setattr(module, "plan_files", refuse)
    result = merge_files(chat_base, chat_adapter, tmp_path / "out", samples=2)
    assert any("in memory" in note for note in result.notes) and result.certificate.passed
    mask = os.umask(0)
    os.umask(mask)
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "out").iterdir()} == {0o666 & ~mask}
    assert result.certificate.untouched > 5
    unmerged, _ = load_base(chat_base)
    load(unmerged, chat_adapter)
    assert relative(logits(reloaded(tmp_path / "out"), IDS), logits(unmerged, IDS)) < 1e-5
