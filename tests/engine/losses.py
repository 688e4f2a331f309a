"""Shared by the tests of the loss: terms, batches, and the comparison with the plain computation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.families import facts
from byway.data.collate import pad_batch
from byway.data.encode import Example
from byway.engine.loss.cross_entropy import LossTerms
from byway.engine.loss.tokens import token_loss
from tests import zoo
from tests.tiny import VOCABULARY

TERMS = [
    LossTerms(),
    LossTerms(label_smoothing=0.1),
    LossTerms(z_loss=1e-2),
    LossTerms(label_smoothing=0.3, z_loss=0.5),
    LossTerms(label_smoothing=1.0),
]
CAUSAL = [n for n in zoo.MODELS if facts(zoo.shared(n)).kind == "decoder" and facts(zoo.shared(n)).head is not None]


def by_hand(logits: Tensor, targets: Tensor, terms: LossTerms) -> Tensor:
    """The formula of the paper, by torch's own functions."""
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=terms.label_smoothing)
    return loss + terms.z_loss * torch.logsumexp(logits, -1).pow(2).sum()


def made(seed: int, n: int = 37, d: int = 8, v: int = 41) -> tuple[nn.Linear, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    head = nn.Linear(d, v).double()
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    return head, torch.randn(n, d, generator=g, dtype=torch.float64), torch.randint(0, v, (n,), generator=g)


def batch(seed: int = 0, lengths: tuple[int, ...] = (9, 4, 12, 6), vocabulary: int = VOCABULARY) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, vocabulary, (length,), generator=g).tolist()
        rows.append(Example(ids, [-100] * (length // 2) + ids[length // 2 :], f"row {index}"))
    return pad_batch(rows, 0)


def relative(own: list[Tensor], plain: list[Tensor]) -> float:
    together, reference = (torch.cat([g.double().flatten() for g in found]) for found in (own, plain))
    assert reference.norm() > 0
    return float((together - reference).norm() / reference.norm())


def measured(model: nn.Module, given: dict[str, Any], *, labels_only: bool, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """(mean loss, gradients of all trainable parameters, zeros if there is none)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    total, count = token_loss(model, given, labels_only=labels_only, **options)
    mean = total / count
    found = torch.autograd.grad(mean, trained, allow_unused=True)
    return mean.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def assert_equal_to_plain(model: nn.Module, given: dict[str, Any], tolerance: float = 1e-5, **options: Any) -> None:
    plain, expected = measured(model, given, labels_only=False, **options)
    own, found = measured(model, given, labels_only=True, **options)
    assert abs(own - plain) <= tolerance * abs(plain)
    assert relative(found, expected) <= tolerance
