"""`python -m ppllava` is the command `ppllava`."""

from .cli import main

if __name__ == "__main__":
    main()
