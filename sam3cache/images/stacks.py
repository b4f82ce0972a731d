"""Containers of named arrays as tables: what HDF5 files and ``.npz`` archives have in common.

images (N, H, W)    masks (N, H, W)    angles (N, 2)    split (N,)      a row a picture
p1/image (H, W)     p1/mask (H, W)     p1/angles (2,)                   a row a group
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from sam3cache.errors import ImageError, ManifestError
from sam3cache.images.columns import ROW, hides_paths, read_names, read_setting
from sam3cache.images.hdf5 import Hdf5File
from sam3cache.images.npz import NpzFile
from sam3cache.images.picture import DECODER_ERRORS
from sam3cache.images.tables import Table, cell
from sam3cache.records import MEMBER_MARK

IMAGE_NAMES = ("images", "image")

# By field, the names that its array may have where a columns.toml says nothing.
_NAMES = {
    "image": IMAGE_NAMES,
    "mask": ("masks", "mask"),
    "frame": ("frame",),
    "primary_angle": ("primary_angle", "primary_angles"),
    "secondary_angle": ("secondary_angle", "secondary_angles"),
    "split": ("split", "splits"),
    "group": ("group", "groups"),
    "id": ("id", "ids"),
}
_ANGLES = ("angles", "view_angles")
_BOTH_ANGLES = ("primary", "secondary")
_PAIRS = tuple(f"{name}.{which}" for name in _ANGLES for which in _BOTH_ANGLES)
_COLUMN_ROWS = 4096


class _QuotingError(ManifestError):
    """Words that may quote a name inside the container.

    Attributes:
        plain: the same without any.
    """

    def __init__(self, path: Path, text: str, plain: str) -> None:
        super().__init__(f"{path}: {text}")
        self.plain = f"{path}: {plain}"


class Arrays(Protocol):
    """An open container."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of all arrays by their names."""

    def values(self, name: str, begin: int, end: int) -> Any:
        """Return some rows of an array; of one without axes, its value."""

    def attributes(self, name: str) -> Mapping[str, Any]:
        """Return the values beside a group of arrays."""


@contextmanager
def container_table(
    open_container: Callable[[Path], Hdf5File | NpzFile], path: Path, columns: Path | None
) -> Iterator[Table]:
    """Open a container as a table.

    Raises:
        ManifestError: when it is damaged, or has no images.
    """
    is_hidden = hides_paths(columns)
    try:
        with closing(open_container(path)) as arrays:
            yield stack_table(path, arrays, read_setting(columns, "image"), read_names(columns))
    except _QuotingError as error:
        if is_hidden:
            raise ManifestError(error.plain) from None
        raise
    except (ManifestError, ImageError, FileNotFoundError, PermissionError):
        raise
    except DECODER_ERRORS as error:
        reason = "" if is_hidden else f" ({' '.join(str(error).split())[:80]})"
        raise ManifestError(f"{path}: damaged{reason}; restore it") from None


def stack_table(
    path: Path, arrays: Arrays, image: str | None, settled: Collection[str] = ()
) -> Table:
    """Return a container's table.

    Args:
        path: the container.
        arrays: what it holds.
        image: name or pattern of the images, as ``*/image``; None: ``images`` or ``image``.
        settled: fields that somebody says by hand, so that no array need be them.

    Raises:
        ManifestError: when there are no such images, or what is named as a field cannot be it.
    """
    shapes = arrays.shapes()
    pattern = None if image is None else image.removeprefix("*/").strip("/")
    for name in IMAGE_NAMES if pattern is None else (pattern,):
        if len(shapes.get(name, ())) >= 2:
            return _stacked(path, arrays, shapes, name, settled)
    for name in IMAGE_NAMES if pattern is None else (pattern,):
        groups = [one.removesuffix(f"/{name}") for one in shapes if one.endswith(f"/{name}")]
        if groups:
            return _grouped(path, arrays, shapes, name, groups, settled)
    some = ", ".join(list(shapes)[:8]) or "nothing"
    wanted = "'images' or 'image'" if image is None else repr(image)
    advice = 'say which they are by image = "NAME" in a columns.toml'
    raise _QuotingError(
        path, f"no {wanted}; it has {some}; {advice}", f"no such images in it; {advice}"
    )


def _field_of(name: str, settled: Collection[str]) -> str:
    """Return the field that an array is by its name: "angles" of both, "" of none."""
    if name in _ANGLES:
        return "" if {"primary_angle", "secondary_angle"} <= set(settled) else "angles"
    fields = (field for field, names in _NAMES.items() if name in names)
    return next((field for field in fields if field not in settled), "")


def _misfit(
    path: Path, name: str, field: str, shape: tuple[int, ...], wanted: str, beside: str = ""
) -> ManifestError:
    is_not = f"has the shape {shape}; expected {wanted}"
    advice = "reshape it, or call it otherwise if it is something else"
    return _QuotingError(
        path, f"{name!r} {is_not}{beside}; {advice}", f"what is the {field} {is_not}; {advice}"
    )


def _stacked(
    path: Path,
    arrays: Arrays,
    shapes: Mapping[str, tuple[int, ...]],
    image: str,
    settled: Collection[str],
) -> Table:
    """A row a picture of a stack."""
    shape = shapes[image]
    is_still = len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3))
    num_rows = 1 if is_still else shape[0]
    beside = f", beside {image!r} of {shape}"
    pictures, columns, pairs = [], [], []
    values_shapes = ((num_rows,), (num_rows, 1), *([()] if num_rows == 1 else []))
    for name, other in shapes.items():
        field = "image" if name == image else _field_of(name, settled)
        is_value = field not in ("", "image", "mask", "angles")
        is_stack = (len(other) >= 3 and other[0] == num_rows) or (is_still and len(other) >= 2)
        if field == "angles":
            if other != (num_rows, 2) and not (num_rows == 1 and other == (2,)):
                raise _misfit(path, name, field, other, f"{(num_rows, 2)}", beside)
            pairs.append(name)
        elif is_stack and not is_value:
            pictures.append(name)
        elif field not in ("image", "mask") and other in values_shapes:
            columns.append(name)
        elif is_value:
            raise _misfit(path, name, field, other, f"{(num_rows,)}", beside)
        elif field == "mask":
            raise _misfit(path, name, field, other, "a mask a picture", beside)
    header = [*pictures, *columns, *(f"{name}.{which}" for name in pairs for which in _BOTH_ANGLES)]
    defaults = _defaults(header)
    has_frame = "frame" in defaults
    header += [ROW] if has_frame else ["frame", ROW]
    members = [f"{path.name}{MEMBER_MARK}{name}" for name in pictures]

    def rows() -> Iterator[tuple[int, list[str]]]:
        for begin in range(0, num_rows, _COLUMN_ROWS):
            end = min(num_rows, begin + _COLUMN_ROWS)
            texts = []
            for name in columns:
                values = arrays.values(name, begin, end)
                # Of a picture alone, and of a table with one column.
                values = [values] if shapes[name] == () else values
                values = [v[0] for v in values] if len(shapes[name]) == 2 else values
                texts.append([cell(v) for v in values])
            for name in pairs:
                values = arrays.values(name, begin, 2 if len(shapes[name]) == 1 else end)
                values = values.reshape(end - begin, 2)
                texts += [[cell(v) for v in values[:, which]] for which in range(2)]
            for offset in range(end - begin):
                index = begin + offset
                frame = [] if has_frame else ["" if is_still else str(index)]
                cells = [*members, *(text[offset] for text in texts)]
                yield index, [*cells, *frame, f"{members[0]}#{index}"]

    return Table(
        path,
        path.parent.absolute(),
        header,
        rows(),
        defaults=defaults,
        unkept=(*pictures, *_PAIRS, "frame", ROW),
    )


def _grouped(
    path: Path,
    arrays: Arrays,
    shapes: Mapping[str, tuple[int, ...]],
    image: str,
    groups: Sequence[str],
    settled: Collection[str],
) -> Table:
    """A row a group with an image in it."""
    of_group: dict[str, list[str]] = {group: [] for group in groups}
    for name in shapes:
        for depth in range(name.count("/"), 0, -1):
            group = name.rsplit("/", depth)[0]
            if group in of_group:
                of_group[group].append(name[len(group) + 1 :])
                break
    pictures: dict[str, None] = {}
    columns: dict[str, None] = {}
    for group, names in of_group.items():
        for name in names:
            shape = shapes[f"{group}/{name}"]
            if len(shape) >= 2:
                pictures[name] = None
            elif shape == (2,) and name in _ANGLES:
                columns |= {f"{name}.{which}": None for which in _BOTH_ANGLES}
            elif shape in ((), (1,)):
                columns[name] = None
            elif field := _field_of(name, settled):
                wanted = {"angles": "(2,)", "mask": "a picture", "image": "a picture"}
                expected = wanted.get(field, "one value")
                raise _misfit(path, f"{group}/{name}", field, shape, expected)
        columns |= dict.fromkeys(arrays.attributes(group))
    header = [*pictures, *(name for name in columns if name not in pictures), ROW]

    def rows() -> Iterator[tuple[int, list[str]]]:
        for number, group in enumerate(groups):
            own = set(of_group[group])
            cells = {name: cell(value) for name, value in arrays.attributes(group).items()}
            for name in own:
                full = f"{group}/{name}"
                if name in pictures:
                    cells[name] = f"{path.name}{MEMBER_MARK}{full}"
                elif shapes[full] == (2,) and name in _ANGLES:
                    values = arrays.values(full, 0, 2)
                    cells |= {
                        f"{name}.{which}": cell(value)
                        for which, value in zip(_BOTH_ANGLES, values, strict=True)
                    }
                elif name in columns:
                    values = arrays.values(full, 0, 1)
                    cells[name] = cell(values[0] if shapes[full] == (1,) else values)
            cells[ROW] = f"{path.name}{MEMBER_MARK}{group}"
            yield number, [cells.get(name, "") for name in header]

    return Table(
        path,
        path.parent.absolute(),
        header,
        rows(),
        unit="group",
        defaults=_defaults(header),
        unkept=(*pictures, *_PAIRS, ROW),
    )


def _defaults(header: Sequence[str]) -> dict[str, str]:
    """Return the column of each field that has one."""
    found = {}
    for field, names in _NAMES.items():
        pairs = [f"{name}.{field.removesuffix('_angle')}" for name in _ANGLES]
        for name in (*names, *(pairs if field.endswith("_angle") else ())):
            if name in header:
                found[field] = name
                break
    return found
