"""DATA to batches: every form on disk, splits, preprocessing, corruptions."""
