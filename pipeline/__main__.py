"""`python -m pipeline` is the console script by another name."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
