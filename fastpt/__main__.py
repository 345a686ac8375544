"""`python -m fastpt` is the `fastpt` command."""

from fastpt.cli import main

main()
