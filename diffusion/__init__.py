"""The mathematics that all problems share: schedule, loss, samplers, step rules, guidance, noise. Pure functions on tensors."""
