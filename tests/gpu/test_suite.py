"""The accelerator's tests on a CUDA card: `make test-gpu`. Skipped with the reason where there is none.

Jobs (PPO, GRPO, options of an update, SFT, checkpoint and resume), generation, attention, memory: the tests that
tests/npu runs too, so that one without a card knows that they run.
"""

from __future__ import annotations

import pytest

from tests.device_suite import *  # noqa: F403
from tests.npu.test_jobs import *  # noqa: F403
from tests.npu.test_rollout import *  # noqa: F403

pytestmark = pytest.mark.gpu
