"""A folder of small pictures with masks and a manifest, for tests that extract."""

from pathlib import Path

import numpy as np
from PIL import Image

NUM_IMAGES = 18  # Two blocks, the last of two images.


def write_images(folder: Path, num_images: int = NUM_IMAGES, seed: int = 0) -> Path:
    """Write grey PNGs of several shapes with masks on other grids, and a manifest with angles."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    lines = ["id,image,mask,primary_angle,secondary_angle,split,group"]
    for i in range(num_images):
        height_px, width_px = ((96, 128), (128, 96), (112, 112))[i % 3]
        coarse = rng.integers(0, 255, (height_px // 16, width_px // 16), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width_px, height_px), Image.Resampling.BICUBIC)
        picture.save(folder / "images" / f"{i:02}.png")
        mask = np.zeros((height_px // 2, width_px // 2), np.uint8)
        mask[4 : 20 + i % 7, 6:30] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{i:02}.png")
        split = ("train", "train", "val", "test")[i % 4]
        lines.append(
            f"s{i:02},images/{i:02}.png,masks/{i:02}.png,{i - 17},{17 - i},{split},p{i % 4}"
        )
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
