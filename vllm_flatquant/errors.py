"""Errors of the vLLM plugin. Each message is one sentence that names the thing and the fix."""


class UnsupportedError(ValueError):
    """A model, option or device that FlatQuant cannot serve."""


class CheckpointError(ValueError):
    """A checkpoint whose tensors are missing, misshapen or not finite."""


def shown(value: object, limit: int = 80) -> str:
    """``value`` on one line and not too long: what a file says may hold anything, a message may not."""
    text = str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= limit else f"{text[:limit]}..."
