"""From a recipe to answers, a measure, a merged model and a diagnosis: the commands on a real, tiny run."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from byway.cli import main
from tests.workshop.conftest import TEMPLATE, chat_rows, chat_tokenizer, contents, llama, saved


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base, rows, a recipe and the run that `byway train` made of them."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("workshop")
    saved(llama(tied=True), folder / "base", chat_tokenizer())
    chat_rows(folder / "rows.jsonl", 24)
    chat_rows(folder / "held.jsonl", 6, start=24)
    (folder / "recipe.yaml").write_text(
        f"""base: {{model: {folder / "base"}, device: cpu}}
method: {{name: lora, rank: 4, alpha: 8, targets: all-linear}}
data: {{train: {folder / "rows.jsonl"}, eval: {folder / "held.jsonl"}, task: chat, max_length: 64}}
train: {{max_steps: 6, learning_rate: 0.02, rows_per_step: 8, threads: 1}}
output: {folder / "run"}
"""
    )
    from byway.train import train

    train(folder / "recipe.yaml")
    return folder


def test_generate_prints_answers_only_on_stdout(place, capsys):
    assert main(["generate", str(place / "run"), "-p", "the cat 3", "-p", "sat", "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    from byway.inference.generate import generate_text
    from byway.inference.runs import find

    model, tokenizer, _ = find(place / "run").load()
    assert out == "".join(f"{answer}\n" for answer in generate_text(model, tokenizer, ["the cat 3", "sat"], max_new_tokens=5))


def test_generate_compares_with_the_bare_base_and_reads_files(place, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("the cat\n\nsat on\n")
    assert (
        main(["generate", str(place / "run" / "adapter"), "--prompt-file", str(tmp_path / "p.txt"), "--compare", "--max-new-tokens", "4"])
        == 0
    )
    out = capsys.readouterr().out
    assert out.count("base:") == out.count("adapter:") == 2


def test_chat_remembers_resets_compares_and_ends_with_its_input(place, monkeypatch, capsys):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\nsat\n/both\nrain\n/reset\n/what\noff\n/quit\nnever read\n"))
    asked: list[object] = []
    from byway.inference import generate

    real = generate.generate_text
    monkeypatch.setattr(generate, "generate_text", lambda m, t, p, **o: asked.append(p[0]) or real(m, t, p, **o))
    assert main(["chat", str(place / "run"), "--max-new-tokens", "3", "--system", "mat"]) == 0
    lengths = [len(prompt) for prompt in asked]  # type: ignore[arg-type]
    assert lengths == [2, 4, 6, 6, 2, 2]  # system and user, then what was said; with /both each question is asked twice
    captured = capsys.readouterr()
    assert "base> " in captured.out and "adapter> " in captured.out and "/reset" in captured.err


def test_a_plain_evaluation_gives_what_the_one_with_savings_gives_and_each_says_what_it_did(place, capsys):
    found = []
    for options, said in (([], "logits at labels only"), (["--plain"], "all logits (switched off)")):
        assert main(["eval", str(place / "run"), "--json", *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert main(["eval", str(place / "run"), *options]) == 0
        assert said in capsys.readouterr().err
    for kind in ("adapter", "base"):
        assert found[0][kind] == {name: pytest.approx(value, rel=1e-5) for name, value in found[1][kind].items()}


def test_eval_measures_what_transformers_measures(place, capsys):
    assert main(["eval", str(place / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    from transformers import AutoModelForCausalLM

    tokenizer = chat_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    total, count = 0.0, 0
    for line in (place / "held.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        answer = f"{messages[1]['content']}<|im_end|>"
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        ids = torch.tensor([tokenizer(prompt + answer, add_special_tokens=False).input_ids])
        labels = ids.clone()
        labels[:, :start] = -100
        with torch.no_grad():
            total += float(base(ids, labels=labels).loss) * int((labels[:, 1:] != -100).sum())
        count += int((labels[:, 1:] != -100).sum())
    assert math.isclose(found["base"]["loss"], total / count, rel_tol=1e-4)
    assert math.isclose(found["base"]["perplexity"], math.exp(total / count), rel_tol=1e-3)
    assert found["rows"] == 6 and found["adapter"]["loss"] < found["base"]["loss"]


def test_eval_with_generation_counts_exact_matches(place, capsys):
    from byway.inference.evaluate import evaluate_run
    from byway.inference.generate import generate_text
    from byway.inference.runs import find

    found = find(place / "run")
    result = evaluate_run(found, generate=True, compare=True, limit=4)
    assert result.exact is not None and len(result.exact.answers) == 4 and result.base_exact is not None
    model, tokenizer, _ = found.load()
    rows = [json.loads(line)["messages"] for line in (place / "held.jsonl").read_text().splitlines()[:4]]
    longest = max(len(tokenizer(m[1]["content"], add_special_tokens=False).input_ids) for m in rows)
    answers = [generate_text(model, tokenizer, [m[:1]], max_new_tokens=longest + longest // 2 + 8)[0] for m in rows]
    assert [a.answer for a in result.exact.answers] == answers
    assert result.exact.share == sum(a.strip() == m[1]["content"] for a, m in zip(answers, rows, strict=True)) / 4


def test_exact_match_counts_a_right_answer(place):
    from byway import disabled
    from byway.data.documents import Conversation
    from byway.inference.evaluate import exact_match
    from byway.inference.generate import generate_text
    from byway.inference.runs import find

    model, tokenizer, _ = find(place / "run").load()
    with disabled(model):  # the base has more to say than the adapter
        (answer,) = generate_text(model, tokenizer, ["the"], max_new_tokens=8)
        assert answer.strip()
        rows = [
            Conversation(messages=({"role": "user", "content": "the"}, {"role": "assistant", "content": text}), where=f"r:{i}")
            for i, text in enumerate((f" {answer} \n", f"{answer}x"))
        ]
        assert [a.right for a in exact_match(model, tokenizer, rows, max_new_tokens=8).answers] == [True, False]


def test_eval_of_a_bare_adapter_is_refused(place, tmp_path, capsys):
    shutil.copytree(place / "run" / "adapter", tmp_path / "alone")
    assert main(["eval", str(tmp_path / "alone")]) == 2
    assert "is not a run" in capsys.readouterr().err


def test_merge_writes_a_certified_model_that_answers_like_the_run(place, tmp_path, capsys):
    assert main(["merge", str(place / "run"), "-o", str(tmp_path / "merged")]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "merged") and "PASSED" in captured.err and "the run's rows" in captured.err
    from transformers import pipeline

    from byway.inference.generate import generate_text
    from byway.inference.runs import find

    model, tokenizer, _ = find(place / "run").load()
    answers = generate_text(model, tokenizer, ["the cat"], max_new_tokens=6)
    merged = pipeline("text-generation", model=str(tmp_path / "merged"))
    found = merged([{"role": "user", "content": "the cat"}], max_new_tokens=6, do_sample=False)
    assert found[0]["generated_text"][-1]["content"].strip() == answers[0].strip()


def test_inspect_shows_coverage_and_exit_code_2_for_a_broken_adapter(place, tmp_path, capsys):
    assert main(["inspect", str(place / "run")]) == 0
    out = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj" in out and "0-1" in out and "rank:       4" in out
    assert main(["inspect", str(place / "run" / "adapter"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "LORA"
    shutil.copytree(place / "run" / "adapter", tmp_path / "a")
    from byway.core.disk.files import read_safetensors, write_safetensors

    tensors, _ = read_safetensors(tmp_path / "a" / "adapter_model.safetensors")
    write_safetensors(tmp_path / "a" / "adapter_model.safetensors", {k: t * math.nan for k, t in tensors.items()})
    assert main(["inspect", str(tmp_path / "a")]) == 2
    assert "NaN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "NOWHERE", "-p", "x"], "does not exist"),
        (["generate", "RUN"], "no prompt"),
        (["generate", "RUN", "-p", " "], "empty"),
        (["merge", "RUN", "-o", "RUN/adapter/x"], "inside"),
        (["merge", "RUN", "-o", "RUN"], "not empty"),
        (["merge", "RUN", "-o", "OUT", "--dtype", "int3"], "int3"),
        (["inspect", "BASE"], "is a model"),
    ],
)
def test_wrong_input_is_one_message_exit_2_and_nothing_written(place, tmp_path, capsys, arguments, words):
    before = contents(place)
    names = {"NOWHERE": str(tmp_path / "no"), "RUN": str(place / "run"), "BASE": str(place / "base"), "OUT": str(tmp_path / "out")}
    for name, value in names.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and words in error and "Traceback" not in error
    assert contents(place) == before and not (tmp_path / "out").exists()


# ------------------------------------------------------------ doctor


def checks(place: Path, capsys, *overrides: str) -> tuple[int, dict[str, dict[str, object]]]:
    code = main(["doctor", str(place / "recipe.yaml"), f"output={place / 'fresh'}", *overrides, "--json"])
    return code, {check["name"]: check for check in json.loads(capsys.readouterr().out)}


def test_doctor_passes_a_sound_recipe_and_keeps_nothing(place, capsys):
    before = contents(place)
    code, found = checks(place, capsys)
    assert code == 0, found
    assert "zero in the first step only" in str(found["gradients"]["found"])  # LoRA's A, since B starts at zero
    assert {"loss tokens", "end of turn", "chat template", "checkpoint", "dtypes", "lengths", "update"} <= found.keys()
    assert contents(place) == before


def test_doctor_shows_the_sample_with_what_is_learned(place, capsys):
    assert main(["doctor", str(place / "recipe.yaml"), f"output={place / 'fresh'}"]) == 0
    assert "⟦" in capsys.readouterr().out


def test_doctor_finds_a_template_without_an_end_of_turn(place, tmp_path, capsys):
    shutil.copytree(place / "base", tmp_path / "base")
    template = TEMPLATE.replace("<|im_end|>\n", "\n")
    (tmp_path / "base" / "chat_template.jinja").write_text(template)
    code, found = checks(place, capsys, f"base.model={tmp_path / 'base'}")
    assert code == 2
    assert not found["end of turn"]["good"] and "never learns to stop" in str(found["end of turn"]["hint"])


def test_doctor_finds_rows_that_are_cut(place, capsys):
    tokenizer = chat_tokenizer()
    rows = [json.loads(line)["messages"] for line in (place / "rows.jsonl").read_text().splitlines()]
    lengths = sorted(len(tokenizer.apply_chat_template(row, tokenize=True, return_dict=False)) for row in rows)
    # the last token of a row is a line break after its end of turn: without it every row still learns something
    code, found = checks(place, capsys, f"data.max_length={lengths[len(rows) // 4]}")
    assert code == 2 and not found["lengths"]["good"] and "data.max_length" in str(found["lengths"]["hint"])


def test_doctor_finds_an_output_that_is_taken(place, capsys):
    assert main(["doctor", str(place / "recipe.yaml"), "--json"]) == 2
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert not found["output"]["good"] and found["gradients"]["good"]


def test_doctor_finds_tensors_that_get_no_gradient(place, monkeypatch, capsys):
    """A site that the loss does not depend on: the last layer's output is thrown away."""
    from byway.tasks.causal_lm import CausalLM

    real = CausalLM.loss

    def blind(self, model, batch, *, labels_only=False):
        layer = model.model.layers[-1]
        handle = layer.mlp.down_proj.register_forward_hook(lambda module, inputs, out: out.detach())
        try:
            return real(self, model, batch, labels_only=labels_only)
        finally:
            handle.remove()

    monkeypatch.setattr(CausalLM, "loss", blind)
    code, found = checks(place, capsys)
    assert code == 2
    assert not found["gradients"]["good"] and "layers.1.mlp" in str(found["gradients"]["found"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_merge_that_is_stopped_leaves_nothing_behind(place, tmp_path, number):
    """The process stops itself while the first tensor is written into the temporary directory."""
    script = """
import os, sys
from byway.workshop.merge import files
real = files.write_file
def stopped(path, entries, on_tensor=None):
    assert list(path.parent.parent.glob(".merged.byway-*"))
    os.kill(os.getpid(), int(sys.argv[2]))
    real(path, entries, on_tensor)
files.write_file = stopped
from byway.cli import main
sys.exit(main(["merge", sys.argv[1], "-o", "merged"]))
"""
    command = [sys.executable, "-c", script, str(place / "run"), str(int(number))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr and ("Stopped by SIGTERM" in done.stderr or number == signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_the_caller_ignores_or_handles_stays_as_it_is(place, monkeypatch, capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    from byway.cli import methods as command

    seen = []

    def look(name=None):
        seen.append((signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGTERM)))

    try:
        with monkeypatch.context() as patch:
            patch.setattr(command, "run", look)
            assert main(["methods"]) == 0
        assert seen[0][0] is signal.SIG_IGN and callable(seen[0][1]), "as under nohup"
        assert signal.getsignal(signal.SIGTERM) is before[1]
    finally:
        signal.signal(signal.SIGHUP, before[0])


@pytest.mark.parametrize(("dtype", "factor"), [("fp32", 1.0), ("bf16", 0.5)])
def test_a_merge_asks_for_the_space_that_its_tensors_take(place, tmp_path, monkeypatch, capsys, dtype, factor):
    """The base is stored in float32."""
    from byway.workshop.merge import files

    def merged(free: int) -> int:
        monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, free))
        return main(["merge", str(place / "run"), "-o", str(tmp_path / "merged"), "--samples", "1", "--dtype", dtype])

    size = int((place / "base" / "model.safetensors").stat().st_size * factor)
    assert merged(size // 2) == 2 and "has" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert merged(size) == 0
    written = (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert abs(written - size) < 10_000


def test_a_chat_run_leads_with_the_result_beside_the_base_and_two_answers(place, tmp_path, capsys):
    """On the terminal and in the report; the bare base's loss is that of `byway eval`."""
    out = tmp_path / "run"
    assert main(["train", str(place / "recipe.yaml"), f"output={out}"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{out}\n"
    found = re.search(r"evaluation loss ([\d.]+) \(bare base ([\d.]+)\); mean training loss of the last epoch ([\d.]+)", shown.err)
    assert found is not None, shown.err
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if not row.get("eval") and row["epoch"] > 1]
    assert float(found[3]) == pytest.approx(sum(r["loss"] * r["labels"] for r in last) / sum(r["labels"] for r in last), abs=1e-4)
    assert main(["eval", str(out), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert float(found[1]) == pytest.approx(measured["adapter"]["loss"], abs=1e-4)
    assert float(found[2]) == pytest.approx(measured["base"]["loss"], abs=1e-4)
    assert [len(re.findall(f"^{name} ", shown.err, re.MULTILINE)) for name in ("question", "expected", "before", "after")] == [2] * 4
    report = (out / "report.html").read_text()
    order = [
        "evaluation loss",
        f"bare base {float(found[2]):.4g}",
        "mean training loss, last epoch",
        "Answers before and after",
        "<h2>Loss</h2>",
    ]
    places = [report.index(word) for word in order]
    assert places == sorted(places)
    assert report.count("<dl class='answer'>") == 2 and report.count("class=after") == 2
