"""The console script, and `python -m pipeline`: signals are heeded before the command line is even imported."""

import sys


def main() -> None:
    if sys.argv[1:2] in (["run"], ["retry"], ["merge"]):
        from pipeline.stop import leave_at_once

        leave_at_once()
    from pipeline import cli

    cli.main()


if __name__ == "__main__":
    main()
