"""``sam3cache store verify``: its exit codes, what it says, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from picture_folder import write_images
from PIL import Image
from store_builder import build_store
from worker_thread import one_process

from sam3cache.commands.store.verify import EXIT_CODES, verify
from sam3cache.extract import ExtractConfig, extract

SHAPES = {"fpn_72": (4, 12, 12), "image_1008": (1, 48, 48)}
SHARD = "levels/fpn_72/c/1/0/0/0"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return build_store(
        tmp_path_factory.mktemp("sound") / "x.zarr", num_samples=20, level_shapes=SHAPES
    )


@pytest.fixture
def store(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "x.zarr"))


@pytest.fixture(scope="module")
def pictures_and_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extracted")
    write_images(folder / "pictures", 3)
    config = ExtractConfig(
        folder / "pictures", folder / "x.zarr", levels=("image_1008",), backbone="sam3-mini"
    )
    with one_process():
        extract(config)
    return folder


def test_help_tells_every_exit_code(invoke):
    text = invoke("store", "verify", "--help").output
    for code in EXIT_CODES.values():
        assert any(line.split()[:1] == [str(code)] for line in text.splitlines())
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)
    # Click, Python and shells give others already.
    assert {1, 2, 3, 4, 126, 127, 130}.isdisjoint(EXIT_CODES.values())
    assert len(verify.params) <= 15


def test_a_sound_store_is_said_to_be_one(invoke, sound):
    result = invoke("store", "verify", sound)
    assert result.exit_code == 0
    assert "sound and sealed; 20 samples" in result.stdout
    assert "6 of 6 shards read" in result.stdout


def test_damage_comes_a_line_each_with_what_to_do_next(invoke, store):
    (store / SHARD).unlink()
    (store / "samples.parquet").write_bytes(b"")
    result = invoke("store", "verify", store, "--sample", "5%")
    assert result.exit_code == 10
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["table", "samples.parquet"]
    assert lines[1].split()[:4] == ["missing", SHARD, "block", "1"]
    assert "(rows 16, 17, 18, 19)" in lines[1]
    assert "DAMAGED, 2 findings" in lines[2]
    assert f"{store.as_posix()} --repair" in lines[3]
    assert len(lines) == 4


def test_many_findings_are_capped_and_counted(invoke, tmp_path):
    store = build_store(
        tmp_path / "x.zarr", num_samples=400, level_shapes={"fpn_72": (1, 2, 2)}, mask_height_px=6
    )
    for path in (store / "levels/fpn_72").rglob("0"):
        if path.is_file():
            path.unlink()
    result = invoke("store", "verify", store)
    assert result.exit_code == 10
    lines = result.stdout.splitlines()
    assert sum(line.startswith("missing") for line in lines) == 20
    assert "… and 5 more (5 missing); --json lists all" in lines


def test_an_unfinished_store_and_strays_are_no_damage(invoke, tmp_path):
    store = build_store(tmp_path / "x.zarr", num_samples=20, level_shapes=SHAPES, seal=False)
    (store / "receipts/levels.fpn_72/00000001.json").unlink()
    result = invoke("store", "verify", store)
    assert result.exit_code == 11
    assert "extraction has not finished" in result.stdout
    assert f"note: named by nothing: {SHARD}; " in result.stdout


def test_repair_says_what_it_removed_or_mended(invoke, store):
    (store / "levels/zarr.json").unlink()
    result = invoke("store", "verify", store, "--repair")
    assert result.exit_code == 0
    assert "mended: levels/zarr.json" in result.stdout
    assert "mended: sound and sealed" in result.stdout
    (store / SHARD).write_bytes(b"")
    result = invoke("store", "verify", store, "--repair")
    assert result.exit_code == 13
    assert "removed: levels.fpn_72 of block 1" in result.stdout
    assert "it computes 1 block, and seals the store" in result.stdout
    assert invoke("store", "verify", store).exit_code == 11
    (store / "zarr.json").write_bytes(b"")
    result = invoke("store", "verify", store, "--repair")
    assert result.exit_code == 10
    assert "beyond repair: zarr.json" in result.stdout


def test_json_has_all_that_a_script_needs(invoke, store):
    (store / SHARD).unlink()
    result = invoke("store", "verify", store, "--repair", "--json")
    content = json.loads(result.stdout)
    assert (content["status"], content["exit_code"]) == ("repaired", result.exit_code)
    (finding,) = content["findings"]
    assert (finding["kind"], finding["path"], finding["block"]) == ("missing", SHARD, 1)
    assert finding["rows"] == [16, 17, 18, 19]
    assert content["repair"]["dropped"] == [["levels.fpn_72", 1]]
    assert content["recompute"] is None


def test_computing_again_finds_a_picture_that_changed(invoke, pictures_and_store, tmp_path):
    folder = Path(shutil.copytree(pictures_and_store, tmp_path / "copy"))
    options = ("store", "verify", folder / "x.zarr", "--recompute", "3", "--device", "cpu")
    result = invoke(*options, "--from", folder / "pictures")
    assert result.exit_code == 0
    assert result.stdout.count("equal     s0") == 3
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "pictures/images/01.png")
    result = invoke(*options, "--from", folder / "pictures", "--json")
    assert result.exit_code == 12
    computed = json.loads(result.stdout)["recompute"]
    assert [sample["image"] for sample in computed["samples"]] == ["same", "changed", "same"]
    assert not computed["has_drift"]
    (folder / "x.zarr/samples.parquet").unlink()
    result = invoke(*options, "--from", folder / "pictures")
    assert result.exit_code == 10
    assert "Nothing was computed again" in result.stdout


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (("--sample", "0%"), 2, "above 0% and at most 100%, such as 5%"),
        (("--sample", "101%"), 2, "--sample 101%"),
        (("--sample", "5"), 2, "expected a percentage"),
        (("--sample", "nan%"), 2, "expected a percentage"),
        (("--recompute", "3"), 2, "go together"),
        (("--from", "x.csv"), 2, "go together"),
        (("--recompute", "0", "--from", "x.csv"), 2, "at least 1"),
        (("--recompute", "3", "--from", "x.csv", "--repair"), 2, "give one"),
        (("--recompute", "1", "--from", "nowhere.csv"), 2, "nowhere.csv"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(invoke, sound, options, exit_code, message):
    result = invoke("store", "verify", sound, *options)
    assert result.exit_code == exit_code
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("sam3cache: error")]
    assert len(lines) == 1
    assert message in lines[0]


def test_what_is_no_store_is_refused(invoke, tmp_path):
    result = invoke("store", "verify", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "does not exist" in result.stderr
