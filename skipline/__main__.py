"""`python -m skipline` is the command `skipline`."""

from skipline.cli import main

if __name__ == "__main__":
    main()
