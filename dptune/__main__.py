"""`python -m dptune` is the command `dptune`."""

from dptune.command import main

if __name__ == "__main__":
    main()
