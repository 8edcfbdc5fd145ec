"""P2's modules: face models, noises and sampling by DDIM."""
