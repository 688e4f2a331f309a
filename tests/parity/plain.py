"""Twins made of transformers' own modules: tensors trained in place, and networks, tokens or prefixes added by hand.

Each holds one leaf tensor, under the same name, for every tensor that our adapter trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from byway.core.adapter import Adapter
from byway.core.copies import Copy, TrainedBias
from byway.core.slots import SidePath
from byway.methods.bitfit import AddedBias
from byway.methods.bottleneck.sides import Bottleneck, TrainedNorm
from byway.methods.prefix.sides import Prefix
from tests.parity.cells import Setting
from tests.parity.encoders import Rows, encoder_of


class Plain:
    """Base class: tensors that are trained in place."""

    def __init__(self, adapter: Adapter, at: Setting, directory: Path) -> None:
        self.model: Any = at.model().requires_grad_(False)
        self.names = {id(p): name for name, p in adapter.named_parameters()}
        self.leaves: dict[str, Tensor] = {}
        for site, side in adapter.side_paths():
            if isinstance(side, Copy | TrainedBias | AddedBias | TrainedNorm):
                self._in_place(site.path, side)
        self.rest(adapter, at)
        missing = {name for name, _ in adapter.named_parameters()} - set(self.leaves)
        if missing:
            raise AssertionError(f"the twin does not train {sorted(missing)[:4]}")

    def rest(self, adapter: Adapter, at: Setting) -> None:
        """Add everything that is not simply trained in place."""

    def gradients(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in self.leaves.items()}

    def ours(self, adapter: Adapter) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in adapter.named_parameters()}

    def save(self, directory: Path) -> bool:
        return False

    def own(self, parameter: Tensor) -> str:
        """Return our name of one of our tensors; empty for a tied tensor that is listed elsewhere."""
        return self.names.get(id(parameter), "")

    def _in_place(self, path: str, side: SidePath) -> None:
        """Copy the tensors of `side` into the model's own and train those; add biases that do not exist."""
        for inner, parameter in side.named_parameters():
            owner, _, leaf = f"{path}.{inner.removeprefix('copy.')}".lstrip(".").rpartition(".")
            module = self.model.get_submodule(owner)
            if module._parameters.get(leaf) is None:
                added = nn.Parameter(torch.empty_like(parameter))
                if "Norm" in type(module).__name__:  # a norm whose forward would not use a bias
                    module.register_forward_hook(lambda m, args, out, b=added: out + b)
                else:
                    module.register_parameter(leaf, added)
            else:
                added = module._parameters[leaf]
            with torch.no_grad():
                added.copy_(parameter)
            self.leaves[self.own(parameter)] = added.requires_grad_(True)


def _layers(model: Any) -> list[Any]:
    """Return (attention, first and last module of the feed-forward) of each layer, by transformers' names."""
    name = model.config.model_type
    if name in ("llama", "qwen2"):
        return [(x.self_attn, x.mlp, x.mlp) for x in model.model.layers]
    if name == "gpt2":
        return [(x.attn, x.mlp, x.mlp) for x in model.transformer.h]
    if name == "opt":
        return [(x.self_attn, x.fc1, x.fc2) for x in model.model.decoder.layers]
    if name == "vit":
        return [(x.attention, x.mlp, x.mlp) for x in model.vit.layers]
    if name == "t5":
        return [
            (x.layer[0].SelfAttention, x.layer[-1].DenseReluDense, x.layer[-1].DenseReluDense)
            for x in (*model.encoder.block, *model.decoder.block)
        ]
    return [(x.attention.output.dense, x.intermediate, x.output.dense) for x in model.base_model.encoder.layer]


class Beside(Plain):
    """Small networks W_up·σ(W_down·h) on the output of a sublayer (houlsby) or on its input (parallel, times 4)."""

    def rest(self, adapter: Adapter, at: Setting) -> None:
        sides = [side for _, side in adapter.side_paths() if isinstance(side, Bottleneck)]
        layers = _layers(self.model)
        houlsby = len(sides) == 2 * len(layers)
        if not houlsby and len(sides) != len(layers):
            raise AssertionError(f"{len(sides)} bottlenecks in {len(layers)} layers")
        for number, side in enumerate(sides):
            small = nn.ModuleDict(
                {
                    "down": nn.Linear(side.down.in_features, side.down.out_features),
                    "up": nn.Linear(side.up.in_features, side.up.out_features),
                }
            )
            small.load_state_dict(side.state_dict())
            ours = dict(side.named_parameters())
            self.leaves |= {self.own(ours[name]): p for name, p in small.named_parameters()}
            attention, start, end = layers[number // 2 if houlsby else number]
            if houlsby:
                _after(attention if number % 2 == 0 else end, small)
            else:
                _around(start, end, small)


def _after(module: nn.Module, small: nn.ModuleDict) -> None:
    def hook(m: Any, args: Any, out: Any) -> Any:
        z = out[0] if isinstance(out, tuple) else out
        z = z + small["up"](F.gelu(small["down"](z)))
        return (z, *out[1:]) if isinstance(out, tuple) else z

    module.register_forward_hook(hook)


def _around(start: nn.Module, end: nn.Module, small: nn.ModuleDict) -> None:
    read: list[Tensor] = []
    start.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    end.register_forward_hook(lambda m, args, out: out + 4.0 * small["up"](torch.relu(small["down"](read.pop()))))


class PromptAfterCls(Plain):
    """Virtual tokens after [CLS], passed as inputs_embeds."""

    def rest(self, adapter: Adapter, at: Setting) -> None:
        encoder = encoder_of(adapter)
        self.leaves |= {self.own(ours): leaf for ours, leaf in encoder.pairs}
        model = self.model

        def forward(input_ids: Tensor) -> Any:
            text = model.get_input_embeddings()(input_ids)
            virtual = encoder.vectors().expand(len(text), -1, -1)
            return model(inputs_embeds=torch.cat([text[:, :1], virtual, text[:, 1:]], dim=1))

        self.model = forward


class Prefixed(Plain):
    """Keys and values prepended in an attention function written out here."""

    def rest(self, adapter: Adapter, at: Setting) -> None:
        prefix = next(side for _, side in adapter.side_paths() if isinstance(side, Prefix))
        model = self.model
        if at.family == "t5":
            groups: dict[str, list[Any]] = {
                "encoder": [x.layer[0].SelfAttention for x in model.encoder.block],
                "decoder": [x.layer[0].SelfAttention for x in model.decoder.block],
                "cross": [x.layer[1].EncDecAttention for x in model.decoder.block],
            }
        else:
            groups = {prefix.names[0]: [x.attention for x in model.vit.layers]}
        if set(groups) != set(prefix.names):
            raise AssertionError(f"prefixes {prefix.names}, attentions {tuple(groups)}")
        for name, modules in groups.items():
            rows = Rows(prefix, name)
            self.leaves |= {self.own(ours): leaf for ours, leaf in rows.pairs}
            for index, module in enumerate(modules):
                module.__dict__["parity_prefix"] = lambda r=rows, i=index: r.row(i)
        model.set_attn_implementation("parity_prefixed")


def _prefixed(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    rows = module.parity_prefix()  # (P, 2·h·e)
    (batch, heads, _, size), count = key.shape, rows.shape[0]
    keys, values = (half.view(count, heads, size).transpose(0, 1).expand(batch, -1, -1, -1) for half in rows.chunk(2, dim=1))
    scores = options["scaling"] * query @ key.transpose(2, 3)  # (b, h, t, u)
    if options.get("position_bias") is not None:
        scores = scores + options["position_bias"]
    if mask is not None:
        scores = scores + mask
    scores = torch.cat([options["scaling"] * query @ keys.transpose(2, 3), scores], dim=-1)
    return (scores.softmax(dim=-1) @ torch.cat([values, value], dim=2)).transpose(1, 2), None


AttentionInterface.register("parity_prefixed", _prefixed)
AttentionMaskInterface.register("parity_prefixed", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
