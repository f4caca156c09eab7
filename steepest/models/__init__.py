"""Hugging Face models on packed sequences: loading, policy, critic."""
