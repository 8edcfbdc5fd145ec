"""The mathematics all three problems share: schedule, samplers, guidance, noise. Pure functions on tensors; no files, no printing."""
