"""P3, zero-shot classification: CLIP models and weights, features, dataset, prompts and results."""
