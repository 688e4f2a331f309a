r"""P-tuning (version 1): the virtual tokens are MLP(BiLSTM(E_p)), made by a small encoder from P trained embeddings E_p (P, d).

::

    E_p (P, d) ── BiLSTM, 2 layers ── Linear ── ReLU ── Linear ──┐
                                                                 ├── template ── frozen model ── head
    x ── E (frozen) ─────────────────────────────────────────────┘

Source: Liu et al., arXiv 2103.10385 §3.2; the encoder's sizes as in the authors' LAMA code (hidden d/2 for each direction). The few-shot
code of the same paper also trains the model; here it is frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from byway.core.fields import dropout_problems
from byway.core.method import BuildContext
from byway.core.weights import factor_dtype
from byway.methods.virtual.method import VirtualTokenMethod
from byway.methods.virtual.sides import Place, VirtualTokens, Words
from byway.methods.virtual.template import Template

__all__ = ["PTuning"]

Encoder = Literal["lstm", "mlp", "mlp3", "none"]


@dataclass(frozen=True, kw_only=True)
class PTuning(VirtualTokenMethod):
    """Virtual tokens anywhere in a template, each made by an encoder that sees all of them.

    Trained: P·d and the encoder: with an LSTM over width d and h = d/2, 14d² + 18d (d even); the encoder is folded when saved for peft.

    Raises:
        ConfigError: a value out of range.
        TargetError: the model reads no tokens.
    """

    encoder: Encoder = "lstm"
    """``lstm``: a bidirectional LSTM, then Linear, ReLU, Linear; ``mlp``: Linear, ReLU, Linear; ``mlp3``: one more of each, as HF peft has;
    ``none``: the vectors are trained themselves (as a folded file is loaded)."""
    hidden_size: int | None = None
    """Width of the LSTM in each direction, or of the MLP; none: d/2 for the LSTM, d for an MLP."""
    lstm_layers: int = 2
    """Layers of the LSTM."""
    dropout: float = 0.0
    """Between the LSTM's layers, in [0, 1)."""

    peft_type: ClassVar[str | None] = "P_TUNING"

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.encoder not in ("lstm", "mlp", "mlp3", "none"):
            problems.append(f"encoder is {self.encoder!r}; it must be lstm, mlp, mlp3 or none")
        for name, value in (("hidden_size", self.hidden_size), ("lstm_layers", self.lstm_layers)):
            if not (name == "hidden_size" and value is None) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                problems.append(f"{name} is {value!r}; it must be a whole number of at least 1")
        problems += dropout_problems(self.dropout)
        if self.encoder != "lstm" and (self.lstm_layers != 2 or self.dropout):
            problems.append("lstm_layers and dropout are the LSTM's: they need encoder: lstm")
        return problems

    def tokens(
        self,
        model: nn.Module,
        embedding: nn.Module,
        place: Place,
        template: Template,
        words: Words,
        context: BuildContext,
    ) -> VirtualTokens:
        weight: Any = embedding.weight
        width, dtype = weight.shape[1], factor_dtype(embedding)
        start = torch.randn(template.count, width, dtype=dtype, generator=context.generator).to(weight.device)
        encoder = self._encoder(width).to(dtype)
        _start(encoder, context.generator)
        return _EncodedPrompt(embedding, place, template, words, start, encoder.to(weight.device))

    def _encoder(self, width: int) -> nn.Module:
        if self.encoder == "none":
            return nn.Identity()
        if self.encoder == "lstm":
            hidden = self.hidden_size or max(width // 2, 1)
            return nn.Sequential(
                _BiLSTM(width, hidden, self.lstm_layers, self.dropout),
                nn.Linear(2 * hidden, 2 * hidden),
                nn.ReLU(),
                nn.Linear(2 * hidden, width),
            )
        hidden = self.hidden_size or width
        middle = [nn.Linear(hidden, hidden), nn.ReLU()] if self.encoder == "mlp3" else []
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), *middle, nn.Linear(hidden, width))

    def to_peft(self) -> dict[str, Any]:
        """peft never reads the encoder of a saved adapter; its fields say what it was as far as peft has a word for it."""
        kind = "LSTM" if self.encoder == "lstm" else "MLP"
        return super().to_peft() | {
            "encoder_reparameterization_type": kind,
            "encoder_num_layers": self.lstm_layers,
            "encoder_dropout": self.dropout,
        }

    def peft_fields(self, hung: Sequence[Any], config: Mapping[str, Any]) -> dict[str, Any]:
        found = super().peft_fields(hung, config)
        usual = found["token_dim"] // 2 if self.encoder == "lstm" else found["token_dim"]
        return found | {"encoder_hidden_size": self.hidden_size or usual}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> PTuning:
        """The folded vectors: peft does not keep the encoder."""
        return cls(**cls.peft_values(config), encoder="none")


class _EncodedPrompt(VirtualTokens):
    """The vectors are an encoder's outputs for P trained embeddings."""

    def __init__(self, embedding: nn.Module, place: Place, template: Template, words: Words, start: Tensor, encoder: nn.Module) -> None:
        super().__init__(embedding, place, template, words)
        self.prompt_embeddings = nn.Parameter(start)
        self.encoder = encoder

    def vectors(self) -> Tensor:
        return self.encoder(self.prompt_embeddings)


class _BiLSTM(nn.Module):
    """A bidirectional LSTM over one sequence, (P, d) → (P, 2h), with the parameters of ``nn.LSTM``, which dynamo does not trace."""

    def __init__(self, width: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.hidden_size, self.layers, self.dropout = hidden, layers, dropout if layers > 1 else 0.0
        self.names: list[str] = []  # in the order in which torch.lstm takes them
        for layer in range(layers):
            inside = width if layer == 0 else 2 * hidden
            for direction in ("", "_reverse"):
                sizes = {
                    "weight_ih": (4 * hidden, inside),
                    "weight_hh": (4 * hidden, hidden),
                    "bias_ih": (4 * hidden,),
                    "bias_hh": (4 * hidden,),
                }
                for kind, size in sizes.items():
                    self.names.append(f"{kind}_l{layer}{direction}")
                    self.register_parameter(self.names[-1], nn.Parameter(torch.empty(size)))

    def forward(self, embeddings: Tensor) -> Tensor:
        state = embeddings.new_zeros(2 * self.layers, 1, self.hidden_size)
        weights: list[Tensor] = [weight for name in self.names if (weight := self._parameters[name]) is not None]
        out, _, _ = torch.lstm(embeddings[None], (state, state), weights, True, self.layers, self.dropout, self.training, True, True)
        return out[0]


def _start(encoder: nn.Module, generator: torch.Generator) -> None:
    """torch's own ranges, U(±1/√h) for an LSTM and U(±1/√in) for a linear map, from the given generator."""
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, _BiLSTM | nn.Linear):
                bound = (module.hidden_size if isinstance(module, _BiLSTM) else module.in_features) ** -0.5
                for parameter in module.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)
