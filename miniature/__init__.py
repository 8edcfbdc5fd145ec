"""A small world rendered by code, and models trained on it: Stable Diffusion, CLIP and faces run for real without a download."""
