"""The API with a script call for each request, to see what batching is worth."""

import sys
from functools import partial

from flashsale_api.__main__ import main
from flashsale_api.batcher import MAX_CALLS, Batching

if __name__ == "__main__":
    # As many calls at once as all items together may have.
    sys.exit(main(partial(Batching, batch_limit=1, calls_in_flight=MAX_CALLS)))
