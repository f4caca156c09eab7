"""Rows in, token ids and their order out. Nothing here imports torch."""
