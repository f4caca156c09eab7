"""Steepest from a Python program or a notebook: `steepest.train`, `steepest.load_run`, `steepest.Run`."""
