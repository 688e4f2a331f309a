"""The quickstart from its first line to the merged model, on a tiny stand-in for the base and through the same code."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextvars import Context
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from byway.cli import main
from byway.cli._quickstart import measure
from byway.cli._quickstart import run as quickstart_run
from byway.cli._quickstart.measure import PARTS, SETTINGS
from byway.cli._quickstart.run import Answering, Measured, Merging, Result, packaged_recipe, quickstart
from byway.errors import ConfigError
from byway.recipe.recipe import Recipe
from byway.train.reporting.events import Event, Observer, Stepped
from tests.conftest import ROOT
from tests.train.conftest import interrupt_at, losses, tree
from tests.workshop.conftest import TEMPLATE, saved

PUBLISHED = ROOT / "recipes" / "quickstart.yaml"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with ChatML's template and a vocabulary made from the training rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    own.train_from_iterator((f"{row.message}\n{row.answer}" for row in measure.read("train")), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(11)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=900,
        max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2, eos_token_id=2, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return saved(LlamaForCausalLM(config), tmp_path_factory.mktemp("base") / "tiny", tokenizer)


@pytest.fixture(scope="module")
def stand_in(base: Path) -> Iterator[Path]:
    """The packaged recipe with the tiny base in the place of the built-in one; the command reads it like the packaged one."""
    text = quickstart_run.RECIPE.read_text(encoding="utf-8")
    assert "model: smollm2-135m-instruct" in text
    path = base.parent / "recipe.yaml"
    path.write_text(text.replace("smollm2-135m-instruct", json.dumps(str(base))), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart_run, "RECIPE", path)
        yield path


@dataclass(frozen=True)
class Shown:
    """A finished quickstart of four steps and what the command said."""

    directory: Path
    out: str
    err: str

    @property
    def kept(self) -> dict:
        return json.loads((self.directory / "quickstart.json").read_text(encoding="utf-8"))

    @property
    def commands(self) -> list[list[str]]:
        lines = [line.strip() for line in self.out.partition("What to try next")[2].splitlines()]
        return [shlex.split(line)[1:] for line in lines if line.startswith("byway ")]


@pytest.fixture(scope="module")
def shown(stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    import contextlib
    import io

    directory = tmp_path_factory.mktemp("out") / "quick start"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["quickstart", "-o", str(directory), "--steps", "4", "--seed", "3"])
    assert code == 0, err.getvalue()
    return Shown(directory, out.getvalue(), err.getvalue())


# ---------------------------------------------------------------- the recipe


def test_the_packaged_recipe_is_the_published_one() -> None:
    assert (Path(quickstart_run.__file__).parent / "recipe.yaml").read_bytes() == PUBLISHED.read_bytes()


def test_the_command_changes_nothing_in_the_recipe_but_where_the_rows_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    published, packaged = Recipe.load(PUBLISHED), packaged_recipe()
    assert published.output == packaged.output == "runs/quickstart"
    assert [Path(str(p)).resolve() for p in (packaged.data.train, packaged.data.eval)] == [measure.path("train"), measure.path("held_out")]
    assert replace(packaged, data=published.data) == published
    assert packaged_recipe(seed=5, steps=7).train == replace(packaged.train, seed=5, max_steps=7)


# ---------------------------------------------------------------- a whole run


def test_both_parts_are_measured_in_all_three_settings_and_the_scores_are_those_of_the_kept_answers(shown: Shown) -> None:
    kept = shown.kept
    assert kept["finished"] is True and list(kept["scores"]) == sorted(SETTINGS)
    for setting in SETTINGS:
        for part in PARTS:
            answers = kept["answers"][setting][part]
            found = measure.score(answers, measure.read(part))
            assert len(answers) == 40 and kept["scores"][setting][part] == json.loads(json.dumps(found.__dict__, default=dict))
    before, examples, after = (kept["answers"][setting] for setting in SETTINGS)
    assert before != examples and before != after, "three settings gave the same answers"


def test_the_answers_are_those_of_transformers_own_generation(shown: Shown, base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    for place, setting, examples in ((base, "before", 0), (base, "before_with_examples", 2), (shown.directory / "merged", "after", 0)):
        model = AutoModelForCausalLM.from_pretrained(place)
        for number in (0, 7):
            row = measure.read("hard")[number]
            ids = tokenizer.apply_chat_template(
                measure.prompt(row, measure.examples(examples)), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                out = model.generate(**ids, max_new_tokens=20, do_sample=False)
            answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            assert answer and shown.kept["answers"][setting]["hard"][number].startswith(answer)


def test_the_run_lies_where_the_command_says(shown: Shown) -> None:
    table = shown.out.partition("Where everything is")[2].partition("What to try next")[0]
    named = [line.split("  ")[0] for line in table.splitlines() if str(shown.directory) in line]
    assert len(named) == 7 and all(Path(name).exists() for name in named)
    assert (shown.directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [row["step"] for row in losses(shown.directory) if not row.get("eval")] == [1, 2, 3, 4]
    assert shown.kept["training"]["step"] == 4 and Recipe.load(shown.directory / "recipe.yaml").train.seed == 3
    assert set(shown.kept["seconds"]) == {"before", "training", "after", "merging", "total"}


def test_the_merge_is_certified_and_the_verdict_shown(shown: Shown) -> None:
    certificate = json.loads((shown.directory / "merged" / "certificate.json").read_text(encoding="utf-8"))
    assert certificate["passed"] is True and shown.kept["merge"]["passed"] is True and "certificate PASSED" in shown.out
    assert shown.kept["merge"]["share"] == certificate["share"] > 0.999


def test_scores_samples_and_what_each_part_means_are_shown(shown: Shown) -> None:
    for part, meaning in PARTS.items():
        assert f"{part}: {meaning}" in shown.out
    for part, number in (("held_out", 0), ("held_out", 1), ("hard", 0)):
        row = measure.read(part)[number]
        assert f"{part}: {row.message}" in shown.out and row.answer in shown.out
    scores = [line for line in shown.out.splitlines() if line.startswith(("held_out ", "hard "))]
    assert len(scores) == 6 and all(len(line.split()) > 6 for line in scores)


def test_a_log_is_readable_line_by_line(shown: Shown) -> None:
    assert "\r" not in shown.err + shown.out and "\x1b" not in shown.err + shown.out
    assert len(shown.err.splitlines()) < 70
    for stage in ("1/4 before", "2/4 training", "3/4 after", "4/4 merging"):
        assert sum(line.startswith(stage) for line in shown.err.splitlines()) == 1


def test_every_command_it_proposes_works(shown: Shown, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
    assert [command[0] for command in shown.commands] == ["chat", "generate", "eval", "data", "inspect", "train", "quickstart"]
    for command in shown.commands:
        shorter = {"train": ["train.max_steps=1"], "quickstart": ["--steps", "1"]}.get(command[0], [])
        assert main([*command, *shorter]) == 0, capsys.readouterr().err


# ---------------------------------------------------------------- interruptions and refusals


def test_an_interrupted_quickstart_says_how_to_go_on_and_resumes_to_the_same_result(
    shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, own, signalled = tmp_path / "cut short", quickstart_run.quickstart, interrupt_at(2)

    def interrupted(recipe: Recipe, *, on_event: Observer, **options: bool) -> Result:
        def both(event: Event) -> None:
            on_event(event)
            signalled(event)

        return own(recipe, on_event=both, **options)

    with monkeypatch.context() as patch:
        patch.setattr(quickstart_run, "quickstart", interrupted)
        assert main(["quickstart", "-o", str(directory), "--steps", "4", "--seed", "3"]) == 130
    said = capsys.readouterr()
    go_on = ["quickstart", "--resume", "-o", str(directory)]
    assert shlex.join(["byway", *go_on]) in said.err and said.out == ""
    assert (directory / "checkpoints" / "step-2" / "complete.json").is_file()
    assert json.loads((directory / "quickstart.json").read_text(encoding="utf-8"))["finished"] is False

    for refused in (["quickstart", "-o", str(directory)], [*go_on, "--steps", "9"], [*go_on, "--overwrite"]):
        assert main(refused) == 2 and "hint:" in capsys.readouterr().err

    assert main(go_on) == 0
    assert "two examples" not in capsys.readouterr().err, "what had been measured was measured again"
    kept = json.loads((directory / "quickstart.json").read_text(encoding="utf-8"))
    assert {key: kept[key] for key in ("answers", "scores", "merge")} == {key: shown.kept[key] for key in ("answers", "scores", "merge")}
    assert losses(directory) == losses(shown.directory)
    assert main(go_on) == 2 and "finished" in capsys.readouterr().err


def test_nobody_else_writes_to_the_directory_from_the_first_answer_to_the_last_tensor(
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    recipe = packaged_recipe(directory, steps=1)
    tried: list[str] = []

    def second(event: Event) -> None:
        stage = f"{type(event).__name__} {getattr(event, 'done', '')}"
        if stage not in ("Answering 0", "Stepped ", "Merging 1") or stage in tried:
            return
        tried.append(stage)
        for options in ([], ["--overwrite"]):
            assert Context().run(main, ["quickstart", "-o", str(directory), *options]) == 2
            assert f"in use by process {os.getpid()}" in capsys.readouterr().err
        if (file := directory / "recipe.yaml").is_file():
            for command in (
                ["train", str(file), "--resume"],
                ["train", str(file), "--overwrite"],
                ["quickstart", "--resume", "-o", str(directory)],
            ):
                assert Context().run(main, command) == 2
                assert f"in use by process {os.getpid()}" in capsys.readouterr().err

    finished = quickstart(recipe, on_event=second)
    assert tried == ["Answering 0", "Stepped ", "Merging 1"] and finished.certificate is not None
    assert not [name for name in tree(directory) if name.startswith(".")]


def test_what_is_already_there_is_replaced_only_when_asked_and_never_if_it_is_someone_elses(
    shown: Shown, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(shown.directory, directory)
    before = tree(directory)
    assert main(["quickstart", "-o", str(directory)]) == 2 and "--overwrite" in capsys.readouterr().err
    (directory / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(["quickstart", "-o", str(directory), "--overwrite"]) == 2 and "notes.txt" in capsys.readouterr().err
    (directory / "notes.txt").unlink()
    assert tree(directory) == before
    assert main(["quickstart", "-o", str(directory), "--overwrite", "--steps", "1"]) == 0
    kept = json.loads((directory / "quickstart.json").read_text(encoding="utf-8"))
    assert kept["finished"] is True and kept["training"]["step"] == 1


def test_what_cannot_work_is_refused_before_anything_is_loaded_or_written(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_, **__):
        raise RuntimeError("the base was loaded")

    monkeypatch.setattr(quickstart_run, "load_base", never)
    (tmp_path / "a file").write_text("", encoding="utf-8")
    before = tree(tmp_path)
    for arguments, said in (
        (["-o", str(tmp_path / "a file")], "is a file"),
        (["-o", str(tmp_path / "new"), "--steps", "0"], "steps"),
        (["-o", str(tmp_path / "new"), "--seed", "-1"], "seed"),
        (["-o", str(tmp_path / "new"), "--resume"], "no quickstart to resume"),
        (["-o", str(tmp_path / "new"), "--step", "1"], "--step"),
    ):
        assert main(["quickstart", *arguments]) == 2 and said in capsys.readouterr().err
    monkeypatch.setattr(quickstart_run, "NEEDED_BYTES", 10**18)
    assert main(["quickstart", "-o", str(tmp_path / "new")]) == 2 and "MB free" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_without_a_base_its_own_error_is_shown_and_nothing_is_written(stand_in: Path, tmp_path: Path) -> None:
    recipe = packaged_recipe(tmp_path / "new")
    with pytest.raises(ConfigError, match="no-such-model"):
        quickstart(replace(recipe, base=replace(recipe.base, model="./no-such-model")))
    assert not (tmp_path / "new").exists()


def test_a_merge_that_is_not_certified_fails_the_command_and_leaves_the_adapter(
    shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from byway.workshop.merge import certificate

    directory = tmp_path / "run"
    shutil.copytree(shown.directory, directory)
    shutil.rmtree(directory / "merged")
    (directory / "quickstart.json").write_text(json.dumps({**shown.kept, "finished": False}), encoding="utf-8")
    adapter = tree(directory / "adapter")
    monkeypatch.setattr(certificate, "_problems", lambda *_: ["it was made to fail"])
    assert main(["quickstart", "-o", str(directory), "--resume"]) == 3
    said = capsys.readouterr()
    assert "it was made to fail" in said.err and "Where everything is" not in said.out
    assert tree(directory / "adapter") == adapter and not (directory / "merged").exists()
    assert json.loads((directory / "quickstart.json").read_text(encoding="utf-8"))["finished"] is False


def test_an_observer_hears_every_stage_and_the_training_between_them(stand_in: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    result = quickstart(packaged_recipe(tmp_path / "run", steps=1), on_event=heard.append)
    kinds = [type(event) for event in heard]
    first = {kind: kinds.index(kind) for kind in (Answering, Measured, Stepped, Merging)}
    assert sorted(first, key=lambda kind: first[kind]) == [Answering, Measured, Stepped, Merging]
    assert [event.setting for event in heard if isinstance(event, Measured)] == list(SETTINGS)
    for setting in SETTINGS:
        done = [event.done for event in heard if isinstance(event, Answering) and event.setting == setting]
        assert done == sorted(set(done)) and done[0] == 0 and done[-1] == 80
    assert result.scores["after"]["hard"] == next(e.scores["hard"] for e in reversed(heard) if isinstance(e, Measured))
