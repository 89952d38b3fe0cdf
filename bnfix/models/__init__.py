"""A model from a spec, and the preprocessing of published ones."""
