"""`python -m headwater` is the `headwater` command."""

import sys

try:
    from headwater.command.cli import main

    main()
except KeyboardInterrupt:  # while it is imported
    sys.exit(130)
