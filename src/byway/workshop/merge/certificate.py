"""Is a merged model on the disk the base with its adapter? Measured, not assumed.

Two comparisons, both of what was written, read back: (1) weights (``survival.py``): how much of each module's ΔW is there, and every other
tensor byte for byte; (2) outputs on some prompts: merged against base + adapter, with base + adapter against the bare base
beside it, so that it is seen that the adapter does something. Outputs are computed in float32 where the model is small enough, so that the
files are compared and not the rounding of the arithmetic.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byway.errors import BywayError, ConfigError, DataError
from byway.workshop.merge.delta_check import Share, compare_weights

if TYPE_CHECKING:
    from byway.inference.runs import Found

__all__ = ["Certificate", "Limits", "Share", "certify", "prompt_ids"]

_LARGEST_FP32 = 2 * 10**9
"""Parameters up to which outputs are compared in float32 whatever the model is stored in."""
_KEPT_NUMBERS = 2**25
"""Logits kept for the comparison: 128 MB."""
_LONGEST = 128


@dataclass(frozen=True)
class Limits:
    """What a merge into one dtype must reach."""

    relative: float
    """‖merged − adapted‖ / ‖adapted‖ over outputs."""
    top1: float
    """Share of positions with the same most likely token."""
    lost: float
    """‖merged − adapted‖ / ‖adapted − base‖ over outputs."""
    share: float
    """Surviving share of ΔW over all modules; each single one must have half of that."""


_LIMITS: Mapping[torch.dtype, Limits] = {
    torch.float64: Limits(1e-5, 0.999, 0.05, 0.999),
    torch.float32: Limits(1e-5, 0.999, 0.05, 0.999),
    torch.float16: Limits(5e-3, 0.98, 0.3, 0.9),
    torch.bfloat16: Limits(3e-2, 0.95, 0.5, 0.7),
}


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was measured, and whether it is good enough."""

    passed: bool
    problems: tuple[str, ...]
    hint: str
    stored: str
    """dtype of the merged tensors."""
    computed: str
    """dtype in which outputs were compared."""
    prompts: int
    positions: int
    source: str
    """Where the prompts come from."""
    max_difference: float
    mean_difference: float
    relative_difference: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    adapter_relative_effect: float
    adapter_mean_kl: float
    adapter_top1_agreement: float
    effect_lost: float
    share: float
    modules: tuple[Share, ...]
    untouched: int
    """Tensors that the adapter does not touch and that are the base's, bit for bit (rounded once where a dtype was asked for)."""
    limits: Limits

    def lines(self) -> list[str]:
        """The certificate in a few lines."""
        worst = min(self.modules, key=lambda m: m.share)
        return [
            f"certificate {'PASSED' if self.passed else 'FAILED'}: {self.prompts} prompts ({self.source}), {self.positions} positions, "
            f"stored {self.stored}, compared in {self.computed}",
            f"merged against base + adapter: logits differ by {self.max_difference:.2e} at most, {self.mean_difference:.2e} on average "
            f"(relative {self.relative_difference:.1e}), KL {self.mean_kl:.1e}, same top token {self.top1_agreement:.1%}",
            f"base + adapter against the bare base: relative {self.adapter_relative_effect:.1e}, KL {self.adapter_mean_kl:.1e}, "
            f"same top token {self.adapter_top1_agreement:.1%}; of that effect {self.effect_lost:.2%} was lost",
            f"surviving share of ΔW: {self.share:.2%} over {len(self.modules)} modules, least {worst.share:.2%} ({worst.path}); "
            f"{self.untouched} untouched tensors are the base's own",
            *(f"problem: {problem}" for problem in self.problems),
        ]

    def to_json(self) -> str:
        """Everything, as JSON."""
        from byway.disk.files import to_json

        return to_json(_finite(asdict(self)))

    def to_markdown(self) -> str:
        """A page for people."""
        rows = "\n".join(f"| {m.path} | {m.share:.4f} | {m.cosine:.4f} | {m.error:.1e} | {m.size:.1e} |" for m in self.modules)
        text = "\n".join(f"- {line}" for line in self.lines())
        table = f"| module | share of ΔW | cosine | error | ‖ΔW‖/‖W‖ |\n|---|--:|--:|--:|--:|\n{rows}"
        return (
            f"# Merge certificate\n\nThe merged files were read back from the disk and compared with base + adapter.\n\n{text}\n\n{table}\n"
        )


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------- prompts

_NEUTRAL = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Translate into German: The weather is fine today.",
    "List three fruits that are red.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Explain why the sky is blue to a child of six.",
    "The meeting was moved from Tuesday to Thursday because",
    "Give me a short recipe for pancakes.",
    "12 + 30 = 42, and 7 * 6 =",
    '{"name": "Ada", "year": 1815, "field":',
    "Summarize: Water boils at lower temperatures on high mountains, since the air presses less on it.",
    "Who wrote the play about the prince of Denmark?",
    "Dear Sir or Madam, I am writing to ask whether",
    "What should I pack for two days in the mountains?",
    "今天天气怎么样？",
    "Once upon a time there was an old clock that",
)


@dataclass(frozen=True)
class Prompts:
    """Token ids to compare on, and where they come from."""

    ids: tuple[tuple[int, ...], ...]
    source: str


def prompt_ids(found: Found, tokenizer: Any, model: nn.Module, texts: Sequence[str] | None, samples: int) -> Prompts:
    """`samples` prompts of at most 128 tokens: `texts`, else the run's held-out rows, else built-in sentences, else random ids."""
    if texts is not None and tokenizer is None:
        raise ConfigError("the base has no tokenizer, so prompts cannot be read", "leave --prompts out: random tokens are compared then")
    if texts is not None:
        ids = [tuple(tokenizer(text).input_ids[:_LONGEST]) for text in texts if text.strip()][:samples]
        if not ids:
            raise DataError("there is no prompt: every line is empty")
        return Prompts(tuple(ids), "given")
    if tokenizer is None:
        size = int(model.config.to_dict().get("vocab_size") or 2)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(size, (samples, 24), generator=generator).tolist()
        return Prompts(tuple(tuple(row) for row in drawn), "random tokens")
    rows = _rows_of_run(found, tokenizer, samples)
    if rows:
        return Prompts(tuple(rows), "the run's rows")
    chosen = [_NEUTRAL[i % len(_NEUTRAL)] for i in range(min(samples, len(_NEUTRAL)))]
    return Prompts(tuple(_neutral_ids(tokenizer, text) for text in chosen), "built in")


def _neutral_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        return tuple(tokenizer(text, add_special_tokens=False).input_ids[:_LONGEST])
    return tuple(tokenizer(text).input_ids[:_LONGEST])


def _rows_of_run(found: Found, tokenizer: Any, samples: int) -> list[tuple[int, ...]]:
    """The first held-out (else training) rows of the run as it encoded them; none where its data is no longer there."""
    if found.recipe is None:
        return []
    from byway.inference.evaluate import run_examples

    try:
        examples = run_examples(found.recipe, tokenizer, limit=samples)
    except BywayError:
        return []  # the run's data has moved: the caller says which prompts were used
    return [tuple(example[:_LONGEST]) for example in examples][:samples]


# ---------------------------------------------------------------- the comparison


def certify(directory: Path, found: Found, prompts: Prompts, *, stored_in: Path | None) -> Certificate:
    """Compare the model in `directory` with base + adapters. `stored_in`: the base's own directory, if it has one.

    Raises:
        ConfigError: the merged directory cannot be loaded at all.
    """
    with _silently():
        weights = compare_weights(directory, found, stored_in)
        compute = torch.float32 if weights.parameters <= _LARGEST_FP32 else weights.loaded
        measured = _compare_outputs(directory, found, prompts, compute)
    limits = _LIMITS[torch.bfloat16] if found.quantize == "int8" else _LIMITS.get(weights.dtype, _LIMITS[torch.bfloat16])
    share, modules, dtype = weights.share, weights.modules, weights.dtype
    problems = _problems(measured, share, modules, weights.differing, limits) + _tokenizer_problem(directory, weights.tokenizer)
    lossy = dtype in (torch.bfloat16, torch.float16)
    hint = "keep it as an adapter, or merge with dtype fp32" if problems and lossy else ""
    return Certificate(
        passed=not problems, problems=tuple(problems), hint=hint, stored=_short(dtype), computed=_short(compute), prompts=len(prompts.ids),
        source=prompts.source, share=share, modules=modules, untouched=weights.untouched, limits=limits, **measured,
    )  # fmt: skip


@contextlib.contextmanager
def _silently() -> Iterator[None]:
    """Loading says which base it loads; here the same one is loaded again and again. What goes wrong is raised all the same."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _problems(measured: Mapping[str, Any], share: float, modules: Sequence[Share], other: Sequence[str], limits: Limits) -> list[str]:
    problems: list[str] = []
    lost = [m.path for m in modules if not m.share >= limits.share / 2]
    if lost:
        problems.append(
            f"the adapter is lost in {len(lost)} of {len(modules)} modules ({', '.join(lost[:3])}{', …' if len(lost) > 3 else ''})"
        )
    elif not share >= limits.share:
        problems.append(f"only {share:.1%} of the adapter survived the merge")
    if other:
        problems.append(f"{len(other)} tensors that the adapter does not touch are not the base's ({', '.join(other[:3])})")
    relative, top1, gone = measured["relative_difference"], measured["top1_agreement"], measured["effect_lost"]
    if not relative <= limits.relative:
        problems.append(f"logits differ by {relative:.1e} (at most {limits.relative:.0e})")
    if not top1 >= limits.top1:
        problems.append(f"the most likely token is the same at {top1:.1%} of the positions (at least {limits.top1:.1%})")
    if not gone <= limits.lost:
        problems.append(f"{gone:.0%} of the adapter's effect on the logits is lost (at most {limits.lost:.0%})")
    return problems


def _tokenizer_problem(directory: Path, tokenizer: Any) -> list[str]:
    """The merged directory must read and write text as the base does."""
    if tokenizer is None:
        return []
    from transformers import AutoTokenizer

    probe = " ".join(_NEUTRAL)
    try:
        own = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as failure:
        return [f"its tokenizer cannot be loaded: {failure}"]
    if own(probe).input_ids != tokenizer(probe).input_ids:
        return ["its tokenizer is not the base's"]
    return [] if own.chat_template == tokenizer.chat_template else ["its chat template is not the base's"]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- outputs


def _compare_outputs(directory: Path, found: Found, prompts: Prompts, compute: torch.dtype) -> dict[str, Any]:
    from byway.base import load_base
    from byway.core.attach import disabled

    model, _ = found.load_base(compute)
    found.attach(model)
    wanted, effect = [], _Sums()
    for ids in prompts.ids:
        adapted = _thin(_outputs(model, ids), len(prompts.ids))
        with disabled(model):
            effect.add(adapted, _thin(_outputs(model, ids), len(prompts.ids)))
        wanted.append(adapted.clone())
    device = model.device
    del model
    merged, _ = load_base(directory, compute, device_map=None if device.type == "cuda" else "cpu")
    sums = _Sums()
    for ids, adapted in zip(prompts.ids, wanted, strict=True):
        sums.add(_thin(_outputs(merged, ids), len(prompts.ids)), adapted)
    lost = math.sqrt(sums.squared) / math.sqrt(effect.squared) if effect.squared else math.inf
    return {
        "positions": sums.positions,
        "max_difference": sums.largest,
        "mean_difference": sums.absolute / max(sums.numbers, 1),
        "relative_difference": sums.relative,
        "mean_kl": sums.kl / max(sums.positions, 1),
        "max_kl": sums.largest_kl,
        "top1_agreement": sums.agree / max(sums.positions, 1),
        "adapter_relative_effect": effect.relative,
        "adapter_mean_kl": effect.kl / max(effect.positions, 1),
        "adapter_top1_agreement": effect.agree / max(effect.positions, 1),
        "effect_lost": lost,
    }


@torch.no_grad()
def _outputs(model: Any, ids: Sequence[int]) -> Tensor:
    """What the model says about one prompt, (positions, outputs), in float32 on the CPU."""
    tokens = torch.tensor([list(ids)], device=model.device)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if model.main_input_name == "pixel_values":  # no words: the same noise for the same ids
        generator = torch.Generator().manual_seed(sum(ids))
        size = model.config.image_size
        picture = torch.randn(
            1, model.config.num_channels, *(size if isinstance(size, (list, tuple)) else (size, size)), generator=generator
        )
        inputs = {"pixel_values": picture.to(model.device, model.dtype)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :16]
    out = model(**inputs)
    value = out["logits"] if "logits" in out else out[0]
    return value.float().reshape(-1, value.shape[-1]).cpu()


def _thin(values: Tensor, prompts: int) -> Tensor:
    """So many evenly spaced positions that all prompts together stay small."""
    room = max(1, _KEPT_NUMBERS // (max(prompts, 1) * values.shape[-1]))
    if values.shape[0] <= room:
        return values
    return values[torch.linspace(0, values.shape[0] - 1, room).round().long()]


class _Sums:
    """Differences of outputs, summed over prompts."""

    def __init__(self) -> None:
        self.positions = self.numbers = self.agree = 0
        self.absolute = self.squared = self.norm = self.kl = self.largest = self.largest_kl = 0.0

    def add(self, one: Tensor, other: Tensor) -> None:
        """Take in one prompt's outputs, both (positions, outputs); `other` is the reference."""
        difference = one - other
        bad = not bool(torch.isfinite(difference).all())
        self.positions += one.shape[0]
        self.numbers += one.numel()
        self.absolute += math.inf if bad else float(difference.abs().sum(dtype=torch.float64))
        self.squared += math.inf if bad else float(difference.double().square().sum())
        self.norm += float(other.double().square().sum())
        self.largest = max(self.largest, math.inf if bad else float(difference.abs().max()))
        kl = torch.nn.functional.kl_div(one.log_softmax(-1), other.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        kl = kl.clamp_min(0.0)  # rounding makes it slightly negative where both are equal
        self.kl += float(kl.sum(dtype=torch.float64))
        self.largest_kl = max(self.largest_kl, float(kl.max()))
        self.agree += int((one.argmax(-1) == other.argmax(-1)).sum())

    @property
    def relative(self) -> float:
        """‖difference‖ / ‖reference‖."""
        return math.sqrt(self.squared / self.norm) if self.norm else math.inf
