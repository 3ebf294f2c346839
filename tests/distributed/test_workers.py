"""A case that fails or hangs fails only its own test."""

from __future__ import annotations

import time

import pytest

from tests.distributed.workers import Workers


def hang() -> None:
    """Exceed the limit."""
    time.sleep(1000)


def divide_by_zero() -> float:
    """Fail."""
    return 1 / 0


def test_a_case_that_fails_or_hangs_fails_only_itself() -> None:
    workers = Workers(1)
    try:
        for case, message, limit_s in (
            (hang, r"hang\(\): ranks \[0\] of 1 have not answered in 0.5 s", 0.5),
            (divide_by_zero, "ZeroDivisionError", 60.0),
        ):
            with pytest.raises(pytest.fail.Exception, match=message):
                workers.run(case, limit_s=limit_s)
    finally:
        workers.stop()
