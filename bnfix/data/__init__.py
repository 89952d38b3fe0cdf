"""Data: every form on disk, splits, preprocessing, corruptions, batches."""
