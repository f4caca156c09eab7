"""One pool for the many tests that need no more of it than scores."""

from __future__ import annotations

import pytest

from tests.support.reward_pools import custom_pool


@pytest.fixture(scope="module")
def pool():
    with custom_pool() as pool:
        pool.check([])
        yield pool
