"""Short fine-tuning runs."""
