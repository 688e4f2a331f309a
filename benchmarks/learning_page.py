"""docs/learning.md from what ``learning.py`` measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["margin", "page", "spread"]


def spread(scores: Sequence[float]) -> float:
    """The sample deviation over the seeds; 0 for one."""
    return statistics.stdev(scores) if len(scores) > 1 else 0.0


def margin(scores: Sequence[float], bar: Sequence[float]) -> float:
    """By how much the mean is above the bar's mean plus twice the larger of both spreads; a method passes where it is positive."""
    return statistics.mean(scores) - statistics.mean(bar) - 2 * max(spread(scores), spread(bar))


def _shown(scores: Sequence[float]) -> str:
    return f"{100 * statistics.mean(scores):.1f} ± {100 * spread(scores):.1f}"


def _cost(runs: Sequence[Mapping[str, Any]]) -> str:
    middle = {key: statistics.median(run[key] for run in runs) for key in ("cpu_seconds", "memory_mb")}
    return f"{middle['cpu_seconds']:.0f} | {middle['memory_mb']:.0f}"


def encoder_table(results: Mapping[str, Any], order: Sequence[str]) -> Iterator[str]:
    """Lines: each method's accuracy beside the probe's."""
    bar, runs = results["probe"], results["runs"].values()
    yield "| method | trained | epochs, learning rate | accuracy, % | above the probe | margin | CPU s | peak MB |"
    yield "|---|--:|---|--:|--:|--:|--:|--:|"
    for method in order:
        own = [run for run in runs if (run["kind"], run["method"]) == ("encoder", method)]
        if not own:
            continue
        scores, train = [run["score"] for run in own], own[0]["recipe"]["train"]
        above = 100 * (statistics.mean(scores) - statistics.mean(bar["pooled"]))
        complete = len(own) == len(bar["pooled"])
        shown = _shown(scores) if complete else f"{100 * statistics.mean(scores):.1f} ({len(own)} of {len(bar['pooled'])} seeds)"
        beyond = f"{100 * margin(scores, bar['pooled']):+.1f}" if complete else "–"
        name = method if method == "head alone" else f"`{method}`"
        trained = f"{own[0]['trained']:,}" if own[0]["trained"] else "–"
        yield (f"| {name} | {trained} | {train['epochs']}, {train['learning_rate']:g} | {shown} | {above:+.1f} | {beyond} | {_cost(own)} |")


def generative_table(results: Mapping[str, Any], order: Sequence[str]) -> Iterator[str]:
    """Lines: each method's held-out loss beside the bare model's."""
    base, runs = results["base_loss"], results["runs"].values()
    yield "| method | trained | learning rate | held-out loss | below the bare model's | CPU s | peak MB |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    yield f"| bare model | – | – | {base:.3f} | – | – | – |"
    for method in order:
        for run in (run for run in runs if (run["kind"], run["method"]) == ("generative", method)):
            rate = run["recipe"]["train"]["learning_rate"]
            yield f"| `{method}` | {run['trained']:,} | {rate:g} | {run['score']:.3f} | {base - run['score']:.3f} | {_cost([run])} |"


def page(results: Mapping[str, Any], encoder: Sequence[str], generative: Sequence[str]) -> str:
    """docs/learning.md from what was measured."""
    bar, versions = results["probe"], results["versions"]
    head = next((run["head"] for run in results["runs"].values() if run["kind"] == "encoder"), 0)
    hours = sum(run["cpu_seconds"] for run in results["runs"].values()) / 3600
    lines = [
        "# Does every method learn?",
        "",
        "Every method trains a small encoder and a small language model through `byway.train`, and is compared with what the frozen model",
        "gives without it. The page is written by",
        "",
        "```",
        "python benchmarks/learning.py --encoder DIR --data DIR",
        "```",
        "",
        f"whose runs took {hours:.1f} CPU hours here ({results['machine']['cpu']}, one thread each, torch {versions['torch']},",
        f"transformers {versions['transformers']}). Seconds are CPU seconds of loading, training and evaluating; memory is the highest",
        "resident size of the process, base and tokenizer included.",
        "",
        "## Encoder",
        "",
        "all-MiniLM-L6-v2 (22.7 million numbers, float32), 2,000 rows of SST-2 drawn by the seed, steps of 8 rows, three seeds; accuracy",
        "on the 872 validation rows after the last step, mean over the seeds ± sample deviation. The bar is logistic regression",
        "on the frozen model's pooled first token, from the same rows, its L2 strength the best of five on the validation rows:",
        f"**{_shown(bar['pooled'])}** (on the first token before the pooler {_shown(bar['first'])}, on the mean of all tokens",
        f"{_shown(bar['mean'])}). *Margin*: how far the mean is above the bar's mean plus twice the spread, the larger of the method's",
        "and the bar's deviations; positive means that it passes. Beside its own tensors (*trained*) every method trains the same head,",
        f"pooler and classifier ({head:,} numbers); *head alone* is that head on the frozen model, trained in the same way.",
        "",
        "Four methods (`prompt_tuning`, `p_tuning`, `p_tuning_v2`, `ladder_side_tuning`) take steps of 32 rows, four epochs and a weight",
        "decay of 1: with the others' settings the head has learned 2,000 rows by heart before they have moved. Settings of prompts and",
        "prefixes were chosen in two to eight trials each with seed 0 on these validation rows; those of the ladder and of `p_tuning_v2`",
        "after their first ones had failed over the three seeds (75.8 ± 3.0 and 75.0 ± 1.8), in one trial each with seeds 1 and 2; those",
        "of `p_tuning` after 76.2 ± 2.9 with 10 tokens, as the best of four over all three seeds (10 tokens: an LSTM 74.9 ± 1.3, a rate",
        "of 0.0015 75.3 ± 2.4, six epochs 77.3 ± 2.7). That favours these five. The settings of the others are usual values, not",
        "searched. The machine's speed changed by a factor of two between runs, so seconds tell orders of magnitude.",
        "",
        *encoder_table(results, encoder),
        "",
        "## Language model",
        "",
        "SmolLM2-135M-Instruct (float32), 64 rows of E2E (a table of facts, then a sentence), one epoch in steps of 4 rows, one seed; mean",
        "loss per token of the sentences of 24 held-out rows whose tables are in no training row.",
        "",
        *generative_table(results, generative),
    ]
    return "\n".join(lines) + "\n"
