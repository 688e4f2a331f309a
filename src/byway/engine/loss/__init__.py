"""The loss of language models: logits only for the tokens in the loss, and only a chunk of them at a time."""
