"""Waiting in tests: for a condition, not for a time that a busy machine does not keep."""

import time


def until(condition, seconds: float = 180.0):
    """Wait for a condition and return its value; fails after so long."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.02)
    return value
