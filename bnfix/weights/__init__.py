"""The example weight, chosen with labels or without."""
