"""An angiography manifest as it really is: cines, frames, smaller masks, angles inside JSON."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from angiography import write_data

from sam3cache.images import letterbox_image, probe, read_image, read_manifest, read_mask

REPOSITORY = Path(__file__).parents[2]
COLUMNS = REPOSITORY / "examples" / "angiography_columns.toml"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return read_manifest(write_data(tmp_path_factory.mktemp("angiography")), COLUMNS)


def test_every_good_row_is_a_sample(manifest):
    assert [(s.id, s.frame, s.split) for s in manifest.samples] == [
        ("cines/p0317_LAD#2", 2, "train"),
        ("cines/p0317_LAD#3", 3, "train"),
        ("cines/p0318_RCA#0", 0, "val"),
        ("cines/p0319_LCX#1", 1, "test"),
    ]
    assert manifest.leaks == ()


def test_angles_come_out_of_the_contours(manifest):
    angles = [(s.primary_angle_deg, s.secondary_angle_deg) for s in manifest.samples]
    assert angles == [(17.3, -4.3), (17.3, -4.3), (-30, 25), (None, None)]


def test_an_impossible_angle_sets_its_sample_aside(manifest):
    (bad,) = manifest.set_aside
    assert bad.source == "cines/p0320_LCX.npy"
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
