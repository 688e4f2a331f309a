"""The architecture facts of one model as one value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from byway.core.families.fused import Fused
from byway.core.families.table import Kind
from byway.core.slots import parent_path
from byway.errors import TargetError

__all__ = ["ROLES", "Facts", "find", "inside", "layer_above", "layer_index", "locate"]

ROLES = ("attention", "feed-forward")
"""Targets besides names: the linear maps of all attentions, or of all feed-forward parts."""

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
"""Fact → what to do without it."""

_PROJECTIONS: Mapping[str, frozenset[str]] = {
    "q": frozenset({"q_proj", "query", "q", "query_proj", "q_lin", "q_b_proj"}),
    "k": frozenset({"k_proj", "key", "k", "key_proj", "k_lin", "kv_b_proj"}),
    "v": frozenset({"v_proj", "value", "v", "value_proj", "v_lin", "kv_b_proj"}),
}
"""Names of the maps to queries, keys and values. DeepSeek's ``kv_b_proj`` computes keys and values."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Where the parts of a model are.

    Paths are dotted module paths from the root that was asked about. ``()``, ``{}`` and None mean: not known.
    """

    model_type: str
    """``config.model_type``; ``""`` without a configuration."""
    kind: Kind = "unknown"
    trunk: str | None = None
    """The module that returns the last hidden state: ``model`` of LlamaForCausalLM, ``""`` of LlamaModel. None for
    T5ForConditionalGeneration, which has two (its stacks) and no module around them."""
    stack_modules: Mapping[str, str] = field(default_factory=dict)
    """Stack name -> the module that runs its layers (``{"encoder": "encoder", "decoder": "decoder"}`` of T5)."""
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Stack name -> its layers, in the order in which they run."""
    attention_linears: tuple[str, ...] = ()
    feed_forward_linears: tuple[str, ...] = ()
    attention_outputs: tuple[str, ...] = ()
    """The linear maps through which attentions write to the residual stream."""
    feed_forward_outputs: tuple[str, ...] = ()
    """The linear maps through which feed-forward parts write to it. Experts stored as 3-D parameters have none."""
    attention_modules: tuple[str, ...] = ()
    """The modules in which queries meet keys: the ``module`` argument of transformers' attention functions."""
    feed_forward_modules: tuple[str, ...] = ()
    """Whole feed-forward parts without residual and norm. Empty if their maps are children of the layer itself (BERT,
    BART, OPT) or if the module adds the residual (MPT)."""
    default_targets: tuple[str, ...] = ()
    """The targets if none are named, as in HF peft."""
    head: str | None = None
    """The output embedding."""
    task_heads: tuple[str, ...] = ()
    """Newly initialized heads of a task: classifier, score, qa_outputs ..."""
    after_head: bool = False
    """True if something changes the logits after the output embedding (a cap, a scale, a bias)."""
    attention_registry: bool = False
    """True if attention goes through the functions registered with transformers."""
    fused: Mapping[str, Fused] = field(default_factory=dict)
    """Leaf name -> which output features of that linear map are queries, keys and values."""
    parallel_blocks: bool = False
    """True if attention and feed-forward read the same input and their outputs are added."""
    first_position: int = 0
    """The position id of a text's first token. RoBERTa and its relatives start after the id of their padding token."""

    def projections(self, part: str) -> dict[str, tuple[tuple[int, int], ...] | None]:
        """Return the maps, also of cross-attentions, of queries (``"q"``), keys (``"k"``) or values (``"v"``).

        Path -> (start, stop) of the runs of its output features that do so; None if all do.
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

    def role(self, name: str) -> tuple[str, ...]:
        """Return the paths of a role of :data:`ROLES`. Raises TargetError if they are not known."""
        return self.require("attention_linears" if name == "attention" else "feed_forward_linears")

    def require(self, fact: str) -> Any:
        """Return the fact of that name. Raises a TargetError that says what to do instead if it is not known."""
        value = vars(self)[fact]
        if value is None or value == () or value == {}:
            what = fact.replace("_linears", "")
            name = f"a {self.model_type!r} model" if self.model_type else "this model"
            raise TargetError(f"{what.replace('_', ' ')} of {name} cannot be told from its structure", _HINTS.get(what, ""))
        return value

    def layer_of(self, path: str) -> tuple[str, int] | None:
        """Return (stack, index) of the layer that contains `path`, or None."""
        return locate(path, layer_index(self.stacks))


def inside(path: str, root: str) -> bool:
    """True if `path` is the module at `root` or lies inside it."""
    return not root or path == root or path.startswith(f"{root}.")


def layer_index(stacks: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, int]]:
    """Return a map of layer paths to (stack, index)."""
    return {path: (name, index) for name, layers in stacks.items() for index, path in enumerate(layers)}


def locate(path: str, layers: Mapping[str, tuple[str, int]]) -> tuple[str, int] | None:
    """Return (stack, index) of the innermost of `layers` at or above `path`, or None."""
    layer = layer_above(path, layers)
    return None if layer is None else layers[layer]


def layer_above(path: str, layers: Mapping[str, object]) -> str | None:
    """Return the innermost of `layers` at or above `path`, or None."""
    while path and path not in layers:
        path = parent_path(path)
    return path or None


def find(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern: ``*`` is one segment, ``{a,b}`` either name."""
    escaped = re.escape(pattern).replace(r"\*", r"[^.]+")
    return re.compile(re.sub(r"\\\{(.*?)\\\}", lambda m: f"(?:{m.group(1).replace(',', '|')})", escaped))
