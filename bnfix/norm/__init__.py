"""The layer, where models have it, and how it gets there."""
