"""Which backend serves on which device. This file alone decides; it needs neither vLLM nor Triton."""

from dataclasses import dataclass

MIN_CAPABILITY = 80


@dataclass(frozen=True)
class Choice:
    """The backend's name and why it was chosen."""

    name: str
    reason: str


def choose_backend(capability: int | None) -> Choice:
    """Backend for a CUDA compute capability (80, 90, ...); None means no CUDA device."""
    if capability is None:
        return Choice("torch", "no CUDA device")
    if capability < MIN_CAPABILITY:
        return Choice("torch", f"compute capability {capability} is below {MIN_CAPABILITY}")
    return Choice("triton", f"CUDA device of compute capability {capability}")
