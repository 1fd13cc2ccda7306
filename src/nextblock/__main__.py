"""`python -m nextblock`."""

from nextblock.cli.main import main

if __name__ == "__main__":
    main()
