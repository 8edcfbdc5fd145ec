"""The parts of every training loop: precision, EMA, seeded draws, rate, checkpoints, signals, logging."""
