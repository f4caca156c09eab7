"""Loggers. A new one is one file here and one line below."""

from steepest.loggers.api import LOGGERS, Logger, LoggerContext, Loggers, check_loggers, make_loggers
from steepest.loggers.console import BriefLogger, ConsoleLogger
from steepest.loggers.jsonl import JsonlLogger, SampleLog, read_metrics
from steepest.loggers.mlflow import MlflowLogger
from steepest.loggers.swanlab import SwanlabLogger
from steepest.loggers.tensorboard import TensorBoardLogger
from steepest.loggers.wandb import WandbLogger

__all__ = [
    "LOGGERS",
    "BriefLogger",
    "ConsoleLogger",
    "JsonlLogger",
    "Logger",
    "LoggerContext",
    "Loggers",
    "MlflowLogger",
    "SampleLog",
    "SwanlabLogger",
    "TensorBoardLogger",
    "WandbLogger",
    "check_loggers",
    "make_loggers",
    "read_metrics",
]
