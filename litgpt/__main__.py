"""The entry point of `litgpt` and `python -m litgpt`."""

import os
import sys

from litgpt import cli
from litgpt.interrupts import EXIT_CODE, exit_now, ignore_signals, is_program


def main() -> None:
    """Run the command line of this process and exit with its code."""
    is_program.set()
    try:
        code = cli.main()
        ignore_signals()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.stderr.flush()
    if code == EXIT_CODE:  # at once: without waiting for threads, or for other processes
        exit_now()
    sys.exit(code)


if __name__ == "__main__":
    main()
