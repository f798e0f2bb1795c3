"""Training runs on top of Hugging Face's Trainer."""
