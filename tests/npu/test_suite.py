"""What has to hold on any accelerator, on this one."""

from __future__ import annotations

import pytest

from tests.device_suite import *  # noqa: F403
from tests.device_suite import fused

pytestmark = pytest.mark.npu


def test_the_fused_attention_is_there(device: str) -> None:
    assert fused(device).name == "flash_attention_2"
