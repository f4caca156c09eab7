"""Loggers: where the numbers of a run go, and the table of them. A new logger is one file in outputs/."""

from steepest.loggers.api import LOGGERS, Logger, LoggerContext, Loggers, check_loggers, make_loggers
from steepest.loggers.jsonl import SampleLog, read_metrics

__all__ = [
    "LOGGERS",
    "Logger",
    "LoggerContext",
    "Loggers",
    "SampleLog",
    "check_loggers",
    "make_loggers",
    "read_metrics",
]
