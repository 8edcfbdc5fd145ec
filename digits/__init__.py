"""P1's modules: recipes, sampling, classifiers and the metrics of generated digits."""
