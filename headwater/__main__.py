"""`python -m headwater` is the `headwater` command."""

from headwater.command.cli import main

main()
