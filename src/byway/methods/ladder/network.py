"""The side network of one stack: maps down from the backbone, gates, side blocks, and the output."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from byway.core.slots import ModuleRef, SidePath, base_modules, slot_of
from byway.engine.attention.unpack import as_rows
from byway.errors import AdapterError
from byway.methods.ladder import caches
from byway.methods.ladder.blocks import Twin
from byway.methods.ladder.taps import KEY, Taps
from byway.methods.ladder.widths import Stack

__all__ = ["Gate", "Ladder", "Role", "mixed"]

Gate = Literal["learned", "fixed", "add"]
Role = Literal["alone", "encoder", "decoder"]


def mixed(side: Tensor, rung: Tensor, gate: Tensor | None, temperature: float) -> Tensor:
    """Return μ·h + (1 − μ)·D(b) with μ = sigmoid(a/T), or h + D(b) without a gate."""
    if gate is None:
        return side + rung
    share = torch.sigmoid(gate / temperature)
    return share * side + (1 - share) * rung


class Ladder(SidePath):
    """h ← D_0(e); for each kept block i: h ← μ_i·h + (1 − μ_i)·D_i(b_i), h ← SideBlock_i(h); y = U(norm(h)).

    b batch, t positions, d width of the backbone, s width of the side network. It is attached to the module that runs
    the layers and replaces its ``last_hidden_state`` (b, t, d). In the encoder of an encoder-decoder it appends norm(h)
    (b, t, s) to the frozen states instead, and the decoder's ladder splits them off.
    """

    detached: ClassVar[bool] = True

    def __init__(self, stack: Stack, twin: Twin, own: nn.Module, still: nn.Module, *, role: Role, gate: Gate, t: float, mix: bool) -> None:
        super().__init__()
        settings: Any = own.config
        d, s = settings.hidden_size, twin.config.hidden_size
        self.kept, self.layers = stack.keep, len(stack.layers)
        self.role: Role = role
        self.gate: Gate = gate
        self.temperature = t
        self.config = twin.config
        self.backbone, self.still = ModuleRef(own), ModuleRef(still)
        self.exit = None if twin.exit is None else ModuleRef(twin.exit)
        self.inner = stack.home != ""  # the mode of the root itself belongs to the user
        self.side_first_downsample = nn.Linear(d, s)
        self.side_downsamples = nn.ModuleDict({str(i): nn.Linear(d, s) for i in self.kept})
        self.side_gate_params = nn.Parameter(torch.zeros(self.layers)) if gate == "learned" else None
        self.side_block = nn.ModuleDict({str(i): block for i, block in twin.blocks.items()})
        self.rotary = twin.rotary
        self.final_side_layer_norm = twin.norm
        self.norm_name = twin.norm_name
        self.dropout = nn.Dropout(float(vars(settings).get("dropout_rate", 0.0)))  # T5 has one at the end of the stack
        self.side_final_upsample = nn.Linear(s, d) if role != "encoder" else None
        self.final_gate = nn.Parameter(torch.zeros(1)) if mix and role != "encoder" else None

    def initialize(self, generator: torch.Generator) -> None:
        """Draw D_i, D_0 and U from N(0, 0.01²) with zero biases; gates are zero, so that both inputs count half."""
        with torch.no_grad():
            for linear in (self.side_first_downsample, *self.side_downsamples.values(), self.side_final_upsample):
                if isinstance(linear, nn.Linear):
                    linear.weight.copy_(0.01 * torch.randn(linear.weight.shape, generator=generator))
                    linear.bias.zero_()

    def copy_norm(self, width: Tensor) -> None:
        """Copy the kept coordinates `width` of the backbone's last norm."""
        norm = self.final_side_layer_norm
        if norm is None:
            return
        wide = dict(self.backbone.module.get_submodule(self.norm_name).named_parameters())
        with torch.no_grad():
            for name, tensor in norm.named_parameters():
                tensor.copy_(wide[name].cpu()[width])

    def train(self, mode: bool = True) -> Ladder:
        """Switch the side network; the backbone stays in evaluation mode, without dropout."""
        super().train(mode)
        self._set_backbone(False)
        return self

    def removed(self) -> None:
        """Give the backbone the model's mode again, unless another ladder is attached here."""
        slot = slot_of(self.backbone.module)
        if slot is None or not any(isinstance(side, Ladder) for _, side in slot.sides()):
            self._set_backbone(self.training)

    def _set_backbone(self, mode: bool) -> None:
        for path, module in base_modules(self.still.module):
            if path or self.inner:
                module.training = mode

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if KEY in inputs:
            raise AdapterError("two ladders are active on one backbone: each would replace its output", "byway.activate(model, name)")
        taps = Taps()
        inputs = {**inputs, KEY: taps}
        cache = inputs.get("past_key_values")
        if cache is not None and self.role != "encoder":
            caches.check(cache, self.layers, len(self.kept))
        backbone: Any = self.backbone.module
        chosen = backbone.config._attn_implementation
        if self.config._attn_implementation != chosen:  # the user, or packing, has switched that of the backbone
            self.config._attn_implementation = chosen
        if self.role == "decoder":
            states = inputs["encoder_hidden_states"]
            d, s = self.side_first_downsample.in_features, self.side_first_downsample.out_features
            if states is None or states.shape[-1] != d + s:
                raise AdapterError(
                    f"the decoder got encoder states of width {None if states is None else states.shape[-1]}, not {d + s}: "
                    "this model did not compute them with its ladder active",
                    "pass input_ids, or encoder_outputs of this model",
                )
            taps.encoder = states[..., d:]
            inputs["encoder_hidden_states"] = states[..., :d].detach()
        return inputs

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        taps: Taps = inputs[KEY]
        frozen = (out[0] if isinstance(out, tuple) else out.last_hidden_state).detach()  # (b, t, d)
        with nullcontext() if torch.compiler.is_compiling() else _uncaptured():
            side = as_rows(self.climb(taps), frozen)  # (b, t, s)
        if self.side_final_upsample is None:
            new = torch.cat([frozen, side.to(frozen.dtype)], dim=-1)
        else:
            new = self.side_final_upsample(side).to(frozen.dtype)
            if self.exit is not None:
                new = self.exit.module(new)
            if self.final_gate is not None:
                new = mixed(new, frozen, self.final_gate.to(new.dtype), self.temperature)
        if isinstance(out, tuple):
            return (new, *out[1:])
        out.last_hidden_state = new
        pooler = self.backbone.module._modules.get("pooler")
        if pooler is not None and out.get("pooler_output") is not None:
            out.pooler_output = pooler(new)
        return out

    def climb(self, taps: Taps) -> Tensor:
        """Run the side network; return norm(h) (b, t, s) after the last kept block."""
        first = self.side_first_downsample
        dtype = first.weight.dtype
        entrance = taps.entrance
        if entrance is None or len(taps.rungs) < len(self.kept):
            raise AdapterError("the backbone skipped some of its blocks, and a ladder needs all of them", "turn layer dropping off")
        side = first(entrance.to(dtype))
        first_call = taps.rungs[self.kept[0]][0]
        cache = first_call.get("past_key_values", first_call.get("layer_past"))
        if cache is not None:
            caches.extend(cache, self.layers, self.kept)
        positions = None
        carried: tuple[Any, ...] = ()
        for index in self.kept:
            given, rung = taps.rungs[index]
            gate = None if self.gate == "add" else first.weight.new_zeros(())
            if self.side_gate_params is not None:
                gate = self.side_gate_params[index]
            side = mixed(side, self.side_downsamples[str(index)](rung.to(dtype)), gate, self.temperature)
            call = {
                # an additive mask must have the dtype of the scores
                name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in given.items()
                if name != KEY
            }
            call.pop(next(iter(given)))
            if self.rotary is not None:
                positions = self.rotary(side, call["position_ids"]) if positions is None else positions
                call["position_embeddings"] = positions
            if "position_bias" in call:
                call["position_bias"] = carried[1] if carried else None
                call["encoder_decoder_position_bias"] = carried[2] if carried else None
            if taps.encoder is not None:
                call["encoder_hidden_states"] = taps.encoder.to(dtype)
            found = _run(self.side_block[str(index)], side, call)
            side, carried = (found[0], found) if isinstance(found, tuple) else (found, ())
        if self.final_side_layer_norm is not None:
            side = self.final_side_layer_norm(side)
        return self.dropout(side)


def _run(block: nn.Module, side: Tensor, call: dict[str, Any]) -> Any:
    """Run `block` with the arguments `call`.

    Re-entrant checkpointing needs tensors that may require a gradient by position, and drops a cache passed by name.
    """
    if "position_bias" not in call:
        return block(side, **call)
    names = ("attention_mask", "position_bias", "encoder_hidden_states", "encoder_attention_mask", "encoder_decoder_position_bias")
    return block(side, *(call.pop(name, None) for name in names), **call)


@contextmanager
def _uncaptured() -> Iterator[None]:
    """Context in which transformers collects no hidden states; it would collect those of the side blocks too.

    It matters if the stack runs inside the model that collects (BERT); elsewhere that has ended when the ladder runs.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None:
        yield
        return
    token = capturing._active_collector.set(None)
    try:
        yield
    finally:
        capturing._active_collector.reset(token)
