"""Small pictures to extract, where their content does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(
    folder: Path,
    num_images: int,
    *,
    seed: int = 0,
    splits: Sequence[str] = ("train",),
    shapes: Sequence[tuple[int, int]] = ((96, 128), (128, 96), (112, 112)),
) -> Path:
    """Write grey pictures with masks, and a manifest.

    Args:
        folder: where; made here.
        num_images: of them.
        seed: of the pictures.
        splits: of the pictures in turn.
        shapes: height and width in pixels, likewise.
    """
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    lines = ["id,image,mask,split,group"]
    for i in range(num_images):
        shape = shapes[i % len(shapes)]
        coarse = rng.integers(0, 255, (8, 8), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC)
        picture.save(folder / f"images/{i:04}.png")
        mask = np.zeros(shape, np.uint8)
        mask[4 : 20 + i % 50, 6:70] = 255
        Image.fromarray(mask).save(folder / f"masks/{i:04}.png")
        split = splits[i % len(splits)]
        lines.append(f"s{i:04},images/{i:04}.png,masks/{i:04}.png,{split},p{i % 4}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
