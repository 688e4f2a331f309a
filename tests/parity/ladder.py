"""A ladder as a narrow transformers model of the same class; the backbone's outputs are mixed into its layers by hand.

The backbone runs first, without a graph; hooks read its block outputs b_i. The narrow model starts from D_0(e), its
position tables are zero, and before its layer i the state h becomes μ_i·h + (1 − μ_i)·D_i(b_i). The base's own head
reads U(norm(h)).
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from byway.core.adapter import Adapter
from byway.methods.ladder.network import Ladder
from tests.parity.cells import Setting
from tests.parity.plain import Plain


class Narrow(Plain):
    """The twin: the backbone, the narrow model, and the maps between them."""

    def rest(self, adapter: Adapter, at: Setting) -> None:
        base = self.model
        ladders = [side for _, side in adapter.side_paths() if isinstance(side, Ladder)]
        first = ladders[0].side_first_downsample
        narrow = type(base)(_narrowed(base.config, first.in_features // first.out_features)).eval().requires_grad_(False)
        for name, p in narrow.named_parameters():
            if "wpe" in name or "embed_positions" in name:
                p.data.zero_()
        stacks = [_Stack(self, ladder, *pair) for ladder, pair in zip(ladders, zip(_parts(base), _parts(narrow), strict=True), strict=True)]
        self.model = _Runner(base, stacks, at.family)


def _narrowed(config: Any, reduction: int) -> Any:
    small = copy.deepcopy(config)
    for name in ("hidden_size", "intermediate_size", "ffn_dim", "d_ff", "d_kv", "head_dim", "word_embed_proj_dim"):
        if isinstance(vars(small).get(small.attribute_map.get(name, name)), int):
            setattr(small, name, getattr(config, name) // reduction)
    return small


def _parts(model: Any) -> list[tuple[list[Any], Any, Any]]:
    """Return for each stack: its layers, its last norm, a function that runs it from its first layer's input."""
    name = model.config.model_type
    if name in ("llama", "qwen2"):
        return [(list(model.model.layers), model.model.norm, lambda h: model.model(inputs_embeds=h, use_cache=False)[0])]
    if name == "gpt2":
        return [(list(model.transformer.h), model.transformer.ln_f, lambda h: model.transformer(inputs_embeds=h, use_cache=False)[0])]
    if name == "opt":
        stack = model.model.decoder
        return [(list(stack.layers), stack.final_layer_norm, lambda h: stack(inputs_embeds=h, use_cache=False)[0])]
    if name == "t5":
        ends = [(list(stack.block), stack.final_layer_norm) for stack in (model.encoder, model.decoder)]
        return [
            (*ends[0], lambda h: model.encoder(inputs_embeds=h)[0]),
            (*ends[1], lambda h, s: model.decoder(inputs_embeds=h, encoder_hidden_states=s, use_cache=False)[0]),
        ]
    if name == "vit":
        return [(list(model.vit.layers), model.vit.layernorm, lambda h: model.vit.layernorm(_through(model.vit.layers, h)))]
    return [(list(model.base_model.encoder.layer), None, lambda h: _through(model.base_model.encoder.layer, h))]


def _through(layers: Any, state: Tensor) -> Tensor:
    for layer in layers:
        state = layer(state)
    return state


class _Stack:
    """One stack of the backbone and its narrow twin, with the ladder's tensors as leaves."""

    def __init__(self, twin: Plain, ladder: Ladder, wide: Any, narrow: Any) -> None:
        self.wide, (self.layers, norm, self.run) = wide[0], narrow
        self.own: dict[str, Tensor] = {}
        targets = {f"side_block.{i}": layer for i, layer in enumerate(self.layers)} | {"final_side_layer_norm": norm}
        with torch.no_grad():
            for name in {n for layer in self.layers for n, _ in layer.named_parameters() if n.endswith(("k_proj.bias", "key.bias"))}:
                for layer in self.layers:
                    layer.get_parameter(name).zero_()  # the ladder leaves these out
            for ours, p in ladder.named_parameters():
                home = next((h for h in targets if ours.startswith(f"{h}.")), None)
                leaf = p.detach().clone() if home is None else targets[home].get_parameter(ours.removeprefix(f"{home}."))
                leaf.copy_(p)
                self.own[ours] = twin.leaves[twin.own(p)] = leaf.requires_grad_(True)
        self.temperature = ladder.temperature
        self.rungs: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(lambda m, args, i=i: (self.mixed(i, args[0]), *args[1:]))

    def map(self, name: str, state: Tensor) -> Tensor:
        return F.linear(state, self.own[f"{name}.weight"], self.own[f"{name}.bias"])

    def mixed(self, index: int, state: Tensor) -> Tensor:
        mu = torch.sigmoid(self.own["side_gate_params"][index] / self.temperature)
        return mu * state + (1 - mu) * self.map(f"side_downsamples.{index}", self.rungs[index + 1])

    def climb(self, *more: Tensor) -> Tensor:
        return self.run(self.map("side_first_downsample", self.rungs[0]), *more)


class _Runner:
    """Backbone and ladder together, called like the base."""

    def __init__(self, base: Any, stacks: list[_Stack], family: str) -> None:
        self.base, self.stacks, self.family = base, stacks, family

    def __call__(self, **x: Any) -> Any:
        handles = []
        for stack in self.stacks:
            stack.rungs = []
            handles.append(stack.wide[0].register_forward_pre_hook(lambda m, args, s=stack: s.rungs.append(args[0])))
            handles += [layer.register_forward_hook(lambda m, args, out, s=stack: s.rungs.append(_state(out))) for layer in stack.wide]
        with torch.no_grad():
            self.base(**(x if self.family in ("bert", "roberta", "vit") else x | {"use_cache": False}))
        for handle in handles:
            handle.remove()
        sides = [self.stacks[0].climb()]
        for stack in self.stacks[1:]:
            sides.append(stack.climb(sides[0]))
        return SimpleNamespace(logits=self.head(self.stacks[-1].map("side_final_upsample", sides[-1])))

    def head(self, state: Tensor) -> Tensor:
        base = self.base
        if self.family == "t5":
            return base.lm_head(state * base.config.d_model**-0.5)
        if self.family == "bert":
            return base.classifier(base.bert.pooler(state))
        if self.family == "roberta":
            return base.classifier(state)
        return base.classifier(state[:, 0]) if self.family == "vit" else base.lm_head(state)

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Any:
        """Decode greedily without a cache; the end token does not stop it."""
        steps: list[Tensor] = []
        ids = input_ids if self.family != "t5" else input_ids.new_zeros(len(input_ids), 1)
        for _ in range(max_new_tokens):
            given: dict[str, Any] = {"input_ids": ids} if self.family != "t5" else {"input_ids": input_ids, "decoder_input_ids": ids}
            logits = self(**given).logits[:, -1]
            steps.append(logits)
            allowed = logits.index_fill(1, torch.tensor([self.base.config.eos_token_id]), -torch.inf)
            ids = torch.cat([ids, allowed.argmax(dim=-1, keepdim=True)], dim=1)
        return SimpleNamespace(sequences=ids, logits=tuple(steps))


def _state(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
