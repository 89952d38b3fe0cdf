"""The choice of example weights, with labels or without."""
