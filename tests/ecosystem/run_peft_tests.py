"""Run HF peft's own tests against ``byway.compat.peft``.

    python tests/ecosystem/run_peft_tests.py CHECKOUT [FILE ...] [-k WORDS]

CHECKOUT is a directory with peft's ``tests`` folder (Apache-2.0; only run, never copied). :mod:`peft_shim` takes the
place of peft, :mod:`peft_models` that of hub models. Tests of tuners that Byway does not have and of peft's internals
(``LEFT_OUT``) are left out; the report counts them by reason. The exit status is 0 if at least 95 % of the tests that
ran passed. test_initialization needs scipy.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FILES = (
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_initialization.py",
    "test_encoder_decoder_models.py",
    "test_seq_classifier.py",
)
GOAL = 0.95

OTHER_TUNER = "a tuner or LoRA variant that Byway does not have"
_VARIANTS = {
    "alora_invocation_tokens", "arrow_config", "corda_config", "ensure_weight_tying", "kasa_config", "layer_replication", "loftq_config",
    "lora_ga_config", "megatron_config", "monteclora_config", "target_parameters", "use_bdlora", "use_qalora", "velora_config",
}  # fmt: skip
_OTHER_NAMES = re.compile(
    r"adamss|alora|arrow|asymm|bdlora|beft|boft|c3a|cartridge|corda|cpt|deft|delora|fourier|frod|glora|gralora|hira|hra_|kasa|lily|loftq|loha|lokr"
    r"|lora_ga|mha|mica|miss_|monteclora|multitask|nemotron|mamba|oft_|osf|peanut|poly|psoft|pvera|randlora|road|shira|supertuning|target_param"
    r"|tinylora|unilora|vblora|velora|vera|waveft|xlora|layer_replication|paramwrapper",
    re.IGNORECASE,
)
LEFT_OUT: tuple[tuple[str, str], ...] = (
    (r"pickle|safe_serialization", "pickles, which Byway never writes"),
    (r"low_cpu_mem_usage|LowCpuMemUsage", "low_cpu_mem_usage (internals of loading)"),
    (r"device_map", "device maps"),
    (r"TestLayerRepr|repr_", "the printed form of wrapper classes"),
    (r"model_card", "the text of the model card"),
    (r"TestDynamicDispatch", "custom wrapper classes (register_custom_module)"),
    (r"HotSwapping|hotswap", "hot swapping into compiled wrappers"),
    (r"TestPeftFsdpStateDict|fsdp", "FSDP version 1"),
    (r"NamingConflict|CustomModelConfigWarning|_warns|_warning", "the texts of warnings"),
    (r"TestNoInfiniteRecursionDeepspeed", "deepspeed's wrapping of classes"),
    (r"OfflineMode", "the hub"),
    (r"TestLoadPeftKeyMapping|key_mapping|remapping", "files of models whose modules have since been renamed"),
    (r"WeightTying|weight_tying", "ensure_weight_tying"),
    (r"test_lora_conversion", "conversion between tuners"),
    (
        r"(pissa|olora)_conversion|(pissa|olora)_(rank|alpha)_pattern_and_rslora",
        "peft changes the base for PiSSA and OLoRA; here the base is unchanged, and every file is the converted one",
    ),
    (
        r"linear_init_gaussian|embedding_default|embedding_gaussian|conv2d_init_gaussian",
        "requires p > 0.5 of a single draw, tuned to peft's seed",
    ),
    (r"init_orthogonal", "an initialization that Byway does not have"),
    (r"modules_to_save_targets_lora|indices_targets_lora|bias_embedding_raises|bias_argument.invalid", "the wording or class of an error"),
    (r"multihead", "nn.MultiheadAttention as a target, which is refused"),
    (r"lora_to_embedding_layer_non_transformers.*True", "the texts of warnings"),
    (r"ignore_mismatched_sizes|overwrite_similarly_named_sibling", "loads tensors that do not fit the model, which is refused"),
    (r"adapters_with_modules_to_save$|adapters_with_trainable_token_indices$", "wrappers that remain after their last adapter is deleted"),
    (r"lora_with_dora_raises", "expects an error for something that works here (DoRA in a mixed batch)"),
    (r"in_features_out_features_exposed.LayerNorm", "in_features of a norm"),
    (r"default_target_modules", "patches peft's table of targets"),
    (r"unsupported_layer_raises", "the wording or class of an error"),
    (r"set_requires_grad_trainable_tokens", "TrainableTokensConfig"),
    (r"megatron|eva_config", "megatron, peft's EvaConfig"),
    (r"opt_timing", "timing"),
    (r"gemma4", "a model that the installed transformers may lack"),
    (r"test_disable_adapter_with_bias_warns", "expects a warning that does not apply: here disabling is exact with trained biases too"),
    (r"4d_attention_mask|offsets_position_ids_in_forward", "patches peft's own forward of virtual tokens"),
    (r"trust_remote_code", "constructs peft's PromptEmbedding itself"),
)
"""Pattern in a test's name → the reason to leave it out."""


def _values(item: Any) -> Iterator[Any]:
    spec = getattr(item, "callspec", None)
    for value in () if spec is None else spec.params.values():
        yield value
        if isinstance(value, dict):
            yield from value.values()
        if isinstance(value, list | tuple):
            yield from value


def reason_to_leave_out(item: Any) -> str | None:
    """Return the reason to leave a test out, or None."""
    from peft_shim import Foreign

    spec = getattr(item, "callspec", None)
    params = {} if spec is None else spec.params
    name = item.nodeid.partition("::")[2]
    for value in _values(item):
        if isinstance(value, Foreign) or (isinstance(value, type) and issubclass(value, Foreign)):
            return OTHER_TUNER
        if isinstance(value, dict) and (value.keys() & _VARIANTS or value.get("init_lora_weights") == "mica"):
            return OTHER_TUNER
        if value == "MHA" or (not isinstance(value, dict | type) and {k for k in _VARIANTS if vars_of(value).get(k)}):
            return OTHER_TUNER
    test = name.partition("[")[0]
    if _OTHER_NAMES.search(test) or _OTHER_NAMES.search(str(params.get("test_name", ""))):
        return OTHER_TUNER
    return next((why for pattern, why in LEFT_OUT if re.search(pattern, name if "low_cpu" not in pattern else test)), None)


def vars_of(value: Any) -> dict[str, Any]:
    """Return the fields of a configuration; nothing for any other object."""
    return vars(value) if type(value).__module__.startswith("byway.compat.peft") else {}


class Report:
    """A pytest plugin that selects tests, counts outcomes, and groups failures by message."""

    def __init__(self) -> None:
        self.left_out: dict[str, Counter[str]] = defaultdict(Counter)
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.failures: dict[str, list[str]] = defaultdict(list)
        self.skips: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        kept = []
        for item in items:
            why = reason_to_leave_out(item)
            if why is None:
                kept.append(item)
            else:
                self.left_out[Path(item.nodeid.partition("::")[0]).name][why] += 1
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept

    def pytest_runtest_logreport(self, report: Any) -> None:
        file = Path(report.nodeid.partition("::")[0]).name
        if report.skipped:
            self.outcomes[file]["skipped"] += 1
            self.skips[str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[:110]] += 1
        elif report.failed and "XPASS(strict)" in str(report.longrepr):
            self.outcomes[file]["passed"] += 1  # peft marks a known bug that does not exist here
        elif report.failed and report.when in ("setup", "call"):
            self.outcomes[file]["failed"] += 1
            message = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr)).splitlines()
            self.failures[re.sub(r"0x[0-9a-f]+|\d+\.\d+", "#", message[0] if message else "")[:160]].append(report.nodeid)
        elif report.passed and report.when == "call":
            self.outcomes[file]["passed"] += 1

    def print(self, examples: int) -> float:
        """Print the report and return the share of passed tests among those that ran."""
        print("\nNot run, by reason:")
        for file, reasons in self.left_out.items():
            for why, count in reasons.most_common():
                print(f"  {file:34} {count:5}  {why}")
        if self.skips:
            print("\nSkipped by the tests themselves:")
            for why, count in self.skips.most_common():
                print(f"  {count:5}  {why}")
        if self.failures:
            print("\nFailed, by message:")
            for message, tests in sorted(self.failures.items(), key=lambda pair: -len(pair[1])):
                print(f"  {len(tests):5}  {message}")
                for test in tests[:examples]:
                    print(f"           {test}")
        print("\nfile                                passed  failed  skipped")
        total: Counter[str] = Counter()
        for file, counts in self.outcomes.items():
            print(f"{file:34} {counts['passed']:7} {counts['failed']:7} {counts['skipped']:8}")
            total += counts
        share = total["passed"] / max(1, total["passed"] + total["failed"])
        print(f"{'all':34} {total['passed']:7} {total['failed']:7} {total['skipped']:8}   {share:.1%} of the tests that ran passed")
        return share


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="directory with peft's tests/")
    parser.add_argument("files", nargs="*", help=f"test files (default: {', '.join(FILES)})")
    parser.add_argument("-k", dest="select", default="", help="passed to pytest as -k")
    parser.add_argument("-x", dest="stop", action="store_true", help="stop at the first failure")
    parser.add_argument("--examples", type=int, default=3, help="failing tests to list for each message")
    parser.add_argument("--tb", default="no", help="passed to pytest as --tb")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path[:0] = [str(HERE), str(checkout)]
    import peft_models
    import peft_shim
    import pytest
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    peft_shim.install()
    peft_models.install()
    report = Report()
    files = [str(checkout / "tests" / Path(name).name) for name in arguments.files or FILES]
    options = [
        "-q",
        "-c",
        os.devnull,
        f"--rootdir={checkout}",
        "-p",
        "no:cacheprovider",
        f"--tb={arguments.tb}",
        "-W",
        "ignore",
        "--no-header",
    ]
    options += ["-x"] if arguments.stop else []
    options += ["-k", arguments.select] if arguments.select else []
    os.chdir(checkout)
    pytest.main([*options, *files], plugins=[report])
    return 0 if report.print(arguments.examples) >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
