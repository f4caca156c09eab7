"""Scoring functions, each registered under names of data sources. A file here is all a reward takes. No torch here."""
