"""Files to tensors and models, and back."""
