"""An angiography group's own files: cines, frames, smaller masks, angles inside JSON, a CSV."""

import csv
import json
from pathlib import Path

import numpy as np

HEADER = [
    "patient_id",
    "vessel_pattern",
    "phase",
    "vessel_name",
    "cine_path",
    "frame_index",
    "contours_path",
    "vessel_mask_actual_path",
    "deepsa_pseudo_label_path",
    "cass_segment",
    "split",
]

PATIENTS = (
    # patient, vessel, cine's shape, frame, angles, segment, split
    ("P0317", "LAD", (4, 1016, 1016), 2, (17.3, -4.3), 6, "train"),
    ("P0317", "LAD", (4, 1016, 1016), 3, (17.3, -4.3), 7, "train"),
    ("P0318", "RCA", (3, 512, 512, 3), 0, (-30, 25), 1, "validation"),
    ("P0319", "LCX", (2, 512, 512), 1, (None, None), 11, "test"),
    ("P0320", "LCX", (2, 512, 512), 1, (400, 0), 11, "test"),
)


def write_data(root: Path) -> Path:
    """Write cines, masks, contours and a CSV as Excel under Windows saves it."""
    rng = np.random.default_rng(0)
    rows = []
    for patient, vessel, shape, frame, (primary, secondary), segment, split in PATIENTS:
        name = f"{patient.lower()}_{vessel}"
        for folder in ("cines", "contours", "masks", "deepsa"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        np.save(root / "cines" / f"{name}.npy", rng.integers(0, 256, shape, dtype=np.uint8))
        contours = {"view_angles": {"primary_angle": primary, "secondary_angle": secondary}}
        (root / "contours" / f"{name}.json").write_text(json.dumps(contours), encoding="utf-8")
        mask = np.zeros((512, 512), bool)
        mask[100 : 100 + 10 * segment, 40:60] = True
        np.save(root / "masks" / f"{name}_{frame}.npy", mask)
        np.save(root / "deepsa" / f"{name}_{frame}.npy", mask.astype(np.float32))
        rows.append(
            [
                patient,
                "right dominant",
                "diastole",
                vessel,
                f"cines\\{name}.npy",
                frame,
                f"contours\\{name}.json",
                str(root / "masks" / f"{name}_{frame}.npy"),
                f"deepsa\\{name}_{frame}.npy",
                segment,
                split,
            ]
        )
    with (root / "samples.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows, [""] * len(HEADER)])
    return root / "samples.csv"
