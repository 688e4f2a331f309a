"""How much CPU it costs to get started: byway beside torch, peft and trl.

    python benchmarks/startup.py [--rounds 5]

User plus system CPU seconds of whole, fresh processes; all commands once a round, the rounds one after another, the best of each. CPU
seconds, not wall time, so that a busy machine disturbs little; a ratio compares numbers of one run only. The table goes to the screen,
everything with the machine and the versions to benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "startup.json"
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
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}


def versions() -> dict[str, str]:
    """The packages that the numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def measure(rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each command, round by round; a first round fills the file cache and is not counted."""
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            seconds = cpu_seconds(arguments)
            if number:
                found[name].append(round(seconds, 3))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each command is run (default 5)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    seconds = measure(given.rounds)
    best = {name: min(values) for name, values in seconds.items()}
    reference = best["from peft import LoraConfig, get_peft_model"]
    result = {
        "what": "CPU seconds (user + system), best of the rounds, fresh processes",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine() | {"load_at_start": round(load, 1)},
        "versions": versions(),
        "rounds": given.rounds,
        "best": best,
        "share_of_peft": {name: round(value / reference, 3) for name, value in best.items()},
        "all": seconds,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = given.output.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(given.output)
    width = max(map(len, best))
    print(f"{'':{width}}  CPU s   of peft's")
    for name, value in best.items():
        print(f"{name:{width}}  {value:5.2f}   {value / reference:7.0%}")
    within = best["byway --help"] < BUDGET
    print(f"\nbyway --help: {best['byway --help']:.2f} s, {'within' if within else 'OVER'} its budget of {BUDGET} s")
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
