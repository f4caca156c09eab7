"""report.html: the curves, the samples and the configuration of a run on one page that needs no network."""

from steepest.report.page import write_report

__all__ = ["write_report"]
