"""Read tensors and models from files, and write them."""
