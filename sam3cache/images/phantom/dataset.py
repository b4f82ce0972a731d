"""A folder of synthetic angiograms: pictures, masks, branch labels and a manifest."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sam3cache.errors import ConfigError
from sam3cache.images.phantom import attenuation, detector
from sam3cache.images.phantom.anatomy import BRANCHES, Patient, Side, grow_patient
from sam3cache.images.phantom.projection import View

COLUMNS = (
    "id", "image", "mask", "branches", "primary_angle", "secondary_angle", "split", "group", "side",
    "sod_mm", "sid_mm", "pixel_mm", "synthetic",
)  # fmt: skip

# (primary, secondary) degrees: the views in common use for each coronary system.
STANDARD_VIEWS: dict[Side, tuple[tuple[float, float], ...]] = {
    "left": ((-30, -25), (-10, 35), (0, -30), (45, 25), (45, -30), (-30, 30)),
    "right": ((45, 0), (35, 20), (-30, 0), (0, 25)),
}
VIEW_JITTER_DEG = 5.0
MIN_SIZE_PX = 64


@dataclass(frozen=True, slots=True)
class Phantom:
    """One rendered view; arrays are (H, W).

    Attributes:
        image: grey values.
        branches: a branch's place in ``anatomy.BRANCHES`` plus one, 0 where there is no vessel.
        is_open: False behind the collimator.
    """

    image: NDArray[np.uint8]
    branches: NDArray[np.uint8]
    is_open: NDArray[np.bool_]


def make_phantoms(
    out: Path,
    num_images: int,
    seed: int,
    *,
    size_px: int = 512,
    views_per_patient: int = 4,
    report: Callable[[int, int], None] | None = None,
) -> Path:
    """Write synthetic angiograms with masks, branch labels and a manifest.

    An image depends on the seed, its patient and its view alone, and so does its row: a smaller
    set is the beginning of a larger one.

    Args:
        out: folder to create, or an empty one. Gets images/, masks/ (0 and 255), branches/ (labels
            named in classes.json) and, last, manifest.csv.
        num_images: how many.
        seed: not negative.
        size_px: rows and columns of each.
        views_per_patient: consecutive images of one patient, alternating left and right system.
        report: called with (images done, images in all) after each.

    Returns:
        Path of the manifest.

    Raises:
        ConfigError: a count, size or seed is out of range, or ``out`` is in use or not writable.
    """
    for name, value, least in (
        ("number of images", num_images, 1),
        ("seed", seed, 0),
        ("size", size_px, MIN_SIZE_PX),
        ("number of views per patient", views_per_patient, 1),
    ):
        if value < least:
            raise ConfigError(f"the {name} is {value}; give at least {least}")
    try:
        _make_folders(out)
        rows = []
        for row, phantom in _render_all(num_images, seed, size_px, views_per_patient):
            Image.fromarray(phantom.image).save(out / row["image"])
            mask = np.where(phantom.branches > 0, 255, 0).astype(np.uint8)
            Image.fromarray(mask).save(out / row["mask"])
            Image.fromarray(phantom.branches).save(out / row["branches"])
            rows.append(row)
            if report is not None:
                report(len(rows), num_images)
        classes = {"0": "background"} | {str(i + 1): name for i, name in enumerate(BRANCHES)}
        _write(out / "classes.json", json.dumps(classes, indent=2) + "\n")
        manifest = out / "manifest.csv"
        with manifest.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            f"cannot write to {out}: {reason}; name a folder with room that you may write to"
        ) from error
    return manifest


def render(patient: Patient, side: Side, view: View, rng: np.random.Generator) -> Phantom:
    """One exposure of a patient's left or right coronary system."""
    is_open = detector.draw_collimator(view.size_px, rng)
    contrast_per_mm = rng.uniform(0.14, 0.28)
    contrast_mm, branches = attenuation.contrast(patient.trees[side], view)
    total = attenuation.background(patient, view)
    total += detector.draw_texture(view.size_px, rng)
    total += attenuation.catheter(patient, side, view)
    total += contrast_per_mm * contrast_mm
    return Phantom(detector.expose(total, is_open, rng), np.where(is_open, branches, 0), is_open)


def draw_view(standard: tuple[float, float], size_px: int, rng: np.random.Generator) -> View:
    """A standard view as an operator finds it; rounded to what a manifest states."""
    primary, secondary = np.asarray(standard) + rng.normal(0.0, VIEW_JITTER_DEG, 2)
    pixel_mm = rng.uniform(0.30, 0.38) * detector.DESIGN_SIZE_PX / size_px
    return View(
        primary_angle_deg=round(float(primary), 1),
        secondary_angle_deg=round(float(secondary), 1),
        sod_mm=round(rng.uniform(720.0, 810.0), 1),
        sid_mm=round(rng.uniform(950.0, 1200.0), 1),
        pixel_mm=round(pixel_mm, 4),
        size_px=size_px,
    )


def split_of(patient: int, seed: int) -> str:
    """Split of a patient by number: about five in seven train, one val, one test.

    The first three go one to each split, so that any set of three patients or more has all; from
    the eighth on, each seven are shuffled. The patients that follow change nothing.
    """
    first = ("train", "val", "test", "train", "train", "train", "train")
    block, place = divmod(patient, 7)
    if block == 0:
        return first[place]
    return first[_generator(seed, 2, block).permutation(7)[place]]


def _render_all(
    num_images: int, seed: int, size_px: int, views_per_patient: int
) -> Iterator[tuple[dict[str, str], Phantom]]:
    """Manifest rows and phantoms, a patient after the other."""
    for index in range(num_images):
        number, turn = divmod(index, views_per_patient)
        if turn == 0:
            draw = _generator(seed, 0, number)
            order: dict[Side, NDArray[np.int64]] = {
                side: draw.permutation(len(views)) for side, views in STANDARD_VIEWS.items()
            }
            patient = grow_patient(draw)
        side: Side = "left" if (number + turn) % 2 == 0 else "right"
        views = STANDARD_VIEWS[side]
        draw = _generator(seed, 1, number, turn)
        view = draw_view(views[order[side][turn // 2 % len(views)]], size_px, draw)
        group = f"p{number:04d}"
        name = f"{group}_v{turn}"
        row = {
            "id": name,
            "image": f"images/{name}.png",
            "mask": f"masks/{name}.png",
            "branches": f"branches/{name}.png",
            "primary_angle": str(view.primary_angle_deg),
            "secondary_angle": str(view.secondary_angle_deg),
            "split": split_of(number, seed),
            "group": group,
            "side": side,
            "sod_mm": str(view.sod_mm),
            "sid_mm": str(view.sid_mm),
            "pixel_mm": str(view.pixel_mm),
            # Goes along into every store and report, where it says that no patient was measured.
            "synthetic": "yes",
        }
        yield row, render(patient, side, view, draw)


def _generator(seed: int, *key: int) -> np.random.Generator:
    """Independent streams; the first number of the key is the purpose."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _make_folders(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder; name one that does not exist yet")
    for name in ("images", "masks", "branches"):
        (out / name).mkdir(parents=True)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
