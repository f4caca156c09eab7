"""The start and end of a run in words: numbers by hand."""

from __future__ import annotations

import pytest

from steepest.trainer.run.summary import count, duration, end_summary, estimate_memory, kv_cache_bytes, table


@pytest.mark.parametrize(
    "number, text", [(0, "0"), (999, "999"), (1234, "1.23K"), (135_000_000, "135M"), (494_032_768, "494M"), (7e9, "7B")]
)
def test_counts(number, text):
    assert count(int(number)) == text


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0s"), (59.4, "59s"), (61, "1m 01s"), (3599, "59m 59s"), (7500, "2h 05m")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_memory_is_the_sum_of_what_holds_it():
    found = estimate_memory(
        actor=1000, critic=500, reference=1000, cast_bytes=70, engine_copy_bytes=2000, kv_cache_bytes=300
    )
    assert found.total == 1000 + 500 + 1000 + 70 + 2000 + 300
    text = estimate_memory(
        actor=2**30, critic=0, reference=0, cast_bytes=2**29, engine_copy_bytes=0, kv_cache_bytes=0
    ).describe(3 * 2**30)
    assert (
        "1.50 GiB" in text
        and "actor 1.00" in text
        and "bfloat16 copies 0.50" in text
        and "critic" not in text
        and "3.0 GiB free" in text
    )


def test_the_kv_cache_holds_the_sequences_that_are_decoded_at_once():
    # keys and values of 3 layers with 2 heads of 8, 100 tokens, 10 sequences, 4 bytes
    want = 2 * 4 * 3 * 2 * 8 * 100 * 10
    assert kv_cache_bytes(2 * 3 * 2 * 8, 10, 100, width=4) == want
    assert kv_cache_bytes(2 * 3 * 2 * 8, 5, 100, width=2) == want // 4


def test_the_end_names_first_best_and_last_and_where_things_lie():
    text = end_summary({0: 0.1, 10: 0.5, 20: 0.5, 30: 0.4}, seconds=125, steps=30, folder="runs/a")
    assert "30 in 2m 05s" in text
    assert "first validation  0.1000 at step 0" in text
    assert "best validation   0.5000 at step 10" in text, "the earlier of two equal ones"
    assert "last validation   0.4000 at step 30" in text
    assert "runs/a" in text
    assert "validation" not in end_summary({}, seconds=1, steps=1, folder="x")


def test_a_table_is_aligned():
    assert table("t", [("a", "1"), ("long", "2")]) == "t\n  a     1\n  long  2"
