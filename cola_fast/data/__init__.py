"""From files to batches: rows, text, tokens, tensors."""
