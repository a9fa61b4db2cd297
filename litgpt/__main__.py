"""`litgpt` and `python -m litgpt`."""

import sys

from litgpt import cli


def main() -> None:
    """Run the command line of this process and leave with its exit code."""
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
