"""What goes wrong in the stack."""


class StackError(Exception):
    """A server could not be had; the message says why and what to do."""
