"""The command line: one group, whose commands are imported only when they run.

``--help`` must answer at once, so a group lists its commands from a table, as ``COMMANDS``, and
imports ``sam3cache.commands.<name>`` when that command is called. Deliberate failures, all of them
``Sam3CacheError``, become one line on stderr and the error's own exit code.
"""

from __future__ import annotations

import errno
import importlib
import io
import keyword
import sys
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

import click

from sam3cache import __version__
from sam3cache.errors import Sam3CacheError
from sam3cache.runtime import spare_memory

COMMANDS = {
    "check": "Find mistakes in images, masks, angles and splits beforehand.",
    "extract": "Run SAM 3 over images and store its features.",
    "plan": "Say what an extraction would write and how long it would take.",
    "train": "Train a head on stored features.",
    "eval": "Measure a trained head on stored features.",
    "predict": "Predict masks of new images with a trained head.",
    "compare": "Say which of some runs is better, image by image, and how sure.",
    "demo": "Walk the whole road on artificial angiograms, in three minutes.",
    "phantom": "Draw artificial angiograms with exact masks, to try everything out.",
    "store": "Look after a store: verify, info, labels, subset, merge, export.",
    "doctor": "Check this machine: versions, devices, memory, disk, and the tower.",
}
"""By name, the one line that ``sam3cache --help`` shows."""

# What a user's path can do to us at any time; anything else from the system is a bug of ours.
_PATH_ADVICE = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "your quota is used up: free some space, or write to another disk",
    errno.EIO: "the disk fails: look after it, or write to another",
    errno.EROFS: "write to a path that is not mounted read-only",
    errno.EACCES: "check the permissions of the path, or choose another",
    errno.EPERM: "check the permissions of the path, or choose another",
    errno.EEXIST: "something else is there: choose another path",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and short texts without importing them.

    Args:
        texts: by command, the one line that ``--help`` shows.
        package: whose module ``<name>`` holds the click command ``<name>``, each with an underscore
            behind where Python has that name for itself.
    """

    def __init__(
        self,
        *args: Any,
        texts: Mapping[str, str] = COMMANDS,
        package: str = __name__,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._texts, self._package = texts, package

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; a console that lacks a character shows ``?`` instead of failing."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        spare_memory()
        return super().main(*args, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands, in the order of the road rather than of the alphabet."""
        return list(self._texts)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command's module and return its command, or None for an unknown name."""
        if cmd_name not in self._texts:
            return None
        name = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        module = importlib.import_module(f"{self._package}.{name}")
        # ``eval`` would hide Python's own, so that module calls its command ``eval_``.
        command = getattr(module, f"{cmd_name}_", None) or getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self._texts.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, turning every deliberate failure into one line and an exit code."""
        if ctx.parent is not None:
            return super().invoke(ctx)  # A group within the group, which sees to it.
        try:
            return super().invoke(ctx)
        except Sam3CacheError as error:
            fail(ctx, str(error), error.exit_code)
        except OSError as error:
            if error.errno not in _PATH_ADVICE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            fail(ctx, f"{where}{error.strerror}; {_PATH_ADVICE[error.errno]}", exit_code=1)
        except KeyboardInterrupt:
            fail(ctx, "interrupted", exit_code=130)


def fail(ctx: click.Context, message: str, exit_code: int) -> NoReturn:
    """End the program with one line; called while the failure is being handled."""
    if ctx.params["debug"]:
        traceback.print_exc()
    line = " ".join(part.strip() for part in message.splitlines())
    click.echo(f"sam3cache: error: {line}", err=True)
    raise click.exceptions.Exit(exit_code) from None


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="sam3cache", message="%(prog)s %(version)s")
@click.option(
    "--debug",
    is_flag=True,
    envvar="SAM3CACHE_DEBUG",
    help="Show the traceback of a failure, too (also SAM3CACHE_DEBUG=1).",
)
def main(debug: bool) -> None:
    """Run SAM 3 once over your images; train heads on the cached features.

    \b
    To see it at work, without data, weights or GPU:
      sam3cache demo

    \b
    The same road, step by step:
      sam3cache phantom phantoms
      sam3cache extract phantoms --backbone sam3-mini
      sam3cache train --epochs 10 --batch-size 4
      sam3cache eval

    Every command explains itself: sam3cache COMMAND --help.
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
