"""Reads data files and turns rows into token ids and an order of samples. Nothing here imports torch."""
