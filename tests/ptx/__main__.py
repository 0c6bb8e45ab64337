"""`python -m tests.ptx`: see `suite`."""

import sys

from tests.ptx.suite import main

sys.exit(main())
