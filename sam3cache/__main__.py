"""``python -m sam3cache``: the same as the console program."""

from sam3cache.commands import main

if __name__ == "__main__":
    main(prog_name="sam3cache")
