"""Extraction through the miniature of SAM 3's tower, in real processes that are killed for real."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from picture_folder import write_images
from PIL import Image
from towers import build_stock_backbone, normalize
from worker_thread import one_process

from sam3cache.backbone import BACKBONES
from sam3cache.backbone.hub import find_weights
from sam3cache.extract import ExtractConfig, extract
from sam3cache.features import open_store

DEVICES = ("cpu", "cpu")
ASIDE_EXIT_CODE = 3  # Most pictures are missing.


def command(pictures: Path, store: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "sam3cache", "extract", str(pictures), "-o", str(store)),
        *("--backbone", "sam3-mini", "--levels", "fpn_72", "--devices", "cpu:2"),
    ]


def files_of(store: Path) -> dict[str, bytes]:
    """Contents by path of what must be bit-identical."""
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for part in ("levels", "labels")
        for path in (store / part).rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="session")
def undisturbed(pictures, tmp_path_factory):
    store = tmp_path_factory.mktemp("undisturbed") / "x.zarr"
    config = ExtractConfig(
        pictures, store, levels=("fpn_72",), backbone="sam3-mini", devices=DEVICES
    )
    with one_process():
        assert extract(config).sealed
    return store


def finished(store: Path) -> dict[str, int]:
    """Shards of finished blocks with their times of change."""
    found = {}
    for receipt in (store / "receipts").glob("levels.fpn_72/*.json"):
        for key, *_ in json.loads(receipt.read_bytes())["shards"]:
            found[key] = (store / key).stat().st_mtime_ns
    return found


def wait_for(condition, timeout_s=150.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_stored_features_are_those_of_sam3s_own_forward_image(pictures, undisturbed):
    spec = BACKBONES["sam3-mini"]
    stock = build_stock_backbone(spec)
    weights = find_weights(spec, None)
    state = {name: weights.read(name) for name in weights.names()}
    # The class token's position, which the tower neither reads nor keeps.
    state["trunk.pos_embed"] = torch.cat(
        [torch.zeros(1, 1, spec.embed_dim), state["trunk.pos_embed"]], dim=1
    )
    missing, unexpected = stock.vision_backbone.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all("freqs_cis" in name or name.startswith("convs.3.") for name in missing)
    store = open_store(undisturbed)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # As many as each of two workers has.
    try:
        for sample in (store.samples[0], store.samples[4], store.samples[-1]):
            picture = Image.open(pictures / sample.source)
            scale = 1008 / max(picture.size)
            content = torch.from_numpy(np.array(picture))[None]
            height_px, width_px = round(picture.height * scale), round(picture.width * scale)
            resized = torch.nn.functional.interpolate(
                content[None], (height_px, width_px), mode="bilinear", antialias=True
            )
            square = torch.zeros(1, 1, 1008, 1008, dtype=torch.uint8)
            square[..., :height_px, :width_px] = resized
            with torch.no_grad():
                expected = stock.forward_image(normalize(square).expand(-1, 3, -1, -1))
            stored = torch.from_numpy(store.read("fpn_72", sample.row))
            assert torch.equal(stored, expected["backbone_fpn"][-1][0].half())
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.long
def test_killed_and_run_again_it_is_as_if_undisturbed(pictures, undisturbed, tmp_path):
    store = tmp_path / "x.zarr"
    first = subprocess.Popen(
        command(pictures, store), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: finished(store))
    family = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    # Workers end by themselves when their parent is gone.
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    done = finished(store)
    assert len(done) == 1, "the kill came too late to be a test"
    assert not (store / "complete.json").exists()

    again = subprocess.run(command(pictures, store), capture_output=True, text=True, timeout=120)
    assert again.returncode == ASIDE_EXIT_CODE, again.stderr
    assert {key: (store / key).stat().st_mtime_ns for key in done} == done
    assert files_of(store) == files_of(undisturbed)
    assert open_store(store).sample_rows == open_store(undisturbed).sample_rows
    assert list(store.rglob("*.partial")) == []


def test_a_killed_worker_is_replaced_and_nothing_is_lost(undisturbed, tmp_path):
    folder = write_images(tmp_path / "first", num_images=4)
    killed = []

    def kill_one(progress):
        if progress.workers and not killed:
            children = psutil.Process(os.getpid()).children()
            victim = next(child for child in children if "spawn_main" in " ".join(child.cmdline()))
            victim.kill()
            killed.append(victim.pid)

    result = extract(
        ExtractConfig(
            folder, tmp_path / "x.zarr", levels=("fpn_72",), backbone="sam3-mini", devices=DEVICES
        ),
        kill_one,
    )
    assert killed
    assert result.sealed
    store, reference = open_store(tmp_path / "x.zarr"), open_store(undisturbed)
    for row in range(4):
        assert np.array_equal(store.read("fpn_72", row), reference.read("fpn_72", row))


def test_a_level_added_later_leaves_the_others_as_they_are(pictures, undisturbed, tmp_path):
    store = tmp_path / "x.zarr"
    shutil.copytree(undisturbed, store)
    before = files_of(store)
    times = {name: (store / name).stat().st_mtime_ns for name in before if "/c/" in name}
    receipts = dict(open_store(store).receipts)
    config = ExtractConfig(pictures, store, levels=("image_1008",), backbone="sam3-mini")
    with one_process():
        assert extract(config).sealed
    after = files_of(store)
    assert {name: after[name] for name in before} == before
    # Only the new level was written: shards of the old one, and of masks, were not even touched.
    assert {name: (store / name).stat().st_mtime_ns for name in times} == times
    added = open_store(store)
    new_items = {"levels.image_1008"}
    assert {key for key in added.receipts if key not in receipts} == {
        (item, block) for item in new_items for block in (0, 1)
    }
    old_items = {"levels.fpn_72", "labels.mask"}
    assert {k: r for k, r in added.receipts.items() if k[0] in old_items} == {
        k: r for k, r in receipts.items() if k[0] in old_items
    }
    assert added.samples == open_store(undisturbed).samples
    assert list(added.levels) == ["fpn_72", "image_1008"]
    picture = added.read("image_1008", 0)
    assert picture.shape == (1, 1008, 1008)
    assert not picture[:, 756:].any(), "the padding below a 4:3 picture"


def test_features_of_two_kinds_are_never_mixed(pictures, undisturbed, tmp_path, invoke):
    store = tmp_path / "x.zarr"
    shutil.copytree(undisturbed, store)
    run = invoke(
        *("extract", pictures, "-o", store, "--backbone", "sam3-mini", "--levels", "fpn_72"),
        *("--devices", "cpu", "--resize", "squash", "--numeric-path", "bf16"),
    )
    assert run.exit_code == 1
    assert run.stderr.count("\n") == 1 + run.stderr.count("Checking")
    assert "numeric_path: fp32 → bf16; preprocessing.resize_mode: letterbox → squash" in run.stderr
    assert "repeat the command with --numeric-path fp32 --resize letterbox, or" in run.stderr
    assert open_store(store).sealed
