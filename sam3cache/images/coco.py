"""COCO: images with polygons or run lengths, as masks of class numbers or planes of categories.

The file is one text of JSON, which cannot be read by parts: its annotations are held in memory,
once a process, as they stand there. Masks are made when they are asked for.

Shape legend: H height, W width, K categories.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import ImageError, ManifestError, QuotingError
from sam3cache.images.paths import is_absolute
from sam3cache.images.picture import MAX_PIXELS, Picture
from sam3cache.images.tables import SPLIT_SYNONYMS, Table
from sam3cache.records import IGNORE_LABEL, MEMBER_MARK

MAX_OPEN = 4
"""COCO files that a process holds in memory."""

_NUM_TRIED = 16
"""Images of a file that are looked for, to find which folder they are in."""

_HEAD_BYTES = 1 << 16

_VAGUE = ("dev", "development")
"""Words that tell a split alone, but not beside others."""

_RLE_LETTERS = range(48, 112)
_RLE_MAX_LETTERS = 7
"""Of one number: five bits each."""


@dataclass(frozen=True)
class CocoFile:
    """What a COCO file says.

    Attributes:
        names: of the categories, by the number that stands for each in masks.
        numbers: of the categories, by their ids.
        images: by id as text.
        annotations: by the image's id, in the file's order.
        num_strays: annotations of an image that the file does not have.
    """

    names: Mapping[int, str]
    numbers: Mapping[int, int]
    images: Mapping[str, Mapping[str, Any]]
    annotations: Mapping[str, Sequence[Mapping[str, Any]]]
    num_strays: int = 0


def category_numbers(categories: Any) -> dict[int, int]:
    """Return what stands for each category in a mask, by its id: the id itself, if all fit.

    0 is background and 255 not counted, so where an id is outside 1 to 254 all are counted from 1
    in the order of their ids.

    Raises:
        ValueError: when these are no categories.
    """
    if not isinstance(categories, list):
        raise ValueError("no list of categories")
    ids: list[int] = [
        c["id"] for c in categories if isinstance(c, dict) and type(c.get("id")) is int
    ]
    if not ids or len(set(ids)) < len(categories):
        raise ValueError("categories without an id of their own")
    if not all(isinstance(c.get("name"), str) and c["name"] for c in categories):
        raise ValueError("categories without a name")
    if all(0 < number < IGNORE_LABEL for number in ids):
        return {number: number for number in ids}
    return {number: place for place, number in enumerate(sorted(ids), 1)}


def category_names(categories: Any) -> dict[int, str]:
    """Return the categories' names by their numbers in masks.

    Raises:
        ValueError: when these are no categories.
    """
    numbers = category_numbers(categories)
    return {numbers[c["id"]]: c["name"] for c in sorted(categories, key=lambda c: c["id"])}


_lock = threading.Lock()
_parsed: dict[tuple[str, int, int], CocoFile] = {}


def read_coco(path: Path) -> CocoFile:
    """Read a COCO file, or return what was read before while it is the same.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is no COCO file.
    """
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    with _lock:
        if key not in _parsed:
            while len(_parsed) >= MAX_OPEN:
                _parsed.pop(next(iter(_parsed)))
            _parsed[key] = _parse(path)
        return _parsed[key]


def _parse(path: Path) -> CocoFile:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise ValueError("no list of images")
    images: dict[str, Mapping[str, Any]] = {}
    for image in document["images"]:
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
            raise ValueError("images without a file_name")
        image_id = _id_text(image.get("id"))
        if _is_broken(image["file_name"]) or _is_broken(image_id):
            raise ValueError("an image whose file_name or id has half a character, a surrogate")
        images[image_id] = image
    if len(images) < len(document["images"]):
        raise ValueError("two images of one id")
    annotations: dict[str, list[Mapping[str, Any]]] = {}
    for annotation in document.get("annotations") or []:
        if not isinstance(annotation, dict):
            raise ValueError("annotations that are no objects")
        annotations.setdefault(_id_text(annotation.get("image_id")), []).append(annotation)
    categories = document.get("categories")
    numbers = category_numbers(categories)
    num_strays = sum(
        len(those) for image_id, those in annotations.items() if image_id not in images
    )
    return CocoFile(category_names(categories), numbers, images, annotations, num_strays)


def _id_text(value: Any) -> str:
    """Return an image's id as text: 1.0 is 1, as tables with gaps write numbers."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _is_broken(text: str) -> bool:
    """Tell whether a text cannot be written as UTF-8: JSON may hold half of a surrogate pair."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def open_coco_mask(
    path: Path, name: str, image_id: str, *, as_numbers: bool, as_planes: bool
) -> Picture:
    """Open what a COCO file marks in an image, as a picture of the image's size.

    Of annotations that overlap, the later lies on top in class numbers; in planes both are there.
    Crowds, and annotations with ``ignore``, are not counted where nothing else is marked.

    Args:
        path: the COCO file.
        name: what to call the mask in messages.
        image_id: as text.
        as_numbers: whether a still of class numbers is wanted; else one of foreground.
        as_planes: whether a cine of a plane a category's name is wanted: several may have one.

    Raises:
        ImageError: no such image, or annotations that cannot be understood.
    """
    try:
        coco = read_coco(path)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:80]
        raise ImageError(f"{name}: no COCO file ({reason}); export it again") from None
    image = coco.images.get(image_id)
    if image is None:
        raise QuotingError(
            f"{name}: no image of id {image_id}; mend the mask's name",
            f"{name}: no such image; mend the mask's name",
        )
    height_px, width_px = image.get("height"), image.get("width")
    if type(height_px) is not int or type(width_px) is not int or min(height_px, width_px) < 1:
        raise ImageError(f"{name}: image without a height and a width; add them")
    if height_px * width_px > MAX_PIXELS:
        raise ImageError(f"{name}: {height_px} x {width_px} pixels, more than {MAX_PIXELS:,}")
    annotations = coco.annotations.get(image_id, ())
    numbers_of: dict[str, set[int]] = {}
    for number, category in sorted(coco.names.items()):
        numbers_of.setdefault(category, set()).add(number)
    planes = list(numbers_of.values())

    def paint(wanted: Collection[int]) -> NDArray[np.uint8]:
        """Return class numbers, or 1, where one of these categories is marked, uint8 (H, W)."""
        mask_HW = np.zeros((height_px, width_px), np.uint8)
        ignored_HW = np.zeros((height_px, width_px), bool)
        for place, annotation in enumerate(annotations):
            where = f"{name}: annotation {annotation.get('id', place)}"
            category_id = annotation.get("category_id")
            number = coco.numbers.get(category_id) if isinstance(category_id, int) else None
            if number is None:
                raise ImageError(f"{where} is of no known category; add it to the categories")
            if number not in wanted:
                continue
            marked_HW = _rasterise(annotation.get("segmentation"), height_px, width_px, where)
            if annotation.get("iscrowd") or annotation.get("ignore"):
                ignored_HW |= marked_HW
            else:
                mask_HW[marked_HW] = number if as_numbers else 1
        mask_HW[ignored_HW & (mask_HW == 0)] = IGNORE_LABEL
        return mask_HW

    def read(index: int) -> NDArray[np.uint8]:
        return paint(planes[index] if as_planes else coco.names)[..., None]

    return Picture(
        height_px,
        width_px,
        1,
        len(planes) if as_planes else None,
        is_lossy=False,
        read=read,
        ignored=IGNORE_LABEL,
        plane_names=tuple(numbers_of) if as_planes else (),
        class_names=coco.names,
    )


def find_coco_files(folder: Path) -> list[Path]:
    """Return the COCO files of a folder, as ARCADE lays them out, in order.

    They are in ``annotations/``, beside ``images/``; or so in each of its folders, a split each; or
    in each of its folders among the images, as Roboflow has them. Other JSON files may be called
    so, too: theirs are folders of pictures with ``masks/``.
    """
    if (folder / "masks").is_dir():
        return []
    for pattern in ("annotations/*.json", "*/annotations/*.json", "*/_annotations.coco.json"):
        if files := sorted(path for path in folder.glob(pattern) if _looks_like_coco(path)):
            return files
    return []


def _looks_like_coco(path: Path) -> bool:
    try:
        if not path.is_file():
            return False  # A pipe would let us wait.
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    return any(key in head for key in (b'"images"', b'"annotations"', b'"categories"'))


@contextmanager
def coco_table(path: Path, columns: Path | None) -> Iterator[Table]:
    """Read a COCO file, or all of a folder, as a table of its images.

    Raises:
        ManifestError: no COCO file, categories that differ, images that are nowhere, or files of
            which some tell their split and others do not.
    """
    del columns
    is_folder = path.is_dir()
    files = find_coco_files(path) if is_folder else [path]
    read = {}
    for file in files:
        try:
            read[file] = read_coco(file)
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:80]
            raise ManifestError(f"{file}: no COCO file ({reason}); export it again") from None
        if read[file].names != read[files[0]].names:
            raise ManifestError(
                f"{file}: other categories than in {files[0]}; read each by a command of its own"
            )
    if not files:
        raise ManifestError(f"{path}: no annotations/*.json; name a COCO file")
    folders = {file: _images_folder(file, coco) for file, coco in read.items()}
    root = path.absolute()
    if not is_folder:
        # The nearest folder with both: names in a store tell no more of the path than they must.
        root = Path(os.path.commonpath([path.absolute().parent, folders[path]]))
    splits = {file: _split_of(file, path) for file in files} if is_folder else {}
    has_splits = len(set(splits.values())) > 1
    if has_splits and not all(splits.values()):
        unknown = [file.relative_to(path).as_posix() for file, split in splits.items() if not split]
        raise ManifestError(
            f"{path}: no split in the names of {', '.join(unknown[:4])}, while other files there "
            "have one; put train, val or test into the file's name, move it elsewhere, or read "
            "each file by a command of its own"
        )
    notes = [
        f"{file.name}: {coco.num_strays} annotations name an image_id that no image has; they are "
        "not drawn"
        for file, coco in read.items()
        if coco.num_strays
    ]
    if not is_folder and (told := _split_of(path, path.parent.parent)):
        notes.append(
            f"COCO: the file's name says {told!r}; alone it makes no split, so its images are "
            "split anew, by groups"
        )
    if len(files) > 1 and not has_splits:
        alike = next(iter(splits.values()))
        told = (
            f"all {len(files)} files are of the split {alike!r}"
            if alike
            else (f"none of the {len(files)} files has train, val or test in its name")
        )
        notes.append(f"COCO: {told}, so their images are split anew, by groups")

    def rows() -> Iterator[tuple[int, list[str]]]:
        number = 0
        for file, coco in read.items():
            mask = Path(os.path.relpath(file.absolute(), root)).as_posix()
            for image_id, image in coco.images.items():
                number += 1
                name = str(image["file_name"])
                if not is_absolute(name):
                    name = Path(os.path.relpath(folders[file] / name, root)).as_posix()
                cells = [name, f"{mask}{MEMBER_MARK}{image_id}"]
                yield number, [*cells, splits[file]] if has_splits else cells

    header = ("image", "mask", "split") if has_splits else ("image", "mask")
    yield Table(path, root, header, rows(), unit="image", notes=notes)


def _images_folder(file: Path, coco: CocoFile) -> Path:
    """Return the folder that a COCO file's images are in.

    Beside the file or its folder, in ``images/`` there, or, as COCO itself has it, in a folder that
    the file's name ends in: ``train2017/`` of ``annotations/instances_train2017.json``.

    Raises:
        ManifestError: when they are in none of these, or in several.
    """
    here = file.absolute().parent
    bases = [here / "images", here.parent / "images", here, here.parent]
    places = [*bases, *(base / word for base in bases for word in file.stem.split("_") if word)]
    names = [str(image["file_name"]) for image in list(coco.images.values())[:_NUM_TRIED]]
    if not names or all(map(is_absolute, names)):
        return here
    num_found = {place: sum((place / n).is_file() for n in names) for place in places}
    most = max(num_found.values())
    if not most:
        raise ManifestError(
            f"{file}: its image {names[0]!r} is not in {', '.join(map(str, bases))}; put the "
            "images there, or name the file's folder otherwise"
        )
    found = [place for place, number in num_found.items() if number == most]
    if len({place.resolve() for place in found}) > 1:
        raise ManifestError(
            f"{file}: its images, by their names, may be those in {found[0]} or in {found[1]}; "
            "move one of the two folders elsewhere"
        )
    return found[0]


def _split_of(file: Path, folder: Path) -> str:
    """Return the split that a word of a file's name, or of its folder's, tells; else none.

    As of ``instances_val2017.json``. A name that tells two splits tells none.
    """
    part = file.parent.parent if file.parent.name == "annotations" else file.parent
    for name in (file.stem, *([] if part == folder else [part.name])):
        words = re.findall(r"[a-z]+", name.lower())
        if len(words) > 1:
            words = [word for word in words if word not in _VAGUE]  # COCO's test-dev is a test.
        found = {SPLIT_SYNONYMS[word] for word in words if word in SPLIT_SYNONYMS}
        if found:
            return found.pop() if len(found) == 1 else ""
    return ""


def _rasterise(segmentation: Any, height_px: int, width_px: int, where: str) -> NDArray[np.bool_]:
    """Return the pixels of an annotation, bool (H, W)."""
    if isinstance(segmentation, list):
        from pycocotools import mask as coco_mask

        for polygon in segmentation:
            _require_polygon(polygon, height_px, width_px, where)
        polygons = [polygon for polygon in segmentation if polygon]
        runs = coco_mask.frPyObjects(polygons, height_px, width_px) if polygons else []
        all_counts = [_letters_to_counts(one["counts"].decode("ascii")) for one in runs]
    elif isinstance(segmentation, dict):
        if segmentation.get("size") != [height_px, width_px]:
            raise ImageError(
                f"{where}: run lengths of {segmentation.get('size')}; expected the image's "
                f"[{height_px}, {width_px}]"
            )
        counts = segmentation.get("counts")
        all_counts = [_letters_to_counts(counts) if isinstance(counts, str) else counts]
    else:
        raise ImageError(f"{where}: no segmentation; expected polygons or run lengths")
    marked_WH = np.zeros((width_px, height_px), bool)
    for counts in all_counts:
        if (
            not isinstance(counts, list)
            or not all(type(number) is int and number >= 0 for number in counts)
            or sum(counts) != height_px * width_px
        ):
            raise ImageError(f"{where}: run lengths that do not fill the image; export it again")
        # In turn background and foreground, column after column.
        marked_WH |= np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(marked_WH.shape)
    return marked_WH.T


def _letters_to_counts(letters: str) -> list[int] | None:
    """Decode run lengths as COCO writes them in letters, None of what it would not write.

    Five bits a letter, the lowest first, the sixth for more to come; from the third on, differences
    from the number before the last. pycocotools' own decoder reads beyond a text that is cut short,
    and leaves pixels as memory had them where runs are too few.
    """
    counts: list[int] = []
    number = shift = 0
    for letter in letters.encode("utf-8", "replace"):
        if letter not in _RLE_LETTERS or shift > 5 * _RLE_MAX_LETTERS:
            return None
        bits = letter - _RLE_LETTERS.start
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = shift = 0
    return None if shift else counts


def _require_polygon(polygon: Any, height_px: int, width_px: int, where: str) -> None:
    """Refuse what is no polygon near the image: its outline is followed pixel by pixel."""
    if not isinstance(polygon, list) or len(polygon) % 2 or 0 < len(polygon) < 6:
        raise ImageError(f"{where}: expected polygons [x, y, x, y, …] of at least three corners")
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in polygon):
        raise ImageError(f"{where}: a polygon with a coordinate that is no number")
    for values, side in ((polygon[::2], width_px), (polygon[1::2], height_px)):
        if values and not -side <= min(values) <= max(values) <= 2 * side:
            raise ImageError(
                f"{where}: a polygon far outside of the image of {height_px} x {width_px}; check "
                "that it belongs to this image"
            )
