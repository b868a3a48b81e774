"""`python -m ppllava` is the command `ppllava`, but for Ctrl-C while the package is imported: that is Python's own."""

from .cli import main

if __name__ == "__main__":
    main()
