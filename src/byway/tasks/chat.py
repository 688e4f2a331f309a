"""``data.task: chat``: answer as the assistant of a conversation."""

from __future__ import annotations

from byway.tasks.causal_lm import CausalLM

__all__ = ["Chat"]


class Chat(CausalLM):
    """Next-token prediction on conversations; prompts with completions, texts and token ids work as well."""

    keys = frozenset({"template", "template_variables", "learn"})
