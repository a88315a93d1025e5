"""The error a person sees: one sentence that names the thing and the fix."""


class UserError(ValueError):
    """Bad input. The command line prints the message alone and exits with status 1."""
