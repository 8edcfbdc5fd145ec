"""What every training shares: the loop, EMA, seeded draws, learning rate, checkpoints, signals, best candidates, logging."""
