"""Bad input, a line each: one clear line, an exit code that is not 0, and nothing lost."""

import ctypes
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from picture_folder import write_images
from PIL import Image
from store_builder import build_store
from worker_thread import one_process

from sam3cache.commands import main

HEADER = "id,image,mask,primary_angle,secondary_angle,split,group\n"
SMALL = {"fpn_72": (256, 8, 8)}


def call(*arguments, cwd):
    """Run the program inside this process, from a folder."""
    before = os.getcwd()  # noqa: PTH109
    os.chdir(cwd)
    try:
        return CliRunner().invoke(main, [str(word) for word in arguments])
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the cases below need."""
    root = tmp_path_factory.mktemp("bad")
    write_images(root / "good", num_images=4)
    (root / "empty.csv").write_text("", encoding="utf-8")
    (root / "header.csv").write_text(HEADER, encoding="utf-8")
    (root / "plain.csv").write_text("picture\na.png\n", encoding="utf-8")
    (root / "twice.csv").write_text("id,image\na,1.png\na,2.png\n", encoding="utf-8")
    (root / "odd-split.csv").write_text("image,split\na.png,trian\n", encoding="utf-8")
    (root / "columns.toml").write_text('image = "cine"\n', encoding="utf-8")
    (root / "broken.toml").write_text("image = \n", encoding="utf-8")
    (root / "void").mkdir()
    build_store(root / "good.zarr", num_samples=8, level_shapes=SMALL)
    build_store(root / "unsealed.zarr", num_samples=8, level_shapes=SMALL, seal=False)
    build_store(root / "train-only.zarr", num_samples=8, level_shapes=SMALL, splits=("train",))
    build_store(root / "images.zarr", num_samples=8, level_shapes={"image_1008": (1, 16, 16)})
    trained = call(
        *("train", "good.zarr", "--head", "linear", "--name", "run", "--epochs", "1"),
        *("--loss-size", "32", "--device", "cpu"),
        cwd=root,
    )
    assert trained.exit_code == 0, trained.output
    build_store(root / "other.zarr", num_samples=8, level_shapes=SMALL)
    change_fingerprint(root / "other.zarr")
    return root


def change_fingerprint(store):
    """Rebuild the store's description as if other weights had made it, and seal it anew."""
    from sam3cache.features import (
        Fingerprint,
        LevelSpec,
        describe_store,
        open_store,
        read_annotations,
        read_samples,
        seal_store,
        store_lock,
    )

    opened = open_store(store)
    fingerprint = Fingerprint({**opened.fingerprint("fpn_72").fields, "weights_sha256": "other"})
    with store_lock(store):
        describe_store(
            store,
            settings=opened.settings,
            levels={"fpn_72": (LevelSpec("fpn_72", SMALL["fpn_72"]), fingerprint)},
            label_sets=opened.label_sets,
            samples=read_samples(store),
            annotations=read_annotations(store),
        )
        seal_store(store)


CASES = [
    ("extract nowhere.csv", "nowhere.csv"),
    ("extract empty.csv", "empty.csv"),
    ("extract header.csv", "header.csv"),
    ("extract void", "void"),
    ("extract plain.csv", "image"),
    ("extract twice.csv", "'a'"),
    ("extract odd-split.csv", "trian"),
    ("extract plain.csv --columns columns.toml", "cine"),
    ("extract plain.csv --columns broken.toml", "broken.toml"),
    ("extract plain.csv --columns nowhere.toml", "nowhere.toml"),
    ("extract good --levels fpn_73", "fpn_73"),
    ("extract good --levels fpn_72,fpn_72", "twice"),
    ("extract good --batch-size 17", "17"),
    ("extract good --batch-size many", "many"),
    ("extract good --backbone sam4", "sam4"),
    ("extract good --weights nowhere.pt", "nowhere.pt"),
    ("extract good --devices cuda:7", "cuda:7"),
    ("extract good --devices tpu", "tpu"),
    ("extract good -o header.csv", "header.csv"),
    ("train nowhere.zarr --name x", "nowhere.zarr"),
    ("train good --name x", "good"),
    ("train unsealed.zarr --name x", "not sealed"),
    ("train train-only.zarr --name x --head linear", "val"),
    ("train images.zarr --name x", "fpn_72"),
    ("train good.zarr --name x --head film-covn", "film-covn"),
    ("train good.zarr --name x --head nowhere:Head", "nowhere"),
    ("train good.zarr --name x --epochs 0", "epochs"),
    ("train good.zarr --name a/b", "a/b"),
    ("train good.zarr --name run --head linear", "run"),
    ("train good.zarr --name x --label-set other", "other"),
    ("eval nowhere.zarr run", "nowhere.zarr"),
    ("eval good.zarr checkpoints/nowhere", "nowhere"),
    ("eval unsealed.zarr checkpoints/run", "not sealed"),
    ("eval train-only.zarr checkpoints/run --split test", "test"),
    ("eval images.zarr checkpoints/run", "fpn_72"),
    ("eval other.zarr checkpoints/run", "weights_sha256 test → other"),
    ("phantom good", "good"),
    ("phantom new --num 0", "0"),
]


@pytest.mark.parametrize(("line", "named"), CASES, ids=[line for line, _ in CASES])
def test_bad_input_is_refused_in_one_line_that_names_it(place, line, named):
    words = line.split()
    if words[0] == "extract":
        words = with_defaults(line.split())
    before = sorted(path for path in place.rglob("*") if path.is_file())
    result = call(*words, cwd=place)
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit), result.exception
    errors = result.stderr.strip().splitlines()
    assert len([e for e in errors if "Checking" not in e]) == 1 or errors[0].startswith("Usage:")
    assert named in errors[-1]
    after = sorted(path for path in place.rglob("*") if path.is_file() and path.name != ".lock")
    assert after == [path for path in before if path.name != ".lock"]


def with_defaults(words):
    """Add the miniature and the CPU where a case does not say otherwise."""
    for option, value in (("--backbone", "sam3-mini"), ("--devices", "cpu")):
        if option not in words:
            words = [*words, option, value]
    return words


@pytest.fixture(scope="module")
def aside(tmp_path_factory):
    """One extraction of a manifest in which everything but two samples is wrong."""
    root = tmp_path_factory.mktemp("aside")
    write_images(root, num_images=4)
    images = root / "images"
    whole = (images / "00.png").read_bytes()
    (images / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (images / "empty.png").write_bytes(b"")
    (images / "text.png").write_text("not a picture", encoding="utf-8")
    np.save(images / "nothing.npy", np.zeros((0, 0), np.uint8))
    np.save(images / "nan.npy", np.full((8, 8), np.nan))
    shutil.copy(images / "01.png", images / "wide.png")
    Image.fromarray(np.zeros((40, 90), np.uint8)).save(root / "masks" / "wide.png")
    lines = [
        "good,images/00.png,masks/00.png,0,0,train,a",
        "also-good,images/01.png,,,,val,b",
        "truncated,images/truncated.png,,0,0,train,a",
        "empty,images/empty.png,,0,0,train,a",
        "text,images/text.png,,0,0,train,a",
        "nothing,images/nothing.npy,,0,0,train,a",
        "nan,images/nan.npy,,0,0,train,a",
        "absent,images/absent.png,,0,0,train,a",
        "wide,images/wide.png,masks/wide.png,0,0,train,a",
        "absent-mask,images/02.png,masks/absent.png,0,0,train,a",
        "angle,images/03.png,,400,0,train,a",
        "words,images/03.png,,LAO 30,0,train,a",
    ]
    (root / "manifest.csv").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    with one_process():
        return call(
            *with_defaults(["extract", ".", "-o", "x.zarr", "--levels", "image_1008"]), cwd=root
        )


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ("truncated", "truncated.png"),
        ("empty", "empty.png"),
        ("text", "text.png"),
        ("nothing", "nothing.npy"),
        ("nan", "nan.npy"),
        ("absent", "absent.png"),
        ("wide", "40"),
        ("absent-mask", "absent.png"),
        ("angle", "400"),
        ("words", "LAO 30"),
    ],
)
def test_a_bad_sample_is_set_aside_in_one_line_and_the_rest_is_stored(aside, sample, reason):
    assert aside.exit_code == 3, aside.output
    lines = [e for e in aside.stderr.splitlines() if e.startswith(f"set aside: {sample} (")]
    assert len(lines) == 1
    assert reason in lines[0].split("): ", 1)[1]
    assert "2 samples, sealed" in aside.stdout


READ_ONLY = (
    "extract good -o locked/x.zarr --backbone sam3-mini --devices cpu",
    "train good.zarr --name x --head linear -o locked --device cpu",
    "eval good.zarr checkpoints/run -o locked/results --device cpu",
    "phantom locked/new --num 1",
)
# One process for all of them: most of a command's time is its imports.
RUN_ALL = """
import json, sys
from click.testing import CliRunner
from sam3cache.commands import main
for line in sys.argv[1:]:
    done = CliRunner().invoke(main, line.split())
    print(json.dumps([done.exit_code, done.stderr, repr(done.exception)]))
"""


@pytest.fixture(scope="module")
def refusals(place):
    """By line, what the program says in a folder that it may not write to."""
    locked = place / "locked"
    locked.mkdir()
    locked.chmod(0o555)

    def drop_the_right_to_override_permissions():
        # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: without it root, too, is bound by a folder's mode.
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)

    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *READ_ONLY],
        cwd=place,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=drop_the_right_to_override_permissions,
    )
    assert done.returncode == 0, done.stderr
    assert list(locked.iterdir()) == []
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(READ_ONLY, answers, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="drops a capability of Linux's")
@pytest.mark.parametrize("line", READ_ONLY)
def test_a_read_only_folder_is_named_in_one_line(refusals, line):
    exit_code, stderr, exception = refusals[line]
    assert exit_code in (1, 2), stderr
    assert exception.startswith("SystemExit("), exception
    errors = [e for e in stderr.splitlines() if e.startswith("sam3cache: error:")]
    assert len(errors) == 1, stderr
    assert "locked" in errors[0]
