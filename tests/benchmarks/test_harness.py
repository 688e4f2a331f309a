"""The benchmarks' harness with a script of its own: turns, sleep, peaks, failures, files."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

SCRIPT = """
import json, sys, time
sys.path.insert(0, {benchmarks!r})
from harness import Gate, Loop

settings = json.loads(sys.argv[sys.argv.index("--worker") + 1])
gate = Gate()
print("this belongs to standard error")
if settings["kind"] == "answer":
    gate.send("answer", value=settings["value"] + 1)
elif settings["kind"] == "fails":
    raise SystemExit("no such thing as a free lunch")
elif settings["kind"] == "fails later":
    gate.ready()
    gate.begin()
    raise SystemExit("not today")
elif settings["kind"] == "loop":
    loop = Loop(gate, warmup=2, steps=3, facts={{"name": "loop"}})
    for number in range(10**6):
        loop.stepped(float(number), 10)
else:
    kept = bytearray(settings["mb"] * 2**20)
    gate.ready(name=settings["kind"])
    with open(settings["turns"], "a") as turns:
        while gate.begin():
            print(settings["kind"], file=turns, flush=True)
            more = bytearray(2 * settings["mb"] * 2**20)
            del more
            end = time.process_time() + settings["burn"]
            while time.process_time() < end:
                pass
            time.sleep(settings["sleep"])
            gate.end(tokens=100)
    gate.close()
"""


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch):
    """The benchmarks' modules, as their scripts see them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness  # pyright: ignore[reportMissingImports]

    yield harness
    for name in ("harness", "machine"):
        sys.modules.pop(name, None)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(benchmarks=str(BENCHMARKS)))
    return path


def settings(kind: str, tmp_path: Path, *, burn: float = 0.05, sleep: float = 0.0, mb: int = 1) -> dict[str, object]:
    return {"kind": kind, "turns": str(tmp_path / "turns"), "burn": burn, "sleep": sleep, "mb": mb}


def test_variants_take_turns_and_are_timed(harness, script, tmp_path):
    variants = [
        harness.Variant("a", settings("a", tmp_path, burn=0.05), 1),
        harness.Variant("b", settings("b", tmp_path, burn=0.15, sleep=0.2), 1),
    ]
    found = harness.measure(script, variants, repetitions=3, threads=1, say=lambda text: None)
    assert (tmp_path / "turns").read_text().split() == ["a", "b"] * 3
    assert [len(o.repetitions) for o in found.values()] == [3, 3]
    assert 0.05 <= found["a"].median("cpu") < 0.15 <= found["b"].median("cpu") < 0.3
    assert found["b"].median("wall") >= 0.35  # what it slept is wall time and no CPU time
    assert found["a"].ratio(found["b"], by="cpu") == pytest.approx(3.0, rel=0.25)
    assert found["a"].rate(by="cpu") == pytest.approx(2000, rel=0.25)


def test_a_variant_that_waits_uses_no_cpu(harness, script, tmp_path):
    worker = harness.Worker(script, settings("a", tmp_path), 1)
    try:
        worker.hear("ready")
        status = Path(f"/proc/{worker._process.pid}/stat")

        def ticks() -> int:
            return sum(map(int, status.read_text().split()[13:15]))

        before = ticks()
        time.sleep(0.5)
        assert ticks() - before <= 5  # of 50: it may still be on its way from "ready" to its sleep, spinning it would use most of them
    finally:
        worker.stop()


def test_the_peak_is_that_of_each_process_alone(harness, script, tmp_path):
    variants = [harness.Variant("small", settings("a", tmp_path, mb=5), 1), harness.Variant("large", settings("b", tmp_path, mb=105), 1)]
    found = harness.measure(script, variants, repetitions=1, threads=1, say=lambda text: None)
    assert found["large"].peak_mb - found["small"].peak_mb == pytest.approx(300, abs=20)  # 1 + 2 parts of 100 MB
    assert found["large"].ready["start_peak_mb"] < found["large"].training_peak_mb


def test_what_does_not_fit_follows_beside_the_reference(harness, script, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "available_mb", lambda: 1000.0 + harness.SPARE_MB)
    variants = [harness.Variant(name, settings(name, tmp_path), 500) for name in ("a", "b", "c")]
    found = harness.measure(script, variants, repetitions=2, threads=1, say=lambda text: None)
    assert (tmp_path / "turns").read_text().split() == ["a", "b"] * 2 + ["a", "c"] * 2
    assert len(found["a"].repetitions) == 4
    assert len(found["c"].ratios(found["a"])) == 2


def test_a_variant_that_fails_does_not_take_the_others_with_it(harness, script, tmp_path, capsys):
    variants = [harness.Variant(name, settings(name, tmp_path), 1) for name in ("a", "fails", "fails later")]
    found = harness.measure(script, variants, repetitions=2, threads=1, say=lambda text: None)
    assert len(found["a"].repetitions) == 2
    assert "no such thing as a free lunch" in found["fails"].error
    assert "not today" in found["fails later"].error
    assert "free lunch" in capsys.readouterr().err


def test_a_loop_counts_its_steps(harness, script, tmp_path):
    found = harness.measure(
        script, [harness.Variant("loop", settings("loop", tmp_path), 1)], repetitions=2, threads=1, say=lambda text: None
    )
    loop = found["loop"]
    assert loop.ready["losses"] == [0.0, 1.0]
    assert loop.ready["name"] == "loop"
    assert [(r["steps"], r["tokens"], r["loss"]) for r in loop.repetitions] == [(3, 30, 4.0), (3, 30, 7.0)]


def test_a_question_is_answered(harness, script):
    assert harness.call(script, {"kind": "answer", "value": 41}) == {"value": 42}
    with pytest.raises(harness.Failed, match="free lunch"):
        harness.call(script, {"kind": "fails"})


def test_results_are_written_whole_with_machine_and_versions(harness, tmp_path):
    path = harness.write("name", "a test", {"value": 1}, packages=["pytest"], output=tmp_path / "deep" / "name.json")
    written = json.loads(path.read_text())
    assert written["value"] == 1
    assert written["versions"] == {"pytest": pytest.__version__}
    assert {"cpu", "cores", "instructions", "memory_mb"} <= set(written["machine"])
    assert [p.name for p in path.parent.iterdir()] == ["name.json"]


def test_a_table_lines_up(harness):
    assert harness.table(["", "s"], [["a", "1"], ["long", "10"]]).splitlines() == [
        "|      |  s |",
        "|------|----|",
        "| a    |  1 |",
        "| long | 10 |",
    ]
