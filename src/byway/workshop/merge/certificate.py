"""Certify a merge: read the merged files back and compare them with base plus adapter.

Two comparisons:

* Weights: share = ⟨ΔW_eff, ΔW⟩ / ‖ΔW‖² with ΔW_eff = W_merged − W_base (1: the whole update is in the files, 0: none of
  it) and error = ‖ΔW_eff − ΔW‖ / ‖ΔW‖ (includes rounding), per module. ΔW is folded again from the adapter's files.
  Every tensor that the adapter does not change must be the base's.
* Outputs on some prompts: the merged model against base + adapter. The report also compares base + adapter with the
  bare base, which is the size of the adapter's effect. Outputs are computed in float32 if the model is small enough, so
  that the comparison measures the files and not the rounding of the arithmetic.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byway.base import load_base
from byway.base.directory import stored_dtype, stored_files
from byway.core.attach import disabled
from byway.core.copies import holders
from byway.core.disk.files import finite_json, to_json
from byway.core.disk.shards import Stored, dtype_of, read, same_bytes, stored_tensors
from byway.core.slots import base_modules
from byway.core.weights import is_quantized
from byway.errors import BywayError, ConfigError, DataError
from byway.inference.evaluate import run_examples
from byway.inference.generate import prompt_tokens
from byway.inference.runs import Found
from byway.workshop.merge.decisions import differing
from byway.workshop.merge.plan import Fold, Names, alike, folds

__all__ = ["Certificate", "Limits", "Share", "certify", "prompt_ids"]

_LARGEST_FP32 = 2 * 10**9
"""Maximum number of parameters for which outputs are compared in float32, whatever the stored dtype."""
_KEPT_LOGITS = 2**25
"""Maximum number of logits kept for the comparison: 128 MB."""
_LONGEST = 128
"""Maximum number of tokens in a prompt."""


@dataclass(frozen=True)
class Limits:
    """Requirements for a merge into one dtype."""

    relative: float
    """Maximum ‖merged − adapted‖ / ‖adapted‖ of the outputs."""
    top1: float
    """Minimum share of positions with the same most likely token."""
    lost: float
    """Maximum ‖merged − adapted‖ / ‖adapted − base‖ of the outputs."""
    share: float
    """Minimum share of ΔW over all modules. Each single module must have half of that."""


_LIMITS: Mapping[torch.dtype, Limits] = {
    torch.float64: Limits(1e-5, 0.999, 0.05, 0.999),
    torch.float32: Limits(1e-5, 0.999, 0.05, 0.999),
    torch.float16: Limits(5e-3, 0.98, 0.3, 0.9),
    torch.bfloat16: Limits(3e-2, 0.95, 0.5, 0.7),
}


@dataclass(frozen=True)
class Share:
    """The part of one module's update that is in the merged files."""

    path: str
    share: float
    cosine: float
    error: float
    size: float
    """‖ΔW‖ / ‖W‖."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Measurements of a merge, and the verdict."""

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
    """Origin of the prompts."""
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
    """Number of tensors that the adapter does not change and that are the base's bit for bit (or cast to `dtype`)."""
    limits: Limits

    def lines(self) -> list[str]:
        """Return the certificate in a few lines of text."""
        worst = min(self.modules, key=lambda m: m.share)
        return [
            f"certificate {'PASSED' if self.passed else 'FAILED'}: {self.prompts} prompts ({self.source}), {self.positions} positions, "
            f"stored as {self.stored}, compared in {self.computed}",
            f"merged vs base + adapter: logits differ by at most {self.max_difference:.2e}, {self.mean_difference:.2e} on average "
            f"(relative {self.relative_difference:.1e}), KL {self.mean_kl:.1e}, same top token {self.top1_agreement:.1%}",
            f"base + adapter vs base: relative {self.adapter_relative_effect:.1e}, KL {self.adapter_mean_kl:.1e}, "
            f"same top token {self.adapter_top1_agreement:.1%}; the merge lost {self.effect_lost:.2%} of this effect",
            f"share of ΔW in the files: {self.share:.2%} over {len(self.modules)} modules, lowest {worst.share:.2%} ({worst.path}); "
            f"{self.untouched} other tensors are identical to the base's",
            *(f"problem: {problem}" for problem in self.problems),
        ]

    def to_json(self) -> str:
        """Return all fields as JSON."""
        return to_json(finite_json(asdict(self)))

    def to_markdown(self) -> str:
        """Return a Markdown page."""
        rows = "\n".join(f"| {m.path} | {m.share:.4f} | {m.cosine:.4f} | {m.error:.1e} | {m.size:.1e} |" for m in self.modules)
        text = "\n".join(f"- {line}" for line in self.lines())
        table = f"| module | share of ΔW | cosine | error | ‖ΔW‖/‖W‖ |\n|---|--:|--:|--:|--:|\n{rows}"
        return f"# Merge certificate\n\nThe merged files were read back from disk and compared with base + adapter.\n\n{text}\n\n{table}\n"


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


Ids = tuple[tuple[int, ...], ...]


def prompt_ids(found: Found, tokenizer: Any, model: nn.Module, texts: Sequence[str] | None, samples: int) -> tuple[Ids, str]:
    """Return token ids of up to `samples` prompts of up to 128 tokens, and their origin.

    From `texts` if given, else from the run's rows, else from built-in sentences. Without a tokenizer: random ids.
    """
    if texts is not None:
        if tokenizer is None:
            raise ConfigError("the base has no tokenizer to encode prompts with", "omit --prompts to compare on random tokens")
        ids = [tuple(tokenizer(text).input_ids[:_LONGEST]) for text in texts if text.strip()][:samples]
        if not ids:
            raise DataError("there is no prompt: every line is empty")
        return tuple(ids), "given"
    if tokenizer is None:
        size = int(model.config.to_dict().get("vocab_size") or 2)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        drawn = torch.randint(size, (samples, 24), generator=torch.Generator().manual_seed(0)).tolist()
        return tuple(tuple(row) for row in drawn), "random tokens"
    if found.recipe is not None:
        with contextlib.suppress(BywayError):  # the run's data has moved: use other prompts and say so
            examples = run_examples(found.recipe, tokenizer, limit=samples)
            if rows := tuple(tuple(example[:_LONGEST]) for example in examples)[:samples]:
                return rows, "the run's rows"
    asked: list[Any] = list(_NEUTRAL[:samples])
    if tokenizer.chat_template and tokenizer.is_fast:
        with contextlib.suppress(DataError):  # the template wants another conversation: use the sentences as they are
            ids = prompt_tokens(tokenizer, [[{"role": "user", "content": text}] for text in asked])
            return tuple(tuple(row[:_LONGEST]) for row in ids), "built in"
    return tuple(tuple(tokenizer(text).input_ids[:_LONGEST]) for text in asked), "built in"


# ---------------------------------------------------------------- the comparison


def certify(directory: Path, found: Found, prompts: Ids, source: str, *, stored_in: Path | None) -> Certificate:
    """Compare the model in `directory` with base + adapters.

    `source`: where the prompts come from. `stored_in`: the base's directory, if it has one.

    Raises:
        ConfigError: the merged directory cannot be loaded.
    """
    from transformers import AutoConfig

    with contextlib.redirect_stderr(io.StringIO()):  # loading prints the name of the base, here again and again
        model, tokenizer = found.load_base(stored_dtype(stored_in))
        found.attach(model)
        weights, changed, stored = _compare_weights(directory, model, stored_files(stored_in))
        compute = torch.float32 if model.num_parameters() <= _LARGEST_FP32 else model.dtype
        config = model.config
        del model
        measured = weights | _compare_outputs(directory, found, prompts, compute)
        settings = differing(config, AutoConfig.from_pretrained(directory, local_files_only=True))
    limits = _LIMITS[torch.bfloat16] if found.quantize == "int8" else _LIMITS.get(stored, _LIMITS[torch.bfloat16])
    problems = [*_problems(directory, tokenizer, measured, changed, limits), *settings]
    lossy = stored in (torch.bfloat16, torch.float16)
    return Certificate(
        passed=not problems,
        problems=tuple(problems),
        hint="keep the adapter unmerged, or merge with dtype fp32" if problems and lossy else "",
        stored=str(stored).removeprefix("torch."),
        computed=str(compute).removeprefix("torch."),
        prompts=len(prompts),
        source=source,
        limits=limits,
        **measured,
    )


def _problems(directory: Path, tokenizer: Any, measured: Mapping[str, Any], differing: Sequence[str], limits: Limits) -> list[str]:
    """Return the limits that were missed, and differences of the tokenizer. NaN misses every limit."""
    problems: list[str] = []
    lost = [m.path for m in measured["modules"] if not m.share >= limits.share / 2]
    if lost:
        shown = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
        problems.append(f"the adapter's update is missing in {len(lost)} of {len(measured['modules'])} modules ({shown})")
    elif not measured["share"] >= limits.share:
        problems.append(f"only {measured['share']:.1%} of the adapter's update is in the merged weights (at least {limits.share:.1%})")
    if differing:
        problems.append(f"{len(differing)} tensors that the adapter does not change are not the base's ({', '.join(differing[:3])})")
    if not measured["relative_difference"] <= limits.relative:
        problems.append(f"logits differ by {measured['relative_difference']:.1e} (at most {limits.relative:.0e})")
    if not measured["top1_agreement"] >= limits.top1:
        problems.append(f"the top token is the same at {measured['top1_agreement']:.1%} of the positions (at least {limits.top1:.1%})")
    if not measured["effect_lost"] <= limits.lost:
        problems.append(f"{measured['effect_lost']:.0%} of the adapter's effect on the logits is lost (at most {limits.lost:.0%})")
    if tokenizer is not None:
        from transformers import AutoTokenizer

        try:
            own = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, KeyError) as failure:
            return [*problems, f"the merged tokenizer cannot be loaded: {failure}"]
        text = " ".join(_NEUTRAL)
        if own(text).input_ids != tokenizer(text).input_ids:
            problems.append("the merged tokenizer is not the one that the adapter was trained with")
        elif own.chat_template != tokenizer.chat_template:
            problems.append("the merged chat template is not the one that the adapter was trained with")
    return problems


# ---------------------------------------------------------------- weights


@torch.no_grad()
def _compare_weights(directory: Path, model: nn.Module, old: Mapping[str, Stored]) -> tuple[dict[str, Any], list[str], torch.dtype]:
    """Compare the tensors in `directory` with those of `model` (base + adapters), whose base is in the files `old`.

    Returns (the certificate's share of ΔW over all modules, modules and untouched; tensors that the adapter does not
    change and that are not the base's; the coarsest dtype of a merged tensor).
    """
    new = stored_tensors(sorted(directory.glob("*.safetensors")))
    names, shared = Names(model, old), holders(model)
    measured: list[tuple[Share, float, float]] = []
    touched: set[str | None] = {names.find(path, "weight") for path, module in base_modules(model) if is_quantized(module)}
    dtypes: set[torch.dtype] = set()
    found = folds(model)[0]
    for fold in found:
        present: dict[str, str] = {}
        for key in fold.changed:
            within, _, leaf = key.rpartition(".")
            owner = ".".join(part for part in (fold.site.path, within) if part)
            ends = shared.get(id(model.get_submodule(owner)._parameters.get(leaf)), [])
            # a tie that is kept is stored under the name of one of its ends
            places = [(owner, leaf), *(ends if ends and alike(model, found, ends) else ())]
            candidates = [name for place in places if (name := names.find(*place)) is not None]
            touched |= set(candidates)
            stored = next((name for name in candidates if name in new), None)
            present |= {} if stored is None else {key: stored}
        dtypes |= {dtype_of(new[name].code) for name in present.values()}
        measured.append(_share(fold, {key: read(new, name) for key, name in present.items()}))
    untouched, differing = 0, []
    for name, was in old.items():
        kept = names.renamed(name)
        if kept is None or kept in touched:
            continue
        if kept not in new:
            differing.append(f"{kept} is missing")
        elif (
            same_bytes(was, new[kept])
            if was.code == new[kept].code
            else torch.equal(read(old, name).to(dtype_of(new[kept].code)), read(new, kept))  # the dtype was changed on request
        ):
            untouched += 1
        else:
            differing.append(kept)
    fields = {
        "share": sum(inner for _, inner, _ in measured) / (sum(size for _, _, size in measured) or 1.0),
        "modules": tuple(share for share, _, _ in measured),
        "untouched": untouched,
    }
    return fields, differing, max(dtypes or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)


def _share(fold: Fold, merged: Mapping[str, Tensor]) -> tuple[Share, float, float]:
    """Return one module's share, ⟨ΔW_eff, ΔW⟩ and ‖ΔW‖². A tensor missing in `merged` counts as lost."""
    before, after = fold.before(), fold.after()
    inner = size = effective = error = weight = 0.0
    for key in fold.changed:
        base = before[key].double()
        wanted = after[key].double() - base
        actual = merged[key].double() - base if key in merged and merged[key].shape == base.shape else torch.zeros_like(base)
        inner += float((wanted * actual).sum())
        size += float(wanted.square().sum())
        effective += float(actual.square().sum())
        error += float((actual - wanted).square().sum())
        weight += float(base.square().sum())
    cosine = inner / math.sqrt(size * effective) if size and effective else 0.0
    share = Share(fold.site.path, inner / size, cosine, math.sqrt(error / size), math.sqrt(size / weight) if weight else math.inf)
    return share, inner, size


# ---------------------------------------------------------------- outputs


def _compare_outputs(directory: Path, found: Found, prompts: Ids, compute: torch.dtype) -> dict[str, Any]:
    """Return the fields of the certificate that compare outputs."""
    count = len(prompts)
    model, _ = found.load_base(compute)
    found.attach(model)
    wanted, effect, merge = [], _Differences(), _Differences()
    for ids in prompts:
        adapted = _logits(model, ids, count)
        with disabled(model):
            effect.add(adapted, _logits(model, ids, count))
        wanted.append(adapted.clone())
    device = model.device
    del model
    merged, _ = load_base(directory, compute, device_map=None if device.type == "cuda" else "cpu")
    for ids, adapted in zip(prompts, wanted, strict=True):
        merge.add(_logits(merged, ids, count), adapted)
    return {
        "positions": merge.positions,
        "max_difference": merge.largest,
        "mean_difference": merge.absolute / max(merge.elements, 1),
        "relative_difference": merge.relative,
        "mean_kl": merge.mean_kl,
        "max_kl": merge.largest_kl,
        "top1_agreement": merge.agreement,
        "adapter_relative_effect": effect.relative,
        "adapter_mean_kl": effect.mean_kl,
        "adapter_top1_agreement": effect.agreement,
        "effect_lost": math.sqrt(merge.squared) / math.sqrt(effect.squared) if effect.squared else math.inf,
    }


@torch.no_grad()
def _logits(model: Any, ids: Sequence[int], prompts: int) -> Tensor:
    """Return the model's outputs for one of `prompts` prompts, (positions, outputs), in float32 on the CPU.

    Long prompts are reduced to evenly spaced positions, so that the logits of all prompts fit into ``_KEPT_LOGITS``.
    """
    tokens = torch.tensor([list(ids)], device=model.device)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if model.main_input_name == "pixel_values":  # an image model: noise, seeded by the ids
        generator = torch.Generator().manual_seed(sum(ids))
        size = model.config.image_size
        shape = (1, model.config.num_channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
        inputs = {"pixel_values": torch.randn(shape, generator=generator).to(model.device, model.dtype)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :16]
    out = model(**inputs)
    logits = out["logits"] if "logits" in out else out[0]
    logits = logits.float().reshape(-1, logits.shape[-1]).cpu()
    room = max(1, _KEPT_LOGITS // (max(prompts, 1) * logits.shape[-1]))
    return logits if logits.shape[0] <= room else logits[torch.linspace(0, logits.shape[0] - 1, room).round().long()]


class _Differences:
    """Differences of outputs, accumulated over prompts."""

    def __init__(self) -> None:
        self.positions = self.elements = self.agree = 0
        self.absolute = self.squared = self.norm = self.kl = self.largest = self.largest_kl = 0.0

    def add(self, one: Tensor, other: Tensor) -> None:
        """Add one prompt's outputs, both (positions, outputs); `other` is the reference."""
        difference = one - other
        bad = not bool(torch.isfinite(difference).all())
        self.positions += one.shape[0]
        self.elements += one.numel()
        self.absolute += math.inf if bad else float(difference.abs().sum(dtype=torch.float64))
        self.squared += math.inf if bad else float(difference.double().square().sum())
        self.norm += float(other.double().square().sum())
        self.largest = max(self.largest, math.inf if bad else float(difference.abs().max()))
        kl = torch.nn.functional.kl_div(one.log_softmax(-1), other.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        kl = kl.clamp_min(0.0)  # rounding makes it slightly negative if both are equal
        self.kl += float(kl.sum(dtype=torch.float64))
        self.largest_kl = max(self.largest_kl, float(kl.max()))
        self.agree += int((one.argmax(-1) == other.argmax(-1)).sum())

    @property
    def relative(self) -> float:
        """‖difference‖ / ‖reference‖."""
        return math.sqrt(self.squared / self.norm) if self.norm else math.inf

    @property
    def mean_kl(self) -> float:
        """KL divergence per position."""
        return self.kl / max(self.positions, 1)

    @property
    def agreement(self) -> float:
        """Share of positions with the same most likely token."""
        return self.agree / max(self.positions, 1)
