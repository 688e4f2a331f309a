"""Use a trained model: find a run, generate text, evaluate."""
