"""`python -m flashsale_operator`."""

import sys

from flashsale_operator.app import main

sys.exit(main())
