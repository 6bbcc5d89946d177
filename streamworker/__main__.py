"""`python -m streamworker`: the command line, where the console script is not installed."""

from streamworker.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
