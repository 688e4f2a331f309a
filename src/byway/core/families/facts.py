"""What a model is made of, as one value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from byway.core.families.fused import Fused
from byway.core.families.table import Kind
from byway.errors import TargetError

__all__ = ["ROLES", "Facts", "find", "layer_index", "locate"]

ROLES = ("attention", "feed-forward")
"""What can be written as a target beside names: the linear maps of all attentions, or of all feed-forward parts."""

_HINTS: Mapping[str, str] = {
    "trunk": "attach to the trunk itself, or use a method that does not need it",
    "stacks": "name modules by their full paths or by a regular expression",
    "attention": "name the linear maps of its attention, for instance targets=['q_proj', 'v_proj']",
    "feed_forward": "name the linear maps of its feed-forward part, for instance targets=['up_proj', 'down_proj']",
    "attention_outputs": "name the modules to use as targets",
    "feed_forward_outputs": "name the modules to use as targets",
    "attention_modules": "use a method that does not act inside the attention",
    "feed_forward_modules": "name the modules to use as targets",
    "default_targets": "pass targets: names such as ['q_proj', 'v_proj'], a regular expression, or 'all-linear'",
    "head": "use a model class with an output embedding, such as AutoModelForCausalLM",
}


_PROJECTIONS: Mapping[str, frozenset[str]] = {
    "q": frozenset({"q_proj", "query", "q", "query_proj", "q_lin", "q_b_proj"}),
    "k": frozenset({"k_proj", "key", "k", "key_proj", "k_lin", "kv_b_proj"}),
    "v": frozenset({"v_proj", "value", "v", "value_proj", "v_lin", "kv_b_proj"}),
}
"""What the maps from hidden states to queries, keys and values are called (DeepSeek's ``kv_b_proj`` gives both of the latter)."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Where things are in one model. Paths are dotted module paths from the root that was asked about; ``()``, ``{}``, None: not known."""

    model_type: str
    """``config.model_type``, or ``""`` for what has no configuration."""
    kind: Kind = "unknown"
    trunk: str | None = None
    """The module that gives the last hidden state: ``model`` of LlamaForCausalLM, ``""`` of LlamaModel; None of
    T5ForConditionalGeneration, which has two (its stacks) and no module around them."""
    stack_modules: Mapping[str, str] = field(default_factory=dict)
    """Stack name -> the module that runs the layers (``{"encoder": "encoder", "decoder": "decoder"}`` of T5)."""
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Stack name -> its layers, in the order in which they run."""
    attention_linears: tuple[str, ...] = ()
    feed_forward_linears: tuple[str, ...] = ()
    attention_outputs: tuple[str, ...] = ()
    """The linear maps through which attentions write to the residual stream."""
    feed_forward_outputs: tuple[str, ...] = ()
    """The linear maps through which feed-forward parts do (experts kept as 3-D parameters have none)."""
    attention_modules: tuple[str, ...] = ()
    """The modules in which queries meet keys (the ``module`` that transformers' attention functions are called with)."""
    feed_forward_modules: tuple[str, ...] = ()
    """Whole feed-forward parts without residual and norm; empty where their maps lie loose in the layer (BERT, BART, OPT) or where the
    module adds the residual itself (MPT)."""
    default_targets: tuple[str, ...] = ()
    """What is adapted when nothing is named, as in HF peft."""
    head: str | None = None
    """The output embedding."""
    task_heads: tuple[str, ...] = ()
    """Freshly initialized heads of a task: classifier, score, qa_outputs ..."""
    after_head: bool = False
    """Whether something changes the logits after the output embedding (a cap, a scale, a bias)."""
    attention_registry: bool = False
    """Whether attention goes through the functions registered with transformers."""
    fused: Mapping[str, Fused] = field(default_factory=dict)
    """Leaf name -> which output features of that linear map are queries, keys and values."""
    parallel_blocks: bool = False
    """Whether attention and feed-forward read the same input and are added together."""
    partial_rotary: bool = False
    """Whether only a part of each head is rotated."""
    first_position: int = 0
    """The position id of a text's first token (RoBERTa and its kin count on from their padding token's)."""

    def projections(self, part: str) -> dict[str, tuple[tuple[int, int], ...] | None]:
        """The linear maps that give queries (``"q"``), keys (``"k"``) or values (``"v"``), cross-attentions' too.

        Path -> (start, stop) of the runs of its output features that do, or None where all of them do.
        """
        found: dict[str, tuple[tuple[int, int], ...] | None] = {}
        for path in self.attention_linears:
            leaf = path.rpartition(".")[2]
            layout = self.fused.get(leaf)
            if layout is not None and part in layout.parts:
                found[path] = layout.ranges(part)
            elif leaf in _PROJECTIONS[part]:
                found[path] = None
        return found

    @property
    def attention(self) -> tuple[str, ...]:
        """Leaf names of the linear maps in attention, for instance ``("q_proj", "k_proj", "v_proj", "o_proj")``."""
        return _leaves(self.attention_linears)

    @property
    def feed_forward(self) -> tuple[str, ...]:
        """Leaf names of the linear maps in the feed-forward part."""
        return _leaves(self.feed_forward_linears)

    def role(self, name: str) -> tuple[str, ...]:
        """The paths that a role of :data:`ROLES` stands for; a :class:`TargetError` where they are not known."""
        if name == "attention":
            return self.require("attention_linears")
        return self.require("feed_forward_linears")

    def require(self, fact: str) -> Any:
        """The fact of that name, or a :class:`TargetError` that says what to do without it."""
        value = vars(self)[fact]
        if value is None or value == () or value == {}:
            what = fact.replace("_linears", "")
            name = f"a {self.model_type!r} model" if self.model_type else "this model"
            raise TargetError(f"{what.replace('_', ' ')} of {name} cannot be told from its structure", _HINTS.get(what, ""))
        return value

    def layer_of(self, path: str) -> tuple[str, int] | None:
        """(stack, index) of the layer that `path` lies in, or None."""
        return locate(path, layer_index(self.stacks))


def _leaves(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def layer_index(stacks: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, int]]:
    """Layer path -> (stack, index)."""
    return {path: (name, index) for name, layers in stacks.items() for index, path in enumerate(layers)}


def locate(path: str, layers: Mapping[str, tuple[str, int]]) -> tuple[str, int] | None:
    """(stack, index) of the innermost of `layers` at or above `path`, or None."""
    while path:
        if path in layers:
            return layers[path]
        path = path.rpartition(".")[0]
    return None


def find(pattern: str) -> re.Pattern[str]:
    """The regular expression of a table pattern: ``*`` is one segment, ``{a,b}`` either."""
    escaped = re.escape(pattern).replace(r"\*", r"[^.]+")
    return re.compile(re.sub(r"\\\{(.*?)\\\}", lambda m: f"(?:{m.group(1).replace(',', '|')})", escaped))
