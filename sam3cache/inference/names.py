"""Names of files for samples: readable, never the same twice, never outside their folder."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

from sam3cache.images.pseudonyms import pseudonym
from sam3cache.records import Sample
from sam3cache.runtime import is_device_name

MAX_PART_CHARS = 100
"""Longest name of a file or folder: what systems allow ends at 255 bytes, of up to 4 a letter."""

_KEPT = "-_.#@+=~ "
_HASH_CHARS = 8
_FILE_SUFFIXES = (".png", ".npy")


def output_names(samples: Sequence[Sample]) -> list[str]:
    """Return a relative path without suffix for each sample, with forward slashes.

    An id is kept as it is where every system can have it as a name; its slashes make folders. What
    cannot stand in a name becomes ``_``. Where two samples would then have one name, on a system
    that does not tell capitals from small letters too, each gets eight digits of a hash behind.
    """
    names = ["/".join(_parts(sample.id)) for sample in samples]
    counts = Counter(map(_folded, names))
    if len(counts) < len(names):
        names = [
            f"{name}-{_hash(sample)}" if counts[_folded(name)] > 1 else name
            for name, sample in zip(names, samples, strict=True)
        ]
    taken: set[str] = set()
    for place, name in enumerate(names):
        number = 2
        while _folded(names[place]) in taken:
            names[place] = f"{name}-{number}"
            number += 1
        taken.add(_folded(names[place]))
    return names


def folder_names(classes: Sequence[str]) -> list[str]:
    """Return a folder's name for each class, no two the same."""
    taken: set[str] = set()
    names = []
    for name in classes:
        base = chosen = _part(name.replace("/", "_"), is_folder=True)
        number = 2
        while _folded(chosen) in taken:
            chosen = f"{base}-{number}"
            number += 1
        taken.add(_folded(chosen))
        names.append(chosen)
    return names


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _hash(sample: Sample) -> str:
    # The id and the picture's name alone would be the same for two folders of like content. A path
    # that is kept out of names must not be guessed from a hash without a key either.
    is_apart = sample.image_location is not None
    place = sample.source if is_apart else sample.image_path.absolute().as_posix()
    text = f"{sample.id}\n{place}\n{sample.frame}"
    return pseudonym(text, _HASH_CHARS)


def _parts(id_: str) -> list[str]:
    parts = [part for part in id_.replace("\\", "/").split("/") if part.strip(". ")]
    folders = [_part(part, is_folder=True) for part in parts[:-1]]
    return [*folders, _part(parts[-1] if parts else "_")]


def _part(text: str, *, is_folder: bool = False) -> str:
    """Return one part of a path as every system can have it."""
    text = unicodedata.normalize("NFC", text)
    text = "".join(c if c.isalnum() or c in _KEPT else "_" for c in text)
    # Windows drops dots and spaces at the end; a dot at the beginning hides a file.
    text = text.strip(" .") or "_"
    if len(text) > MAX_PART_CHARS:
        digest = pseudonym(text, _HASH_CHARS)
        text = f"{text[: MAX_PART_CHARS - _HASH_CHARS - 1]}-{digest}"
    if is_device_name(text):
        text = f"_{text}"
    # A folder called like a file of another sample would be in its way.
    if is_folder and text.casefold().endswith(_FILE_SUFFIXES):
        text += "_"
    return text
