"""``sam3cache store subset``: some samples of a store as a new one."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from sam3cache.commands.printing import label_sets_of, names_of, print_copy
from sam3cache.commands.progress import Stages
from sam3cache.errors import ConfigError


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The new store."
)
@click.option("--split", help="Only these splits, as train,val.")
@click.option(
    "--ids", type=click.Path(path_type=Path), help="Only the samples of a file with an id a line."
)
@click.option(
    "--where",
    multiple=True,
    metavar="NAME=VALUE",
    help="Only samples with this value of group, source, an angle or a column of the manifest. "
    "Several values of one name are alternatives; several names must all fit.",
)
@click.option("--levels", help="Only these levels, as fpn_72,image_1008. [default: all]")
@click.option("--label-sets", help="Only these sets of masks, or 'none'. [default: all]")
@click.option(
    "--overlay",
    type=click.Path(path_type=Path),
    help="Labels and annotations kept beside the store; they are copied into the new one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def subset(
    store: Path,
    output: Path,
    split: str | None,
    ids: Path | None,
    where: tuple[str, ...],
    levels: str | None,
    label_sets: str | None,
    overlay: Path | None,
    as_json: bool,
) -> None:
    """Copy some samples of STORE into a new store, bit by bit.

    STORE is only read, and every checksum is verified on the way. Samples that were set aside have
    nothing to copy, and stay behind. Stop it at any time: the same command goes on where it was.

    \b
    Examples:
      sam3cache store subset features/angio.zarr -o features/small.zarr --split train,val
      sam3cache store subset features/angio.zarr -o features/rca.zarr --where vessel=RCA
      sam3cache store subset features/angio.zarr -o features/pilot.zarr --ids pilot.txt
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.features.copying import parse_where
    from sam3cache.features.copying import subset as run

    with ExitStack() as stack:
        stages = Stages(stack)

        def report(num_done: int, num_total: int) -> None:
            stages.show("Copying", num_done, num_total)

        result = run(
            store,
            output,
            splits=names_of("--split", split) or (),
            ids=None if ids is None else read_ids(ids),
            where=[parse_where(text) for text in where],
            levels=names_of("--levels", levels),
            label_sets=label_sets_of(label_sets),
            overlay=overlay,
            report=report,
        )
    print_copy(result, as_json)


def read_ids(path: Path) -> list[str]:
    """Read a file with an id a line; empty lines do not count.

    Raises:
        ConfigError: when it cannot be read, or holds no id.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(
            f"--ids {path}: {error.strerror}; give a text file with an id a line"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"--ids {path} is not text in UTF-8; write an id a line") from None
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise ConfigError(f"--ids {path} holds no id; write one a line")
    return ids
