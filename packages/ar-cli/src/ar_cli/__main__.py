"""`python -m ar_cli`."""

import sys

from ar_cli.entry import main

sys.exit(main())
