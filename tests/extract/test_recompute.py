"""Samples computed again through the miniature of SAM 3's tower, as they were and otherwise."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from picture_folder import write_images
from PIL import Image
from worker_thread import one_process

from sam3cache.errors import ConfigError
from sam3cache.extract import ExtractConfig, extract
from sam3cache.extract.recompute import RecomputeConfig, recompute
from sam3cache.features import open_store, seal_store, store_lock, write_level_block
from sam3cache.features.receipts import break_seal

LEVELS = ("fpn_72", "fpn_72.int8", "fpn_72.bf16", "image_1008")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_images(folder / "pictures", 3)
    config = ExtractConfig(
        folder / "pictures", folder / "x.zarr", levels=LEVELS, backbone="sam3-mini"
    )
    with one_process():
        extract(config)
    return folder


def config(folder: Path, **changes: object) -> RecomputeConfig:
    # The folder's CSV: what is beside it is found by the same relative paths.
    base = RecomputeConfig(folder / "x.zarr", folder / "pictures" / "manifest.csv", num_samples=2)
    return replace(base, **changes)


def test_the_same_images_and_weights_give_the_same_features(made):
    seen = []
    result = recompute(config(made), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert not result.has_drift
    assert result.changed_images == ()
    assert result.fingerprint_changes == {}
    assert result.environment_changes == ()
    for sample in result.samples:
        assert [level.level for level in sample.levels] == list(LEVELS)
        assert all(level.holds for level in sample.levels)
        assert sample.levels[3].equal
        assert min(level.cosine for level in sample.levels) > 0.9999
    # Fewer bits explain more than float16 does.
    tolerances = [level.tolerance for level in result.samples[0].levels]
    assert tolerances[0] == 2**-11 < tolerances[1] < 0.05
    assert tolerances[3] == 0


def test_other_weights_are_told_field_by_field_and_by_their_values(made):
    result = recompute(config(made, weights="random", num_samples=1))
    assert result.has_drift
    (change,) = result.fingerprint_changes["fpn_72"]
    assert change.startswith("weights_sha256: ")
    assert " → random:" in change
    assert "image_1008" not in result.fingerprint_changes
    by_name = {level.level: level for level in result.samples[0].levels}
    assert by_name["image_1008"].equal
    for name in LEVELS[:3]:
        assert not by_name[name].holds
        assert by_name[name].relative_error > 0.1


def test_drift_under_one_fingerprint_is_found_and_versions_of_then_are_told(made, tmp_path):
    store = Path(shutil.copytree(made / "x.zarr", tmp_path / "x.zarr"))
    opened = open_store(store)
    values = {row: opened.read("fpn_72", row) for row in range(3)}
    # As another version of a library would: one part in fifty.
    values[1] = (values[1] * np.float16(1.02)).astype(np.float16)
    break_seal(store)
    spec, digest = opened.levels["fpn_72"], opened.fingerprint("fpn_72").digest
    write_level_block(store, spec, digest, 0, values)
    path = store / "zarr.json"
    content = json.loads(path.read_bytes())
    content["attributes"]["sam3cache"]["settings"]["environment"]["torch"] = "2.5.0"
    path.write_text(json.dumps(content), encoding="utf-8")
    with store_lock(store):
        seal_store(store)
    result = recompute(config(made, store=store, num_samples=3))
    held = {s.row: {level.level: level.holds for level in s.levels} for s in result.samples}
    assert [row for row in held if not held[row]["fpn_72"]] == [1]
    assert all(held[row]["fpn_72.int8"] for row in held)
    assert result.fingerprint_changes == {}
    assert result.has_drift
    (change,) = result.environment_changes
    assert change.startswith("torch: 2.5.0 → ")


def test_an_image_that_changed_or_is_gone_is_no_drift(made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    images, manifest = folder / "pictures" / "images", folder / "pictures" / "manifest.csv"
    Image.fromarray(np.zeros((96, 128), np.uint8)).save(images / "00.png")
    (images / "01.png").write_bytes(b"no picture")
    lines = manifest.read_text(encoding="utf-8").splitlines()
    manifest.write_text("\n".join(lines[:3]) + "\n", encoding="utf-8")
    result = recompute(config(folder, num_samples=3))
    assert [sample.image for sample in result.samples] == ["changed", "unreadable", "unreadable"]
    assert "pixels are not those" in result.samples[0].reason
    assert "01.png" in result.samples[1].reason
    assert "does not name it" in result.samples[2].reason
    assert all(sample.levels == () for sample in result.samples)
    assert not result.has_drift
    assert len(result.changed_images) == 3


def test_no_samples_are_refused(made):
    with pytest.raises(ConfigError, match="at least 1"):
        config(made, num_samples=0)
