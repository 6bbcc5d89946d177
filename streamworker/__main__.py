"""`python -m streamworker`."""

from streamworker.cli import main

main()
