"""P3, several concepts in one image: layout, multipath denoising, first noise, collage, alignment, refinement."""
