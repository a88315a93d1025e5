"""Which of ``torchrun``'s processes this is, from its environment alone: options are checked before torch is imported."""

import os

from .errors import UserError


class Stopped(UserError):
    """Another process of this run is gone; that one has said why."""


def launched(name: str, otherwise: int) -> int:
    """A number that torchrun gives to its processes; ``otherwise`` in a process that it did not start (as
    ``torch.distributed.is_torchelastic_launched`` tells them apart)."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else otherwise


def rank() -> int:
    """Number of this process, from 0."""
    return launched("RANK", 0)


def world() -> int:
    """Number of processes."""
    return launched("WORLD_SIZE", 1)


def is_writer() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0
