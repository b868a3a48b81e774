"""`python -m ppllava` is the command `ppllava`."""

from ppllava_command import main

if __name__ == "__main__":
    main()
