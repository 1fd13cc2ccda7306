"""`python -m nextblock`."""

from nextblock.cli import main

if __name__ == "__main__":
    main()
