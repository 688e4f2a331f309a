"""HF peft as the twin; it gets our tensors through our file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import byway
from byway.core.adapter import Adapter
from byway.formats.peft.save import key_of
from tests.parity.cells import Setting
from tests.parity.encoders import encoder_of

PROMPT = "prompt_embeddings"
_LEARNED = "prompt_encoder.default.embedding.weight"


class Peft:
    """The adapter in peft, on its own copy of the base."""

    def __init__(self, adapter: Adapter, at: Setting, directory: Path) -> None:
        from peft import PeftModel

        adapter.save(directory)
        self.model: Any = PeftModel.from_pretrained(at.model().requires_grad_(False), str(directory)).eval()
        prompt = self.model.active_peft_config.is_prompt_learning
        for name, parameter in self.model.named_parameters():
            own = name == _LEARNED if prompt else ".default" in name and "ranknum" not in name
            parameter.requires_grad_(own or ".modules_to_save.default" in name)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by the names in peft's files."""
        return {
            PROMPT if name == _LEARNED else canonical(name): torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }

    def ours(self, adapter: Adapter) -> dict[str, Tensor]:
        return exported_gradients(adapter)

    def save(self, directory: Path) -> bool:
        self.model.save_pretrained(str(directory))
        return True


class Encoded(Peft):
    """peft's virtual tokens (or keys and values), with a second copy of the encoder in front.

    Gradients of peft's tensors go back through the encoder by the chain rule.
    """

    def __init__(self, adapter: Adapter, at: Setting, directory: Path) -> None:
        super().__init__(adapter, at, directory)
        self.encoder = encoder_of(adapter)
        self.names = {id(p): name for name, p in adapter.named_parameters()}
        self.learned = dict(self.model.named_parameters())[_LEARNED]
        with torch.no_grad():
            self.learned.copy_(self.encoder.vectors())

    def gradients(self) -> dict[str, Tensor]:
        found = super().gradients()
        vectors = self.encoder.vectors()
        vectors.backward(found.pop(PROMPT))
        return found | {self.names[id(ours)]: leaf.grad for ours, leaf in self.encoder.pairs if leaf.grad is not None}

    def ours(self, adapter: Adapter) -> dict[str, Tensor]:
        heads = {name: grad for name, grad in exported_gradients(adapter, folded=True).items() if name != PROMPT}
        own = dict(adapter.named_parameters())
        return heads | {self.names[id(p)]: own[self.names[id(p)]].grad for p, _ in self.encoder.pairs}  # pyright: ignore[reportReturnType]


class AsDoRA(Peft):
    """peft's DoRA with the tensors of a weight chain of a low-rank term and a magnitude, which is the same function."""

    def __init__(self, adapter: Adapter, at: Setting, directory: Path) -> None:
        self.dora = byway.attach(at.model(), byway.DoRA(rank=8, alpha=16))
        self.pairs: list[tuple[Any, Any]] = []
        for (site, chain), (same, side) in zip(adapter.side_paths(), self.dora.side_paths(), strict=True):
            theirs = dict(side.named_parameters())
            for name, p in chain.named_parameters():
                self.pairs.append((p, theirs.pop(name.removeprefix("links.0.").removeprefix("links.1."))))
            if theirs or site.path != same.path:
                raise AssertionError(f"{site.path} and {same.path} differ: {sorted(theirs)}")
        with torch.no_grad():
            for p, q in self.pairs:
                q.copy_(p)
        super().__init__(self.dora, at, directory)

    def ours(self, adapter: Adapter) -> dict[str, Tensor]:
        for p, q in self.pairs:
            q.grad = p.grad
        return exported_gradients(self.dora)

    def save(self, directory: Path) -> bool:
        return False


def exported(adapter: Adapter, values: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """Return what the adapter would export if its trained tensors held `values` (a number: in every element)."""
    kept = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    with torch.no_grad():
        for n, p in adapter.named_parameters():
            p.copy_(torch.as_tensor(values[n], dtype=p.dtype).expand_as(p))
        found = {
            canonical(key_of(site.path, k)): v.detach().clone() for site, side in adapter.side_paths() for k, v in side.export().items()
        }
        for n, p in adapter.named_parameters():
            p.copy_(kept[n])
    return {name: tensor for name, tensor in found.items() if not name.endswith("ranknum")}


def exported_gradients(adapter: Adapter, *, folded: bool = False) -> dict[str, Tensor]:
    """Return our gradients laid out like the exported tensors; NaN where an exported element is not trained.

    Correct if the export is affine in the trained tensors: always, unless an encoder is folded.
    """
    names = [n for n, _ in adapter.named_parameters()]
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in adapter.named_parameters()}
    zero, one, own = (exported(adapter, v) for v in (dict.fromkeys(names, 0.0), dict.fromkeys(names, 1.0), grads))
    found = {k: torch.where(one[k] != zero[k], own[k] - zero[k], torch.nan) for k in own}
    if sum(int((~grad.isnan()).sum()) for grad in found.values()) < sum(p.numel() for p in grads.values()) and not folded:
        raise AssertionError("the export does not hold every trainable parameter")
    return found


def canonical(name: str) -> str:
    """Return a tensor's name without the parts that differ between peft's methods, or between its files and modules."""
    if name.endswith(PROMPT):
        return PROMPT
    for part in (".modules_to_save.default", ".modules_to_save", ".default"):
        name = name.replace(part, "")
    name = (
        name.removeprefix("base_model.").removeprefix("model.")
        if name.startswith("base_model.model.")
        else name.removeprefix("base_model.")
    )
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name
