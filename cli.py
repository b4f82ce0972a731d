"""Run sam3cache from a checkout: ``python cli.py ...`` or ``torchrun cli.py ...``."""

from sam3cache.commands import main

if __name__ == "__main__":
    main(prog_name="sam3cache")
