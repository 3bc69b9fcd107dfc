"""`python -m flashsale_consumer`."""

import signal
import sys

# The kernel drops a signal of process 1, as which a container runs this, unless it has a handler.
# Without this one, a pod that is deleted while it imports the rest would be killed much later.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

from flashsale_consumer.app import main  # noqa: E402

sys.exit(main())
