r"""P-tuning (version 1): virtual tokens MLP(BiLSTM(E_p)), computed from P trained embeddings E_p (P, d).

::

    E_p (P, d) ── BiLSTM, 2 layers ── Linear ── ReLU ── Linear ──┐
                                                                 ├── template ── frozen model ── head
    x ── E (frozen) ─────────────────────────────────────────────┘

Source: Liu et al., arXiv 2103.10385 §3.2. The encoder has the sizes of the authors' LAMA code (hidden size d/2 in each
direction). Their few-shot code also trains the model; here it is frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from byway.core.fields import Dropout, Rank
from byway.core.method import BuildContext
from byway.core.slots import SidePath, Site
from byway.core.weights import factor_dtype
from byway.methods.virtual.method import VirtualTokenMethod
from byway.methods.virtual.peft import VirtualTokenPeftFormat

__all__ = ["PTuning"]

Encoder = Literal["lstm", "mlp", "mlp3", "none"]


class _PTuningPeftFormat(VirtualTokenPeftFormat["PTuning"]):
    """peft saves the encoder's output and not the encoder, so an adapter read from its files has none."""

    def fields(self, method: PTuning) -> dict[str, Any]:
        """Describe the encoder as far as peft's fields allow; peft never reads them from a saved adapter."""
        return super().fields(method) | {
            "encoder_reparameterization_type": "LSTM" if method.encoder == "lstm" else "MLP",
            "encoder_num_layers": method.lstm_layers,
            "encoder_dropout": method.dropout,
        }

    def site_fields(self, method: PTuning, installed: Sequence[tuple[Site, SidePath]], config: Mapping[str, Any]) -> dict[str, Any]:
        found = super().site_fields(method, installed, config)
        usual = found["token_dim"] // 2 if method.encoder == "lstm" else found["token_dim"]
        return found | {"encoder_hidden_size": method.hidden_size or usual}

    def method(self, kind: type[PTuning], config: Mapping[str, Any]) -> PTuning:
        return replace(super().method(kind, config), encoder="none")


@dataclass(frozen=True, kw_only=True)
class PTuning(VirtualTokenMethod):
    """Virtual tokens anywhere in a template, computed by an encoder that sees all of them.

    Trainable parameters: P·d and the encoder's; an LSTM over width d with h = d/2 has 14d² + 18d (d even). A file in
    peft's format holds the encoder's output in place of the encoder.

    Raises:
        ConfigError: a value out of range.
        TargetError: the model reads no tokens.
    """

    encoder: Encoder = "lstm"
    """Encoder of the virtual tokens: ``lstm``, a bidirectional LSTM, then Linear, ReLU, Linear; ``mlp``, Linear, ReLU,
    Linear; ``mlp3``, with one more ReLU and Linear, as in HF peft; ``none``, which trains the vectors directly (an
    adapter read from a peft file)."""
    hidden_size: Rank | None = None
    """Width of the LSTM in each direction, or of the MLP; null: d/2 for the LSTM, d for an MLP."""
    lstm_layers: Annotated[int, Ge(1), Le(100)] = 2
    """Number of LSTM layers."""
    dropout: Dropout = 0.0
    """Dropout probability between the LSTM layers."""

    peft = _PTuningPeftFormat("P_TUNING")

    def contradictions(self) -> list[str]:
        problems = super().contradictions()
        if self.encoder != "lstm" and (self.lstm_layers != 2 or self.dropout):
            problems.append("lstm_layers and dropout need encoder: lstm")
        return problems

    def start(self, model: nn.Module, embedding: nn.Module, count: int, context: BuildContext) -> tuple[Tensor, nn.Module]:
        weight: Any = embedding.weight
        width, dtype = weight.shape[1], factor_dtype(embedding)
        start = torch.randn(count, width, dtype=dtype, generator=context.generator).to(weight.device)
        encoder = self._encoder(width).to(dtype)
        # torch's ranges, U(±1/√h) for an LSTM and U(±1/√in) for a linear map, from the given generator
        with torch.no_grad():
            for module in encoder.modules():
                if isinstance(module, _BiLSTM | nn.Linear):
                    bound = (module.hidden_size if isinstance(module, _BiLSTM) else module.in_features) ** -0.5
                    for parameter in module.parameters():
                        parameter.uniform_(-bound, bound, generator=context.generator)
        return start, encoder.to(weight.device)

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


class _BiLSTM(nn.Module):
    """A bidirectional LSTM over one sequence, (P, d) → (P, 2h), with the parameters of ``nn.LSTM``.

    dynamo does not trace ``nn.LSTM`` itself.
    """

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
