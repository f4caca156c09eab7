"""Hugging Face models on packed sequences: loading, policy, critic."""

from steepest.devices import hide_unusable

hide_unusable()  # before the first file here that imports transformers
