"""What shapes a run's text stays with it: template, variables and end tokens, in every command, adapter and merged model."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from byway import load, load_base
from byway.cli import main
from byway.data.documents import Conversation
from byway.data.template import ChatTemplate, set_template
from byway.errors import ConfigError
from byway.inference.evaluate import evaluate_run, exact_match
from byway.inference.generate import generate_text, prompt_tokens
from byway.inference.runs import find
from byway.recipe.recipe import Recipe
from byway.tasks import load as load_task
from tests.workshop.conftest import chat_rows, chat_tokenizer, llama, saved

OWN = (
    "  {% if mood %}{{ mood }}:{% endif %}\n{% for m in messages %}{{ m['role'] }} {{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
ASKED = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a template file and variables of its own; the file is changed afterwards."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("text")
    saved(llama(tied=True), folder / "base", chat_tokenizer())
    chat_rows(folder / "rows.jsonl", 24)
    chat_rows(folder / "held.jsonl", 6, start=24)
    (folder / "own.jinja").write_text(OWN, encoding="utf-8-sig")
    (folder / "recipe.yaml").write_text(
        f"""base: {{model: {folder / "base"}, device: cpu}}
method: {{name: lora, rank: 4, alpha: 8, targets: all-linear}}
data:
  train: {folder / "rows.jsonl"}
  eval: {folder / "held.jsonl"}
  template: {folder / "own.jinja"}
  template_variables: {{mood: "mat 🙂", unused: [1, null, {{a: true}}]}}
train: {{max_steps: 4, learning_rate: 0.02, rows_per_step: 8, threads: 1, save_every: 2}}
output: {folder / "run"}
"""
    )
    from byway.train import train

    train(folder / "recipe.yaml")
    (folder / "own.jinja").write_text("changed {{ messages }}", encoding="utf-8")
    return folder


def texts(tokenizer: object) -> list[str]:
    ids = prompt_tokens(tokenizer, [ASKED])  # type: ignore[arg-type]
    return [tokenizer.decode(row) for row in ids]  # type: ignore[attr-defined]


WRITTEN = "mat 🙂:user the cat<|endoftext|>\nassistant "


def test_every_place_an_adapter_can_be_read_from_writes_the_text_of_the_training(place: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(place / "run" / "recipe.yaml")
    assert recipe.data.template == OWN
    rows = load_task("chat")(recipe.data, seed=0).encode(chat_tokenizer(), 300)
    trained = chat_tokenizer().decode(rows.train[0].input_ids)
    assert trained.startswith("mat 🙂:user the 0<|endoftext|>\nassistant ")
    for name in ("adapter", "checkpoints/step-2/adapter", "checkpoints/step-4/adapter"):
        shutil.copytree(place / "run" / name, tmp_path / name)
    places = [place / "run", place / "run" / "adapter", place / "run" / "checkpoints" / "step-2", tmp_path / "adapter"]
    for found in [*places, tmp_path / "checkpoints/step-4/adapter"]:
        model, tokenizer, adapters = find(found, place / "base").load()
        assert texts(tokenizer) == [WRITTEN], found
        assert tokenizer is not None and tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False) == WRITTEN
        assert not [note for adapter in adapters for note in adapter.notes]
    model, tokenizer = load_base(place / "base")
    adapter = load(model, place / "run" / "adapter", tokenizer=tokenizer)
    assert [note for note in adapter.notes if "chat template is not the one it was trained with" in note]


def test_a_merged_model_needs_neither_the_run_nor_the_variables(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(place / "run"), "-o", str(tmp_path / "merged")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False) == WRITTEN
    assert tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False, mood="") == WRITTEN.removeprefix("mat 🙂:")
    ends = GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id
    assert sorted(ends) == [0, 2]  # the base's, and the one that the run's template ends an answer with
    model, own = load_base(tmp_path / "merged")
    adapted, other, _ = find(place / "run").load()
    options = {"max_new_tokens": 6}
    assert generate_text(model, own, ["the cat", "rain"], **options) == generate_text(adapted, other, ["the cat", "rain"], **options)


def test_a_merge_that_changes_no_text_keeps_the_bases_files(chat_base: Path, chat_adapter: Path, tmp_path: Path) -> None:
    assert main(["merge", str(chat_adapter), "--base", str(chat_base), "-o", str(tmp_path / "merged")]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (chat_base / name).read_bytes()


def test_commands_take_variables_that_come_before_the_runs_and_after_a_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tokenizer, _ = find(place / "run").load()
    glad, sad = Conversation(messages=tuple(ASKED), template_kwargs={"mood": "sat"}), Conversation(messages=tuple(ASKED))
    ids = prompt_tokens(tokenizer, [glad, sad, ASKED], template_variables={"mood": "off"})
    assert [tokenizer.decode(row).partition(":")[0] for row in ids] == ["sat", "off", "off"]
    run = str(place / "run")
    for command in (["generate", run, "-p", "the cat", "--max-new-tokens", "3"], ["eval", run, "--json", "--generate"]):
        said = []
        for variable in ("mood=rain rain rain", "mood=null", "mood=rain rain rain"):
            assert main([*command, "--template-variable", variable]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[2] and (said[0] != said[1] or command[0] == "generate")
    changed = evaluate_run(find(place / "run"), template_variables={"mood": "rain rain rain"})
    assert changed.adapter["loss"] != evaluate_run(find(place / "run")).adapter["loss"]
    for wrong in ("mood", "=1", "a b=1"):
        assert main(["generate", run, "-p", "a", "--template-variable", wrong]) == 2
        assert "NAME=VALUE" in capsys.readouterr().err


def test_exact_match_asks_each_row_with_its_own_variables_and_tools(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from byway.inference import evaluate

    heard: list[list[str]] = []

    def answers(model: object, tokenizer: object, prompts: list[object], **options: object) -> list[str]:
        heard.append([tokenizer.decode(row) for row in prompt_tokens(tokenizer, prompts)])  # type: ignore[attr-defined, arg-type]
        return ["cat"] * len(prompts)

    monkeypatch.setattr(evaluate, "generate_text", answers)
    tokenizer = chat_tokenizer(OWN)
    rows = [
        Conversation(where=str(i), messages=(*ASKED, {"role": "assistant", "content": "cat"}), template_kwargs=own)
        for i, own in enumerate([{"mood": "sat"}, {}, {"mood": "off"}])
    ]
    assert exact_match(llama(), tokenizer, rows).share == 1.0
    assert [text.partition("user")[0] for text in heard[0]] == ["sat:", "", "off:"]


def test_defaults_in_a_template_write_what_variables_would(place: Path) -> None:
    values = {"flag": False, "n": None, "text": "é\n\"'🙂\\{{", "many": [1, 2.5, {"k": [True]}], "on": 1e300}
    write = "{{ flag }}{{ n }}{{ text }}{{ many | tojson }}{{ on }}"
    plain = "{% macro f() %}" + write + "{% endmacro %}{% for m in messages %}{{ f() }}{{ m.content }}\n{% endfor %}" + write
    for source in (plain, "\n  " + plain, "  {% if flag %}a{% endif %}\n" + plain, "{#- c #}\n" + plain):
        given, built = chat_tokenizer(source), chat_tokenizer(source)
        set_template(built, None, values)
        wanted = given.apply_chat_template(ASKED, tokenize=False, **values)
        assert built.apply_chat_template(ASKED, tokenize=False) == wanted
        assert built.apply_chat_template(ASKED, tokenize=False, **{**values, "n": 3}) == given.apply_chat_template(
            ASKED, tokenize=False, **{**values, "n": 3}
        )
        set_template(built, None, {"n": 3})  # later defaults come first
        assert built.apply_chat_template(ASKED, tokenize=False) == given.apply_chat_template(ASKED, tokenize=False, **{**values, "n": 3})
    assert ChatTemplate(built).prompt(Conversation(messages=tuple(ASKED))).text == built.apply_chat_template(ASKED, tokenize=False)


def test_variables_that_cannot_be_set_are_refused(place: Path) -> None:
    for variables, why in (({"messages": 1}, "'messages'"), ({"a-b": 1}, "'a-b'"), ({"a": {1, 2}}, "not a JSON value")):
        with pytest.raises(ConfigError, match=why):
            Recipe.load(place / "run" / "recipe.yaml").data.__class__(train="a", template_variables=variables)
    with pytest.raises(ConfigError, match="are for a chat template"):
        load_task("text")(
            Recipe.from_dict(
                {"method": {"name": "lora"}, "output": "o", "data": {"train": "a", "task": "text", "template_variables": {"a": 1}}}
            ).data,
            seed=0,
        )


def test_a_template_that_exceeds_its_limits_ends_every_command(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    hostile = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "run" / "adapter" / "chat_template.jinja").write_text("{{ 'a' * 10**9 }}")
    shutil.copytree(place / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ '%1000000000d' % 1 }}")
    own = tmp_path / "hostile.yaml"
    own.write_text(json.dumps(Recipe.load(place / "run" / "recipe.yaml").to_dict()))
    run, base = str(tmp_path / "run"), f"base.model={tmp_path / 'base'}"
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    for command, name in (
        (["generate", run, "-p", "a"], "adapter"),
        (["chat", run], "adapter"),
        (["eval", run, "--generate"], "adapter"),
        (["merge", f"{run}/adapter", "-o", str(tmp_path / "merged")], "adapter"),
        (["data", str(own), base, "data.template=null"], "base"),
        (["train", str(own), base, "data.template=null", f"output={tmp_path / 'new'}"], "base"),
        (["data", str(own), f"data.template={hostile!r}"], "data.template"),
    ):
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert "exceeds" in error and name in error and "Traceback" not in error, command
    assert not (tmp_path / "merged").exists() and not (tmp_path / "new").exists()
