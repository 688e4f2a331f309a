"""``data.task: text``: continue a text."""

from __future__ import annotations

from byway.tasks.causal_lm import CausalLM

__all__ = ["Text"]


class Text(CausalLM):
    """Next-token prediction on texts; conversations, prompts with completions and token ids work as well."""
