"""Training a chain: our trainer, the callback for others, and what a run needs."""
