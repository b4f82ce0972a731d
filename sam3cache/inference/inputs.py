"""What a user names to be predicted, as samples: files, folders, patterns, manifests."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from sam3cache.errors import ConfigError, ImageError
from sam3cache.images import Manifest, read_manifest
from sam3cache.images.dicom import read_facts
from sam3cache.images.files import SUFFIXES, open_picture
from sam3cache.images.manifest import read_dicoms, without_odd_names
from sam3cache.images.readers import FOLDER, find_reader
from sam3cache.records import Sample, SetAside

MANIFEST_SUFFIXES = (".csv", ".tsv", ".txt")
_WILDCARDS = "*?["


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is to be predicted.

    Attributes:
        samples: in the order in which they were named. Ids may be there twice, of two manifests.
        set_aside: rows of manifests, and files, that cannot be used, each with its reason.
        notes: what is to be told of them, a sentence each.
        files: that were named, and the one that says what columns are.
    """

    samples: tuple[Sample, ...]
    set_aside: tuple[SetAside, ...] = ()
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def find_images(
    names: Sequence[str | Path],
    *,
    columns: Path | None = None,
    primary_angle_deg: float | None = None,
    secondary_angle_deg: float | None = None,
) -> Inputs:
    """Find the images that paths and patterns stand for.

    Args:
        names: pictures; folders of them, or with images/ in them; anything else that extraction
            reads: tables, containers, COCO files, DICOM files and folders of these; patterns with
            * ? [ for any of these, ** for folders of any depth. What is named twice is taken once.
            Of a cine that no manifest speaks of, every frame is taken; of a DICOM file, the frame
            that extraction takes.
        columns: a ``columns.toml`` for the manifests, and for DICOM files that are named.
        primary_angle_deg: of all images, before what a DICOM header says; None: as the manifest or
            header says, or unknown.
        secondary_angle_deg: likewise.

    Raises:
        ConfigError: a path is not there, a pattern matches nothing, or an angle is given for the
            images of a manifest that has its own.
        ManifestError: a manifest or folder as a whole cannot be used.
    """
    files: list[Path] = []
    dicoms: dict[Path, int] = {}
    manifests: list[Manifest] = []
    samples: list[Sample] = []
    set_aside: list[SetAside] = []
    given = {
        name: angle_deg
        for name, angle_deg in (
            ("primary_angle", primary_angle_deg),
            ("secondary_angle", secondary_angle_deg),
        )
        if angle_deg is not None
    }
    paths = [path for name in names for path in _matches(name)]
    readers = {path: _reader_of(path, columns) for path in dict.fromkeys(paths)}
    is_table = {path: _makes_table(path, reader) for path, reader in readers.items()}
    if columns is not None and not any(is_table.values()):
        raise ConfigError(f"--columns {columns}: no manifest is named whose columns it could say")
    num_empty = 0
    for number, path in enumerate(is_table, 1):
        if readers[path] == "dicom" and not path.is_dir():
            # A DICOM file's name may be a patient's, so its place among the named files is said.
            if _is_empty(path):
                num_empty += 1
                place, reason = f"file {number}", "a DICOM file without a picture; leave it out"
                set_aside.append(SetAside(place, place, reason))
            else:
                dicoms.setdefault(path.absolute(), number)
            continue
        if not is_table[path] and not path.is_dir():
            files.append(path)
            continue
        manifest = read_manifest(path, columns if is_table[path] else None)
        # What is given goes before what headers say, but not before what somebody wrote down.
        own = {*manifest.fields} - {*manifest.header_fields}
        if clash := [name for name in given if name in own]:
            raise ConfigError(
                f"--{clash[0].replace('_', '-')} is for images without angles, and {path} has "
                f"{clash[0].replace('_', ' ')}s of its own; leave it out"
            )
        manifests.append(manifest)
        samples += manifest.samples if is_table[path] else _with_frames(manifest.samples)
    if num_empty == len(is_table):
        raise ConfigError("no DICOM file that is named holds a picture; name one that does")
    if dicoms:
        numbered = [(number, path) for path, number in dicoms.items()]
        manifests.append(read_dicoms(numbered, columns))
        samples += manifests[-1].samples
    named, odd = without_odd_names(_of_files(files))
    samples += _with_frames(named)
    angles = {f"{name}_deg": angle_deg for name, angle_deg in given.items()}
    if angles:
        samples = [replace(sample, **angles) for sample in samples]  # type: ignore[arg-type]
    set_aside += [aside for manifest in manifests for aside in manifest.set_aside]
    notes = dict.fromkeys(note for manifest in manifests for note in manifest.notes_of_files)
    named_files = [path for path in (*readers, columns) if path is not None and path.is_file()]
    return Inputs(tuple(_each_once(samples)), (*set_aside, *odd), tuple(notes), tuple(named_files))


def _matches(name: str | Path) -> list[Path]:
    """Return the paths of a name: itself, or in order what its pattern matches."""
    path = Path(name)
    if path.exists():
        if not _is_there(path):
            raise ConfigError(f"{name}: is a pipe, device or socket; name a file")
        return [path]
    file, separator, _ = str(name).partition("::")
    if separator and Path(file).is_file():
        raise ConfigError(
            f"{name}: a part of a file cannot be named alone; name {file}, whose images are then "
            f"all taken, or a CSV with {name} in its column of images"
        )
    if not set(_WILDCARDS) & set(str(name)):
        raise ConfigError(f"{name}: no such file or folder; check the path")
    # Not every shell does this, and Windows' own never.
    found = sorted(map(Path, glob.glob(str(name), recursive=True)))  # noqa: PTH207
    # Beside pictures lie JSON files of any kind: one of COCO is named by itself.
    found = [p for p in found if p.suffix.lower() != ".json" and _is_there(p)]
    kept = [
        p for p in found if p.suffix.lower() in SUFFIXES or _makes_table(p, _reader_of(p, None))
    ]
    if not kept:
        raise ConfigError(
            f"{name}: the pattern matches no picture and no manifest; known are "
            f"{', '.join(sorted(SUFFIXES))}, {', '.join(MANIFEST_SUFFIXES)}, Parquet, "
            "HDF5, .npz and DICOM"
        )
    return kept


def _is_there(path: Path) -> bool:
    """Tell whether a path is a file or folder, and no pipe whose opening would wait for ever."""
    return path.is_file() or path.is_dir()


def _reader_of(path: Path, columns: Path | None) -> str:
    """Return the name of the reader that extraction would take."""
    return find_reader(path, columns if path.is_dir() else None)[1]


def _makes_table(path: Path, reader: str) -> bool:
    """Return whether a reader makes a table of a path, as extraction would have it."""
    if path.is_dir():
        return reader != FOLDER
    # To a reader all is a CSV that is nothing else, pictures too.
    return path.suffix.lower() in MANIFEST_SUFFIXES or reader != "csv"


def _is_empty(path: Path) -> bool:
    """Return whether a DICOM file has no picture, as reports have none."""
    try:
        return read_facts(path, "") is None
    except ImageError:
        return False  # Its own reader says what is wrong.


def _of_files(files: Sequence[Path]) -> list[Sample]:
    """Return a sample a file, called by its path below the folder that all of them share."""
    if not files:
        return []
    parents = [str(path.absolute().parent) for path in files]
    try:
        common: str | None = os.path.commonpath(parents)
    except ValueError:  # Drives of Windows have nothing in common.
        common = None
    samples = []
    for path in files:
        root = Path(common) if common is not None else path.absolute().parent
        source = path.absolute().relative_to(root)
        samples.append(Sample(source.with_suffix("").as_posix(), source.as_posix(), root))
    return samples


def _with_frames(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Put the frames of a cine in its place, each a sample."""
    for sample in samples:
        num_frames = None
        # A damaged file will be set aside, with its reason, when it is read.
        with (
            suppress(ImageError),
            open_picture(sample.image_path, sample.source, member=sample.image_member) as picture,
        ):
            num_frames = picture.num_frames
        if num_frames is None:
            yield sample
        for frame in range(num_frames or 0):
            yield replace(sample, id=f"{sample.id}#{frame}", frame=frame)


def _each_once(samples: Iterable[Sample]) -> list[Sample]:
    """Leave out what is there twice: the same picture by the same id."""
    seen: set[tuple[str, str, int | None]] = set()
    kept = []
    for sample in samples:
        key = (sample.id, str(sample.image_path.absolute()), sample.frame)
        if key not in seen:
            seen.add(key)
            kept.append(sample)
    return kept
