"""The error of everything in dev."""


class StackError(Exception):
    """Something could not be started or built. The message has the reason and the remedy."""
