"""An angiography manifest as it really is: cines, frames, smaller masks, angles inside JSON."""

import hashlib
import re
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from angiography import write_data
from worker_thread import one_process

from sam3cache.extract import ExtractConfig, extract
from sam3cache.extract.config import IMAGE_LEVEL
from sam3cache.images import letterbox_image, probe, read_image, read_manifest, read_mask

REPOSITORY = Path(__file__).parents[2]
COLUMNS = REPOSITORY / "examples" / "angiography_columns.toml"


def hashed(path):
    return hashlib.sha256(path.encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return read_manifest(write_data(tmp_path_factory.mktemp("angiography")), COLUMNS)


def test_every_good_row_is_a_sample(manifest):
    assert [(s.id, s.frame, s.split) for s in manifest.samples] == [
        (f"{hashed('cines/p0317_LAD.npy')}#2", 2, "train"),
        (f"{hashed('cines/p0317_LAD.npy')}#3", 3, "train"),
        (f"{hashed('cines/p0318_RCA.npy')}#0", 0, "val"),
        (f"{hashed('cines/p0319_LCX.npy')}#1", 1, "test"),
    ]
    assert manifest.leaks == ()


def test_angles_come_out_of_the_contours(manifest):
    angles = [(s.primary_angle_deg, s.secondary_angle_deg) for s in manifest.samples]
    assert angles == [(17.3, -4.3), (17.3, -4.3), (-30, 25), (None, None)]


def test_an_impossible_angle_sets_its_sample_aside(manifest):
    (bad,) = manifest.set_aside
    assert bad.source == hashed("cines/p0320_LCX.npy") + ".npy"
    assert bad.reason.startswith("line 6: primary angle 400 is outside [-180, 180]")


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
        assert not any("p03" in text.lower() or str(manifest.root) in text for text in kept)


def tell(store):
    """All that a store says: its tables row by row, and every other file's bytes as they are."""
    for path in store.rglob("*"):
        yield str(path.relative_to(store))
        if path.suffix == ".parquet":
            yield str(pq.read_table(path).to_pylist())
        elif path.is_file():
            yield path.read_bytes().decode("latin-1")


def test_a_store_names_no_patient_and_is_complete_at_once_when_run_again(tmp_path):
    csv = write_data(tmp_path / "angiography")
    (csv.parent / "cines" / "p0319_LCX.npy").unlink()
    mask = csv.parent / "masks" / "p0318_RCA_0.npy"
    mask.write_bytes(mask.read_bytes()[:-1])
    config = ExtractConfig(csv, tmp_path / "store.zarr", COLUMNS, levels=(IMAGE_LEVEL,))
    with one_process():
        first, again = (extract(config, lambda progress: None) for _ in range(2))
    assert (first.num_computed, again.num_computed, again.num_removed) == (2, 0, 0)
    lines = [aside.reason.partition(":")[0] for aside in again.set_aside]
    assert sorted(lines) == ["line 4", "line 5", "line 6"]
    for text in tell(config.output):
        assert "p03" not in text.lower()
        assert str(tmp_path) not in text


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
