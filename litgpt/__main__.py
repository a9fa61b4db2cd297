"""The entry point of `litgpt` and `python -m litgpt`."""

import os
import sys

from litgpt import cli


def main() -> None:
    """Run the command line of this process and exit with its code."""
    try:
        code = cli.main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


if __name__ == "__main__":
    main()
