"""The one base of every error that a user can repair: the command line prints it as one line."""


class UserError(ValueError):
    """Something asked for cannot be done; the message names the argument, the range and the fix."""
