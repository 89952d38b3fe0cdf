"""Brief fine-tuning."""
