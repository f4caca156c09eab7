"""GSM8K as the trainer reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from steepest.data.prepare.gsm8k import prepare_gsm8k


@pytest.fixture(scope="session")
def data(shared, tmp_path_factory) -> Path:
    """A folder with the real train.parquet and test.parquet."""
    folder = tmp_path_factory.mktemp("gsm8k")
    prepare_gsm8k(folder, local_path=shared / "gsm8k")
    return folder
