"""Branch labels from phantoms to a head that was trained and measured on them, as users type it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from worker_thread import one_process

from sam3cache.commands import main
from sam3cache.features import open_store
from sam3cache.heads.checkpoint import read_record
from sam3cache.images.phantom.anatomy import BRANCHES


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with phantoms of three patients, and the store made from them."""
    from click.testing import CliRunner

    root, before = tmp_path_factory.mktemp("branches"), Path.cwd()
    os.chdir(root)
    try:
        for line in (
            "phantom phantoms --num 3 --views-per-patient 1 --size 96",
            "extract phantoms --backbone sam3-mini --devices cpu",
        ):
            with one_process():
                result = CliRunner().invoke(main, line.split())
            assert result.exit_code == 0, result.output
    finally:
        os.chdir(before)
    return root


def set_branches(invoke, classes, name="branches"):
    return invoke(
        *("store", "labels", "set", "features/phantoms.zarr", name, "--from", "phantoms"),
        *("--masks", "branches", "--classes", classes),
    )


def test_branches_of_phantoms_are_set_by_the_table_beside_them(place, invoke, monkeypatch):
    monkeypatch.chdir(place)
    done = set_branches(invoke, "phantoms/classes.json")
    assert done.exit_code == 0, done.output
    opened = open_store(Path("features/phantoms.zarr"))
    spec = opened.label_sets["branches"]
    assert (spec.task, spec.classes) == ("multiclass", BRANCHES)
    for sample in opened.samples:
        with Image.open(place / f"phantoms/branches/{sample.id}.png") as picture:
            assert np.array_equal(opened.read_mask(sample.row, "branches")[0], np.array(picture))
    listed = invoke("store", "labels", "list", "features/phantoms.zarr").stdout
    assert "branches: 1 LM, 2 LAD, 3 LCx, 4 D1" in listed
    told = invoke("store", "info", "features/phantoms.zarr").stdout
    assert "1 LM, 2 LAD, 3 LCx, 4 D1, … (19 in all)" in told
    shown = invoke("store", "labels", "show", "features/phantoms.zarr", "branches").stdout
    assert "No sample of train shows " in shown
    counts = json.loads(
        invoke("store", "labels", "show", "features/phantoms.zarr", "branches", "--json").stdout
    )
    assert [count["name"] for count in counts] == list(BRANCHES)
    (train,) = (s.row for s in opened.samples if s.split == "train")
    for number, count in enumerate(counts, 1):
        expected = int((opened.read_mask(train, "branches") == number).sum())
        assert count["num_pixels"]["train"] == expected
        assert count["num_samples"]["train"] == (expected > 0)
    assert invoke("store", "verify", "features/phantoms.zarr").exit_code == 0


def test_classes_that_no_mask_shows_are_told(place, invoke, monkeypatch):
    monkeypatch.chdir(place)
    done = set_branches(invoke, "LM=1,LAD=2,nowhere=77,side=*", "trunks")
    assert done.exit_code == 0, done.output
    assert "warning: no mask shows nowhere; check that --classes gives the numbers" in done.stderr
    assert invoke("store", "labels", "remove", "features/phantoms.zarr", "trunks").exit_code == 0


def test_a_head_is_trained_and_measured_on_branches(place, invoke, monkeypatch):
    monkeypatch.chdir(place)
    assert set_branches(invoke, "LM=1,LAD=2,LCx=3,RCA=14,side=*", "trunks").exit_code == 0
    trained = invoke(
        *("train", "features/phantoms.zarr", "--label-set", "trunks", "--name", "run"),
        *("--head", "linear", "--epochs", "1", "--loss-size", "72", "--device", "cpu"),
    )
    assert trained.exit_code == 0, trained.output
    # An image shows one of both coronary trees, and here a split is one image.
    assert "warning: no image of train shows " in trained.stderr
    assert " of 5 classes (" in trained.stderr
    assert "; no image of val shows " in trained.stderr
    assert "annotations split STORE --by class --label-set trunks` " in trained.stderr
    info = read_record(place / "checkpoints/run/best")
    names = ("LM", "LAD", "LCx", "RCA", "side")
    assert (info.task, info.classes, info.num_classes) == ("multiclass", names, 6)
    measured = invoke(
        *("eval", "features/phantoms.zarr", "checkpoints/run", "--device", "cpu", "--no-page")
    )
    assert measured.exit_code == 0, measured.output
    summary = json.loads((place / "checkpoints/run/eval-test/summary.json").read_text("utf-8"))
    assert tuple(summary["classes"]) == names
