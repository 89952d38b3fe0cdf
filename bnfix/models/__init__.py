"""Models from specs, and the preprocessing of published models."""
