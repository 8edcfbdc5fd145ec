"""P3, personalization: Stable Diffusion, embeddings of new tokens, textual inversion and sampling."""
