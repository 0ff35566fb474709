"""Text and conversations to packed, resumable batches."""
