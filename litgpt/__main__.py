"""`litgpt` and `python -m litgpt`."""

import os
import sys

from litgpt import cli


def main() -> None:
    """Run the command line of this process and leave with its exit code."""
    try:
        code = cli.main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


if __name__ == "__main__":
    main()
