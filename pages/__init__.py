"""The report as one web page: which commands make it, what they left, and how it is shown. Knows the problems by their commands."""
