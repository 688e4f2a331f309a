"""Use a trained model: find a run, generate, evaluate."""
