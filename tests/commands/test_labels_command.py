"""`sam3cache store labels` and `annotations`, and training on labels kept beside a store."""

import csv
import ctypes
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from store_builder import build_store

from sam3cache.features import open_store
from sam3cache.heads.checkpoint import read_record

TRAIN = ("--head", "linear", "--epochs", "1", "--loss-size", "32", "--device", "cpu")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_store(
        tmp_path_factory.mktemp("built") / "x.zarr",
        num_samples=12,
        level_shapes={"fpn_72": (8, 12, 12)},
    )


@pytest.fixture
def here(built, tmp_path, monkeypatch):
    """A folder with a store and the masks of another reader, in which commands run."""
    shutil.copytree(built, tmp_path / "x.zarr")
    (tmp_path / "reader2").mkdir()
    lines = ["id,mask"]
    for i in range(12):
        mask = np.zeros((96, 96), np.uint8)
        mask[: 10 + i] = 255
        Image.fromarray(mask).save(tmp_path / f"reader2/{i}.png")
        lines.append(f"s{i},reader2/{i}.png")
    (tmp_path / "reader2.csv").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_set_is_set_listed_and_removed(here, invoke):
    done = invoke("store", "labels", "set", "x.zarr", "reader2", "--from", "reader2.csv")
    assert done.exit_code == 0, done.output
    assert "label set reader2 holds masks of 12 of 12 samples" in done.stdout
    assert "Next: sam3cache train x.zarr --label-set reader2" in done.stdout
    listed = invoke("store", "labels", "list", "x.zarr")
    assert listed.stdout.splitlines()[1].startswith("reader2: foreground; 12 samples with a mask,")
    entries = json.loads(invoke("store", "labels", "list", "x.zarr", "--json").stdout)
    assert [(e["name"], e["num_without_mask"]) for e in entries] == [("mask", 1), ("reader2", 0)]
    assert invoke("store", "labels", "remove", "x.zarr", "reader2").exit_code == 0
    assert list(open_store(here / "x.zarr").label_sets) == ["mask"]


def test_rows_of_no_sample_are_named(here, invoke):
    with (here / "reader2.csv").open("a", encoding="utf-8") as file:
        file.writelines(f"\nstranger{i},reader2/0.png" for i in range(4))
    done = invoke("store", "labels", "set", "x.zarr", "reader2", "--from", "reader2.csv")
    assert (
        "Of no sample of the store: 4 rows of reader2.csv (stranger0, stranger1, stranger2, …)."
    ) in done.stdout


def test_bad_masks_are_listed_and_say_so_by_the_exit_code(here, invoke):
    (here / "reader2/4.png").write_bytes(b"")
    done = invoke("store", "labels", "set", "x.zarr", "r", "--from", "reader2.csv", "--json")
    assert done.exit_code == 3
    assert done.stderr.count("set aside: s4 (reader2/4.png): ") == 1
    assert json.loads(done.stdout)["num_with_mask"] == 11


@pytest.mark.parametrize(
    ("line", "exit_code", "reason"),
    [
        ("labels set x.zarr a/b --from reader2.csv", 2, "label set 'a/b': expected letters"),
        (
            "labels set x.zarr r --from reader2.csv --classes a,b",
            1,
            "1 planes of 96 x 96; expected 2",
        ),
        ("labels set x.zarr r --from reader2.csv --classes a=1,b", 2, "'b' has no number"),
        ("labels set x.zarr r --from reader2.csv --classes no.json", 2, "no.json: No such file"),
        ("labels set x.zarr mask --from reader2.csv --classes a,b", 2, "choose another name"),
        ("labels set x.zarr r --from reader2.csv --masks b", 1, "no column 'b' with masks"),
        ("labels set x.zarr r --from reader2.csv --masks ,", 2, "--masks ',' names nothing"),
        ("labels show x.zarr r", 2, "has no label set r"),
        ("labels set x.zarr r --from no.csv", 2, "no.csv: no such file or folder"),
        ("labels set no.zarr r --from reader2.csv", 1, "no.zarr does not exist"),
        ("labels set x.zarr r --from reader2.csv --overlay reader2", 1, "is there and no overlay"),
        ("labels remove x.zarr r", 2, "has no label set r; it has mask"),
        ("labels list x.zarr --overlay x.zarr", 1, "a feature store of its own, not an overlay"),
        ("annotations set x.zarr --from reader2.csv", 1, "has no annotations"),
        ("annotations remove x.zarr phase", 2, "has no column 'phase'; it has vessel"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(here, invoke, line, exit_code, reason):
    before = (here / "x.zarr/complete.json").read_bytes()
    result = invoke("store", *line.split())
    assert result.exit_code == exit_code, result.output
    (error,) = result.stderr.splitlines()
    assert reason in error
    assert (here / "x.zarr/complete.json").read_bytes() == before


def test_annotations_shown_and_edited_can_be_set(here, invoke):
    shown = invoke("store", "annotations", "show", "x.zarr").stdout
    rows = list(csv.DictReader(io.StringIO(shown)))
    assert rows[0] == {
        **{"id": "s0", "split": "train", "group": "g0", "primary_angle": "-60.0"},
        **{"secondary_angle": "-30.0", "vessel": "RCA"},
    }
    (here / "a.csv").write_text(shown, encoding="utf-8")
    same = invoke("store", "annotations", "set", "x.zarr", "--from", "a.csv")
    assert "12 of 12 samples are in a.csv; changed: nothing." in same.stdout
    (here / "a.csv").write_text(shown.replace("s0,train", "s0,val"), encoding="utf-8")
    done = invoke("store", "annotations", "set", "x.zarr", "--from", "a.csv")
    assert done.exit_code == 0
    assert "changed: split of 1." in done.stdout
    assert "warning: 1 samples were in the training split and are no longer" in done.stderr
    assert "warning: group g4 is in more than one split" in done.stderr
    counts = json.loads(invoke("store", "annotations", "list", "x.zarr", "--json").stdout)
    assert counts["split"]["counts"] == {"test": 4, "train": 3, "val": 5}
    assert counts["primary_angle"] == {"num_known": 11}
    assert "group: 12 known, 6 different" in invoke("store", "annotations", "list", "x.zarr").stdout
    assert invoke("store", "annotations", "remove", "x.zarr", "vessel").exit_code == 0
    assert "vessel" not in invoke("store", "annotations", "show", "x.zarr").stdout


def test_a_row_that_cannot_be_used_says_so_by_the_exit_code(here, invoke):
    (here / "a.csv").write_text("id,primary_angle\ns0,999\ns1,5\n", encoding="utf-8")
    done = invoke("store", "annotations", "set", "x.zarr", "--from", "a.csv", "--json")
    assert done.exit_code == 3
    assert "set aside: s0 ()" in done.stderr
    assert json.loads(done.stdout)["num_changed"] == {"primary_angle": 1}


def everything(root):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (root, *root.rglob("*"))
    }


@pytest.mark.skipif(sys.platform != "linux", reason="drops a capability of Linux's")
def test_a_read_only_store_trains_and_evaluates_with_what_lies_beside_it(here):
    store = here / "x.zarr"
    (here / "splits.csv").write_text("id,split\ns2,train\n", encoding="utf-8")
    for path in (*store.rglob("*"), store):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = everything(store)

    def drop_the_right_to_override_permissions():
        # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: without it root, too, is bound by a folder's mode.
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)

    labels = ("store", "labels", "set", "x.zarr", "mask", "--from", "reader2.csv")
    beside = ("--overlay", "beside")
    commands = [
        labels,
        (*labels, *beside),
        ("store", "annotations", "set", "x.zarr", "--from", "splits.csv", *beside),
        ("train", "x.zarr", "--name", "run", *TRAIN, *beside),
        ("eval", "x.zarr", "checkpoints/run", "--device", "cpu", "--no-page", *beside),
    ]
    # One process for all of them: most of a command's time is its imports.
    program = (
        "import json, sys; from click.testing import CliRunner;"
        "from sam3cache.commands import main;"
        "runs = [CliRunner().invoke(main, line) for line in json.loads(sys.argv[1])];"
        "print(json.dumps([(run.exit_code, run.stderr) for run in runs]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(commands)],
        cwd=here,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=drop_the_right_to_override_permissions,
    )
    refused, *others = json.loads(done.stdout)
    assert refused[0] == 1
    assert "x.zarr cannot be written (Permission denied); keep labels" in refused[1]
    assert [exit_code for exit_code, _ in others] == [0, 0, 0, 0], others
    assert everything(store) == before
    opened = open_store(store, overlay=here / "beside")
    assert opened.samples[2].split == "train"
    info = read_record(here / "checkpoints/run/best")
    assert info.settings["num_train"] == 5
    assert info.settings["overlay"] == "beside"
    assert info.data["overlay_seal"] == opened.overlay.seal
    assert info.data["seal"] == opened.seal
    for path in (store, *store.rglob("*")):
        os.chmod(path, 0o755)  # noqa: PTH101 - so that the folder can be deleted


def test_an_evaluation_says_what_was_corrected_since_the_training(here, invoke):
    def notices(*words):
        done = invoke(
            *("eval", "x.zarr", "checkpoints/run", "--device", "cpu", "--no-page"), *words
        )
        assert done.exit_code == 0, done.output
        summary = json.loads((here / "checkpoints/run/eval-test/summary.json").read_text("utf-8"))
        return [line for line in summary["notices"] if "was trained with other" in line]

    assert invoke("train", "x.zarr", "--name", "run", *TRAIN).exit_code == 0
    assert notices() == []
    invoke("store", "labels", "set", "x.zarr", "reader2", "--from", "reader2.csv")
    assert notices() == []  # Another set beside it is no change.
    (line,) = notices("--label-set", "reader2")
    assert "other masks (label set reader2, trained on mask) of these pictures" in line
    (here / "a.csv").write_text("id,group,primary_angle\ns0,g9,1\n", encoding="utf-8")
    invoke("store", "annotations", "set", "x.zarr", "--from", "a.csv")
    invoke("store", "labels", "set", "x.zarr", "mask", "--from", "reader2.csv")
    (line,) = notices()
    assert line.startswith(
        "The head was trained with other masks (label set mask), groups, angles of these pictures"
    )
