"""The entry point of `flashsalectl`."""

import os
import signal


def main() -> None:
    """Runs the command line. Ctrl-C during the imports has no traceback either."""
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is not signal.SIG_IGN:  # a shell lets a background job ignore it
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from flashsale_operator.ctl import commands  # noqa: PLC0415 - it takes half a second

    signal.signal(signal.SIGINT, interrupt)
    commands.main()
