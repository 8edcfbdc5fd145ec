"""A small world rendered by code and the models trained on it: every problem runs for real without a download."""
