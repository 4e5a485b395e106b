"""``python -m pullback.lab.cli``."""

from pullback.lab.cli import main

if __name__ == "__main__":
    main()
