"""Errors of the vLLM plugin. Each message is one sentence that names the thing and the fix."""


class UnsupportedError(ValueError):
    """A model, option or device that FlatQuant cannot serve."""


class CheckpointError(ValueError):
    """A checkpoint whose tensors are missing, misshapen or not finite."""
