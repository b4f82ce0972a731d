"""What the masks of a label set are of: classes by name, and by the numbers that files have.

--classes lad,lcx,rca                       planes of yes and no, one a class
--classes lad=1,lcx=2,rca=16                class numbers in one file
--classes lad=6,lad=7,rca=1,background=*    several numbers of one class, and all others none
--classes classes.json                      the same as a table: {"6": "lad", "7": "lad"}
--classes annotations/train.json            the categories of a COCO file
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import ConfigError, ImageError
from sam3cache.images.coco import category_names
from sam3cache.images.picture import require_regular
from sam3cache.records import IGNORE_LABEL
from sam3cache.tasks import Task

BACKGROUND, IGNORE, ANY_OTHER = "background", "ignore", "*"
"""Two names that are no classes, and what stands for every number that is not named."""

MAX_CLASSES = IGNORE_LABEL - 1

_EXAMPLE = "such as lad,lcx,rca or lad=1,lcx=2,rca=3 or classes.json (docs/labels.md)"


@dataclass(frozen=True)
class ClassTable:
    """Names of classes, and what each number of a file becomes.

    Attributes:
        names: of the classes; the first is plane 0, or number 1 in the store.
        numbers: by number in the file, number in the store: 0 for background, 1 to C for the
            classes, 255 for what does not count. None: files hold foreground, a plane a class.
        other: what every number that is not in ``numbers`` becomes; None: it is a mistake.
        is_of_coco: whether the numbers are a COCO file's, and the names its categories'.
    """

    names: tuple[str, ...]
    numbers: Mapping[int, int] | None = field(default=None)
    other: int | None = None
    is_of_coco: bool = False

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ConfigError: when there are none, too many, or one twice.
        """
        named = ",".join(self.names)
        if not 1 <= len(self.names) <= MAX_CLASSES or not all(self.names):
            raise ConfigError(f"classes {named or '(none)'}: expected 1 to {MAX_CLASSES} names")
        if len(set(self.names)) != len(self.names):
            raise ConfigError(f"classes {named}: one is named twice; give each a name of its own")

    @property
    def task(self) -> Task:
        """How a label set of these classes is stored; of one class, as a binary mask."""
        return "multilabel" if self.numbers is None or len(self.names) == 1 else "multiclass"

    @property
    def identity(self) -> list[Any]:
        """All that masks read with the table depend on, as JSON can say it."""
        numbers = None if self.numbers is None else sorted(self.numbers.items())
        return [list(self.names), numbers, self.other]

    def renumber(self, mask_HW: NDArray[Any]) -> tuple[NDArray[np.uint8], int | None]:
        """Return what a file's numbers become, uint8 (H, W), and one that the table lacks."""
        assert self.numbers is not None
        found = np.unique(mask_HW)
        becomes = [self.numbers.get(number, self.other) for number in found.tolist()]
        unknown = [int(found[i]) for i, number in enumerate(becomes) if number is None]
        stored = np.array([number or 0 for number in becomes], np.uint8)
        # Faster than the inverse that unique gives, which sorts every pixel.
        return stored[np.searchsorted(found, mask_HW)], unknown[0] if unknown else None

    def contradicts(self, class_names: Mapping[int, str]) -> int | None:
        """Return a number that a file, by its names, has for something else; None without one.

        A number may be named anew by hand, but not if its file knows that name for another one.
        """
        assert self.numbers is not None
        for number, name in class_names.items():
            stored = self.numbers.get(number, self.other)
            own = self.names[stored - 1] if stored and stored != IGNORE_LABEL else None
            if name != own and (name in self.names or (self.is_of_coco and own is not None)):
                return number
        return None


FOREGROUND = ClassTable(("foreground",))
"""One class: whatever a mask marks."""


def parse_classes(text: str) -> ClassTable:
    """Read classes as the command line names them.

    Args:
        text: names, ``NAME=NUMBER`` or the path of a ``.json`` or ``.toml`` file with numbers and
            names, either of which may come first; ``*`` is every other number. "background" and
            "ignore" are no classes. 0 is background and 255 is ignored, unless they are named.

    Raises:
        ConfigError: saying what cannot be understood.
    """
    if text.lower().endswith((".json", ".toml")):
        table, is_of_coco = _read_table(Path(text))
        return replace(_table(table, text), is_of_coco=is_of_coco)
    parts = [part.strip() for part in text.split(",")]
    if not any("=" in part for part in parts):
        return ClassTable(tuple(parts))
    pairs = []
    for part in parts:
        name, is_pair, number = part.rpartition("=")
        if not is_pair:
            raise ConfigError(
                f"classes {text}: {part!r} has no number, others have; give all of them one, as "
                f"{part or 'NAME'}=3, or none"
            )
        pairs.append((number.strip(), name.strip()))
    return _table(pairs, text)


def _read_table(path: Path) -> tuple[list[tuple[str, Any]], bool]:
    """Return the pairs of a file in its order, and whether they are a COCO file's categories."""
    try:
        require_regular(path, f"classes {path}")
        text = path.read_text(encoding="utf-8-sig")
        table = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except ImageError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(
            f"classes {path}: {error.strerror or 'cannot be read'}; check its path"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        raise ConfigError(f"classes {path}: not {path.suffix[1:].upper()} ({reason})") from None
    if not isinstance(table, dict):
        raise ConfigError(f'classes {path}: expected numbers with their names, {{"1": "lad", …}}')
    if "categories" in table:
        try:
            names = category_names(table["categories"])
        except ValueError as error:
            raise ConfigError(f"classes {path}: {error}; export the COCO file again") from None
        return [(str(number), name) for number, name in names.items()], True
    pairs: list[tuple[str, Any]] = []
    for key, value in table.items():
        numbers = value if isinstance(value, list) else [value]
        if value == ANY_OTHER or (numbers and all(type(number) is int for number in numbers)):
            pairs += [(str(number), key) for number in numbers]
        else:
            pairs.append((key, value))
    return pairs, False


def _table(pairs: Iterable[tuple[str, Any]], where: str) -> ClassTable:
    names: dict[str, int] = {}
    given: dict[int | None, int] = {}
    for text, name in pairs:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"classes {where}: {text} has the name {name!r}; expected a text")
        try:
            number = None if text == ANY_OTHER else int(text)
        except ValueError:
            raise ConfigError(
                f"classes {where}: {name}={text}: expected a whole number, or * for all others; "
                f"write classes {_EXAMPLE}"
            ) from None
        if number in given:
            raise ConfigError(f"classes {where}: number {text} is named twice; name it once")
        if name.lower() in (BACKGROUND, IGNORE):
            given[number] = 0 if name.lower() == BACKGROUND else IGNORE_LABEL
        else:
            given[number] = names.setdefault(name, len(names) + 1)
    other = given.pop(None, None)
    numbers = {0: 0, IGNORE_LABEL: IGNORE_LABEL} | {n: c for n, c in given.items() if n is not None}
    if numbers[0] not in (0, IGNORE_LABEL):
        raise ConfigError(
            f"classes {where}: number 0 is {list(names)[numbers[0] - 1]!r}; expected background, "
            "as 0 is where there is nothing; check that the table begins at the files' first class"
        )
    return ClassTable(tuple(names), numbers, other)
