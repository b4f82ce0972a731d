"""``sam3cache phantom``, as a user meets it."""

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from sam3cache.images import read_manifest


def test_phantoms_are_drawn_and_their_manifest_is_read(
    invoke: Callable[..., Result], tmp_path: Path
):
    out = tmp_path / "phantoms"
    result = invoke("phantom", out, "--num", 3, "--size", 64, "--views-per-patient", 1, "--json")
    assert result.exit_code == 0
    made = json.loads(result.stdout)
    assert made == {"manifest": str(out / "manifest.csv"), "num_images": 3, "seed": 0}
    manifest = read_manifest(Path(made["manifest"]))
    assert not manifest.set_aside
    assert [sample.split for sample in manifest.samples] == ["train", "val", "test"]
    assert all(sample.mask for sample in manifest.samples)
    assert all(sample.primary_angle_deg is not None for sample in manifest.samples)
    assert {sample.group for sample in manifest.samples} == {"p0000", "p0001", "p0002"}
    assert {sample.extra["side"] for sample in manifest.samples} == {"left", "right"}


def test_a_folder_in_use_is_refused_in_one_line(invoke: Callable[..., Result], tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    result = invoke("phantom", tmp_path, "--num", 1)
    assert result.exit_code == 2
    error = result.stderr.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith(f"sam3cache: error: {tmp_path} is not an empty folder")
