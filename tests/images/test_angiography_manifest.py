"""An angiography manifest as it really is: cines, frames, smaller masks, angles inside JSON."""

import csv
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from sam3cache.images import letterbox_image, probe, read_image, read_manifest, read_mask

REPOSITORY = Path(__file__).parents[2]
COLUMNS = REPOSITORY / "examples" / "angiography_columns.toml"
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
    ("Doe^Jane", "LAD", (4, 1016, 1016), 2, (17.3, -4.3), 6, "train"),
    ("Doe^Jane", "LAD", (4, 1016, 1016), 3, (17.3, -4.3), 7, "train"),
    ("Roe^Rita", "RCA", (3, 512, 512, 3), 0, (-30, 25), 1, "validation"),
    ("Poe^Paul", "LCX", (2, 512, 512), 1, (None, None), 11, "test"),
    ("Coe^Carl", "LCX", (2, 512, 512), 1, (400, 0), 11, "test"),
)


def write_data(root: Path) -> Path:
    """Write cines, masks, contours and a CSV as Excel under Windows saves it."""
    rng = np.random.default_rng(0)
    rows = []
    for patient, vessel, shape, frame, (primary, secondary), segment, split in PATIENTS:
        name = f"{patient[:3].lower()}_{vessel}"
        for folder in ("cines", "contours", "masks", "deepsa"):
            (root / folder).mkdir(exist_ok=True)
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


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return read_manifest(write_data(tmp_path_factory.mktemp("angiography")), COLUMNS)


def test_every_good_row_is_a_sample(manifest):
    assert [(s.id, s.frame, s.split) for s in manifest.samples] == [
        ("cines/doe_LAD#2", 2, "train"),
        ("cines/doe_LAD#3", 3, "train"),
        ("cines/roe_RCA#0", 0, "val"),
        ("cines/poe_LCX#1", 1, "test"),
    ]
    assert manifest.leaks == ()


def test_angles_come_out_of_the_contours(manifest):
    angles = [(s.primary_angle_deg, s.secondary_angle_deg) for s in manifest.samples]
    assert angles == [(17.3, -4.3), (17.3, -4.3), (-30, 25), (None, None)]


def test_an_impossible_angle_sets_its_sample_aside(manifest):
    (bad,) = manifest.set_aside
    assert bad.source == "cines/coe_LCX.npy"
    assert "primary angle 400 is outside [-180, 180]" in bad.reason


def test_frames_of_one_patient_are_one_group_under_a_pseudonym(manifest):
    groups = [s.group for s in manifest.samples]
    assert groups[0] == groups[1]
    assert len(set(groups)) == 3


def test_what_is_kept_beside_a_sample_names_no_patient(manifest):
    assert manifest.samples[0].extra == {
        "vessel_pattern": "right dominant",
        "phase": "diastole",
        "vessel_name": "LAD",
        "cass_segment": "6",
    }
    for s in manifest.samples:
        kept = [s.id, s.source, s.mask, s.group, *s.extra.values()]
        assert not any("^" in text or str(manifest.root) in text for text in kept)


def test_headers_frames_and_masks_are_as_written(manifest):
    sizes = [(1016, 1016, 1), (1016, 1016, 1), (512, 512, 3), (512, 512, 1)]
    for sample, size in zip(manifest.samples, sizes, strict=True):
        info = probe(sample)
        assert (info.height_px, info.width_px, info.num_channels) == size
        assert (info.mask_height_px, info.mask_width_px) == (512, 512)
        frame = np.load(sample.image_path)[sample.frame]
        assert np.array_equal(read_image(sample), frame.reshape(size))
        mask = read_mask(sample)
        assert mask.shape == (1, 512, 512)
        assert mask.sum() == 20 * 10 * int(sample.extra["cass_segment"])
        square, _ = letterbox_image(read_image(sample))
        assert square.shape == (size[2], 1008, 1008)


def test_the_worked_example_of_the_documentation_is_the_example_file():
    text = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL)]
    assert tomllib.loads(COLUMNS.read_text(encoding="utf-8")) in blocks
