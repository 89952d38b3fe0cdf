"""A model from a spec, and what is known about published ones."""
