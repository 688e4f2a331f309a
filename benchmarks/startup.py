"""What it costs to get started: imports, and attaching to a model of 1.2 billion numbers, saving, loading and merging.

    python benchmarks/startup.py [--rounds 5] [--quick] [--shape llama-1b-shape]

Imports: user plus system CPU seconds of whole, fresh processes; all commands once a round, the rounds one after another, the best of each.
CPU seconds, not wall time, so that a busy machine disturbs little; a ratio compares numbers of one run only.
Work: LoRA of rank 16 on all linear maps of a bf16 model of the shape of Llama 3.2 1B (2.5 GB): attach (also on the meta device), save,
load into the bare model, merge. byway and peft in a process each, in turns; wall seconds, medians, beside the floor: what must be written
or read over the bandwidth of memory. ``--quick`` takes the shape of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import machine as this_machine
from harness import RESULTS as FOLDER
from harness import Gate, Outcome, Variant, measure, table, write
from shapes import SHAPES

SCRIPT = Path(__file__)
RESULTS = FOLDER / "startup.json"
BUDGET = 0.3
"""What ``byway --help`` may cost, in CPU seconds."""
COMMANDS: dict[str, tuple[str, ...]] = {
    "python -c pass": ("-c", "pass"),
    "import byway": ("-c", "import byway"),
    "byway --help": ("-m", "byway", "--help"),
    "import torch": ("-c", "import torch"),
    "from byway import LoRA, attach": ("-c", "from byway import LoRA, attach"),
    "from peft import LoraConfig, get_peft_model": ("-c", "from peft import LoraConfig, get_peft_model"),
    "from trl import SFTTrainer": ("-c", "from trl import SFTTrainer"),
}
PACKAGES = ("byway", "torch", "transformers", "peft", "trl")
RANK, ALPHA = 16, 32
PARTS = ("attach", "attach, meta", "save", "load", "merge")


# ---------------------------------------------------------------- imports


def cpu_seconds(arguments: Sequence[str]) -> float:
    """User and system time of one fresh process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def environment() -> dict[str, str]:
    """One thread, no network: what is measured is the imports."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def machine() -> dict[str, Any]:
    """What the numbers depend on, without the machine's name."""
    return this_machine.machine()


def versions() -> dict[str, str]:
    """The packages that the numbers depend on."""
    return this_machine.versions(PACKAGES)


def imports(rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each command, round by round; a first round fills the file cache and is not counted."""
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            seconds = cpu_seconds(arguments)
            if number:
                found[name].append(round(seconds, 3))
    return found


# ---------------------------------------------------------------- work


def empty(shape: str, *, meta: bool) -> Any:
    """A bf16 model of that shape; its memory is written to, its values mean nothing."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = SHAPES[shape]
    config = AutoConfig.for_model(kind, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if not meta:
        model.to_empty(device="cpu")
        model.tie_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)
    return model


def as_trained(model: Any) -> None:
    """No factor is zero any more: an update of zero would be merged by leaving it out."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1e-3)


def byway_work(shape: str, folder: Path) -> Iterator[str]:
    """Each part of the work in turn; it is timed from one ``yield`` to the next."""
    import byway

    lora = byway.LoRA(rank=RANK, alpha=ALPHA, targets="all-linear")
    model, ghost = empty(shape, meta=False), empty(shape, meta=True)
    while True:
        yield ""
        adapter = byway.attach(model, lora)
        yield "attach"
        byway.attach(ghost, lora)
        yield "attach, meta"
        as_trained(model)
        yield ""
        adapter.save(folder)
        yield "save"
        byway.detach(model)
        byway.detach(ghost)
        yield ""
        byway.load(model, folder)
        yield "load"
        byway.merge(model)
        yield "merge"


def peft_work(shape: str, folder: Path) -> Iterator[str]:
    """The same with peft; ``low_cpu_mem_usage`` is its fast way to load."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = empty(shape, meta=False)
    while True:
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        ghost = empty(shape, meta=True)
        yield ""
        adapted: Any = get_peft_model(model, config)
        yield "attach"
        get_peft_model(ghost, config)
        yield "attach, meta"
        as_trained(adapted)
        yield ""
        adapted.save_pretrained(folder)
        yield "save"
        model = adapted.unload()
        yield ""
        loaded: Any = PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)
        yield "load"
        model = loaded.merge_and_unload()
        yield "merge"


def work(gate: Gate, settings: Mapping[str, Any]) -> None:
    """A worker: one repetition is every part once."""
    import torch

    torch.set_num_threads(int(settings["threads"]))
    parts: Callable[[str, Path], Iterator[str]] = {"byway": byway_work, "peft": peft_work}[settings["worker"]]
    with tempfile.TemporaryDirectory(prefix="byway-benchmark-") as folder:
        running = parts(settings["shape"], Path(folder) / "adapter")
        round_of(running)
        gate.ready()
        while gate.begin():
            gate.end(**round_of(running))
        gate.close()


def round_of(running: Iterator[str]) -> dict[str, Any]:
    """Wall and CPU seconds of each part until all have been done once."""
    found: dict[str, dict[str, float]] = {"wall_of": {}, "cpu_of": {}}
    while len(found["wall_of"]) < len(PARTS):
        wall, cpu = time.perf_counter(), time.process_time()
        name = next(running)
        if name:
            found["wall_of"][name], found["cpu_of"][name] = time.perf_counter() - wall, time.process_time() - cpu
    return found


def bandwidth(gate: Gate, settings: Mapping[str, Any]) -> None:
    """Seconds to read 256 MB and to write 256 MB."""
    import torch

    torch.set_num_threads(int(settings["threads"]))
    block = torch.ones(64 * 2**20)
    gate.ready()
    while gate.begin():
        gate.end(read=timed(lambda: block.sum()), write=timed(lambda: block.fill_(1.0)))
    gate.close()


def timed(act: Callable[[], Any]) -> float:
    """The best of three, in seconds."""
    found: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        act()
        found.append(time.perf_counter() - began)
    return min(found)


def floors(shape: str, outcome: Outcome) -> dict[str, float]:
    """The least seconds for each part: the adapter's float32 tensors written or read, each adapted weight read and written."""
    model = empty(shape, meta=True)
    base = sum(p.numel() * 2 for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    adapter = sum(4 * RANK * sum(p.shape) for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    read, fill = (min(each[key] for each in outcome.repetitions) / 2**28 for key in ("read", "write"))
    written = adapter * fill
    return {"attach": written, "attach, meta": 0.0, "save": written, "load": written + adapter * read, "merge": base * (read + fill)}


def show_work(outcomes: Mapping[str, Outcome], least: Mapping[str, float]) -> dict[str, Any]:
    """Prints the table; its numbers."""
    found: dict[str, Any] = {}
    rows: list[list[str]] = []
    for part in PARTS:
        each = {name: statistics.median(r["wall_of"][part] for r in outcomes[name].repetitions) for name in ("byway", "peft")}
        ratios = [
            b["wall_of"][part] / a["wall_of"][part]
            for a, b in zip(outcomes["byway"].repetitions, outcomes["peft"].repetitions, strict=True)
        ]
        found[part] = {**each, "times_faster": statistics.median(ratios), "floor": least[part]}
        rows.append(
            [part, *(f"{each[name]:.3f}" for name in ("byway", "peft")), f"{found[part]['times_faster']:.1f}", f"{least[part]:.3f}"]
        )
    print(f"\n{table(['', 'byway, s', 'peft, s', 'times faster', 'floor, s'], rows)}")
    print("peak, MB: " + ", ".join(f"{name} {outcomes[name].peak_mb:,}" for name in ("byway", "peft")))
    return found


def measure_work(given: argparse.Namespace, shape: str) -> dict[str, Any]:
    """Both libraries in turns, and the memory's bandwidth."""
    size = floors_size(shape)
    settings = {"shape": shape, "threads": given.threads}
    variants = [Variant(name, {**settings, "worker": name}, size) for name in ("byway", "peft")]
    outcomes = measure(
        SCRIPT, [*variants, Variant("bandwidth", {**settings, "worker": "bandwidth"}, 800)], repetitions=given.rounds, threads=given.threads
    )
    failed = [name for name, o in outcomes.items() if o.error]
    if failed:
        raise SystemExit(f"{', '.join(failed)} failed; nothing is written")
    found = show_work(outcomes, floors(shape, outcomes["bandwidth"]))
    return {"shape": shape, "threads": given.threads, "parts": found, "all": {name: o.facts() for name, o in outcomes.items()}}


def floors_size(shape: str) -> int:
    """What a worker needs, in MB: the model, the adapter, and room for the merge."""
    return 1500 + 2 * sum(p.numel() for p in empty(shape, meta=True).parameters()) // 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is done (default 5)")
    parser.add_argument("--shape", choices=tuple(SHAPES), default=None)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--parts", choices=("all", "imports", "work"), default="all")
    parser.add_argument("--quick", action="store_true", help="a model of 135 million numbers instead of 1.2 billion")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        settings = json.loads(given.worker)
        (bandwidth if settings["worker"] == "bandwidth" else work)(Gate(), settings)
        return 0
    facts: dict[str, Any] = json.loads(given.output.read_text()) if given.output.is_file() else {}
    facts = {key: facts[key] for key in ("imports", "work") if key in facts}  # a part that is not measured now is kept
    within = True
    if given.parts != "work":
        facts["imports"] = show_imports(imports(given.rounds))
        within = facts["imports"]["best"]["byway --help"] < BUDGET
        print(
            f"\nbyway --help: {facts['imports']['best']['byway --help']:.2f} s, {'within' if within else 'OVER'} its budget of {BUDGET} s"
        )
    if given.parts != "imports":
        facts["work"] = measure_work(given, given.shape or ("smollm2-135m-shape" if given.quick else "llama-1b-shape"))
    what = "imports: CPU seconds, best of the rounds, fresh processes; work: wall seconds, medians"
    print(f"written to {write('startup', what, facts, packages=PACKAGES, output=given.output)}")
    return 0 if within else 1


def show_imports(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Prints the table; its numbers."""
    best = {name: min(values) for name, values in seconds.items()}
    reference = best["from peft import LoraConfig, get_peft_model"]
    print(table(["", "CPU s", "of peft's"], [[name, f"{value:.2f}", f"{value / reference:.0%}"] for name, value in best.items()]))
    return {"best": best, "share_of_peft": {name: round(value / reference, 3) for name, value in best.items()}, "all": dict(seconds)}


if __name__ == "__main__":
    raise SystemExit(main())
