"""The report as one web page: the commands that make it, the results that they leave, and how these are shown."""
