"""`python -m flashsale_consumer`."""

import sys

from flashsale_consumer.app import main

sys.exit(main())
