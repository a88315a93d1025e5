"""Processes that a test looks for."""

import time
from collections.abc import Callable
from pathlib import Path


def ended(pid: int) -> bool:
    """Whether a process is gone, or only its exit status is left."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def soon(holds: Callable[[], object], seconds: float = 60) -> bool:
    """Whether it holds before so many seconds are over."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
