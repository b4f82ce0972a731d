"""``sam3cache predict`` as people and programs call it, and docs/predict.md as it stands."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from head_runs import levels_of, write_run
from picture_folder import write_images
from PIL import Image
from worker_thread import one_process

from sam3cache.commands import main
from sam3cache.extract import ExtractConfig, extract
from sam3cache.features import open_store

DOCUMENT = Path(__file__).parents[2] / "docs" / "predict.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three pictures; a store of two of them; runs of each task."""
    root = tmp_path_factory.mktemp("predict")
    write_images(root / "data", num_images=3)
    rows = (root / "data" / "manifest.csv").read_text(encoding="utf-8").splitlines()
    two = root / "data" / "two.csv"
    two.write_text("\n".join(rows[:3]) + "\n", encoding="utf-8")
    config = ExtractConfig(
        two, root / "two.zarr", levels=("fpn_72", "image_1008"), backbone="sam3-mini"
    )
    with one_process():
        assert extract(config).sealed
    levels = levels_of(open_store(root / "two.zarr"))
    write_run(levels, root / "first", "film-conv", threshold=0.48)
    write_run(levels, root / "numbers", "film-conv", task="multiclass", classes=("LAD", "RCA"))
    write_run(levels, root / "labels", "linear", classes=("LAD", "a/b"))
    return root


@pytest.fixture
def here(place, monkeypatch):
    """Work in their folder, and leave it as it was."""
    before = set(place.iterdir())
    monkeypatch.chdir(place)
    yield place
    for path in set(place.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def table_of(folder):
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_manifest_is_predicted_from_the_store_where_it_can_be(here, invoke):
    result = invoke(
        *("predict", "first", "data", "-o", "out", "--store", "two.zarr", "--overlay"),
        *("--coco", "out/coco.json", "--probabilities", "npy", "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("out: masks of 3 images, in ")
    assert lines[1:] == [
        "Threshold: a probability of 0.48.",
        "Features: 2 from the store, 1 by the tower.",
        "COCO: out/coco.json",
    ]
    assert "Predicting: 3/3 images" in result.stderr
    out = here / "out"
    table = table_of(out)
    assert [row["features"] for row in table] == ["store", "store", "tower"]
    assert [row["primary_angle_deg"] for row in table] == ["-17.0", "-16.0", "-15.0"]
    annotations = json.loads((out / "coco.json").read_bytes())["annotations"]
    for number, row in enumerate(table):
        mask = np.array(Image.open(out / row["mask"]))
        assert mask.shape == (int(row["height_px"]), int(row["width_px"]))
        assert set(np.unique(mask)) == {0, 255}
        probability = np.load(out / "probabilities" / f"{row['id']}.npy")
        np.testing.assert_array_equal(mask[None] == 255, probability >= np.float32(0.48))
        assert (mask == 255).sum() == int(row["vessel_px"]) == annotations[number]["area"]
        assert (out / "overlays" / f"{row['id']}.png").is_file()
    # Python says the same of each, with its angles.
    import sam3cache

    predictor = sam3cache.load("first", store="two.zarr")
    found = predictor.predict("data/images/01.png", -16.0, 16.0)
    np.testing.assert_allclose(found, np.load(out / "probabilities" / "s01.npy"), atol=1e-6)


def test_programs_get_json_alone_on_stdout(here, invoke):
    result = invoke(
        "predict", "numbers", "data/two.csv", "--store", "two.zarr", "-o", "out", "--json"
    )
    summary = json.loads(result.stdout)
    assert summary == json.loads(Path("out/summary.json").read_bytes())
    assert (summary["num_images"], summary["num_from_store"], summary["num_from_tower"]) == (
        2,
        2,
        0,
    )
    assert (summary["task"], summary["classes"]) == ("multiclass", ["LAD", "RCA"])
    assert summary["threshold"] is None
    for row in table_of(Path("out")):
        numbers = np.array(Image.open(Path("out") / row["mask"]))
        counts = np.bincount(numbers.ravel(), minlength=3)
        assert [int(row["LAD_px"]), int(row["RCA_px"])] == counts[1:3].tolist()
        assert len(counts) == 3
        assert counts.min() > 0


def test_angles_and_several_labels(here, invoke):
    files = ("data/images/00.png", "data/images/01.png")
    common = ("predict", "labels", *files, "--store", "two.zarr", "--threshold", "0.3")
    assert invoke(*common, "-o", "a", "--primary-angle", "-30").exit_code == 0
    for row in table_of(Path("a")):
        assert (row["primary_angle_deg"], row["secondary_angle_deg"]) == ("-30.0", "")
        assert row["angles"] == "given"
        assert row["mask"] == f"masks/LAD/{row['id']}.png;masks/a_b/{row['id']}.png"
        assert all((Path("a") / name).is_file() for name in row["mask"].split(";"))
    assert json.loads(Path("a/summary.json").read_bytes())["threshold"] == 0.3


def test_angles_that_nobody_gives_are_the_stores_or_unknown_with_a_warning(here, invoke):
    common = ("--store", "two.zarr", "--probabilities", "npy")
    result = invoke("predict", "first", "data/images", *common, "-o", "out")
    assert result.exit_code == 0, result.output
    columns = ("angles", "primary_angle_deg", "secondary_angle_deg")
    assert [tuple(row[column] for column in columns) for row in table_of(here / "out")] == [
        ("store", "-17.0", "17.0"),
        ("store", "-16.0", "16.0"),
        ("unknown", "", ""),
    ]
    assert "View angles: 2 from the store." in result.stdout.splitlines()
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("warning: "))
    assert line == (
        "warning: 1 of 3 images lack a view angle, which this head reads; give --primary-angle and "
        "--secondary-angle, or a CSV with the angles of each image"
    )
    summary = json.loads(Path("out/summary.json").read_bytes())
    assert (summary["num_angles_from_store"], summary["num_lacking_angles"]) == (2, 1)
    assert summary["decide"] == "binary: sigmoid(logit) >= threshold"
    assert invoke("predict", "first", "data/two.csv", *common, "-o", "given").exit_code == 0
    for name in ("00", "01"):
        found = np.load(here / "out" / "probabilities" / f"{name}.npy")
        np.testing.assert_array_equal(
            found, np.load(here / "given" / "probabilities" / f"s{name}.npy")
        )


def test_a_head_without_angles_warns_of_none_and_classes_have_a_legend(here, invoke):
    common = ("predict", "labels", "data/images/02.png", "--store", "two.zarr", "--overlay")
    result = invoke(*common, "-o", "out")
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    assert [row["angles"] for row in table_of(here / "out")] == ["unknown"]
    assert ">a/b<" in (here / "out" / "legend.svg").read_text(encoding="utf-8")
    again = invoke(*common, "-o", "out")
    assert "(and 5 more files)" in again.stderr


def test_a_bad_image_is_set_aside_and_its_earlier_mask_removed(here, invoke):
    shutil.copytree(here / "data" / "images", here / "mine")
    common = ("predict", "first", "mine", "--store", "two.zarr", "-o", "out")
    assert invoke(*common).exit_code == 0
    whole = (here / "mine" / "00.png").read_bytes()
    (here / "mine" / "00.png").write_bytes(whole[: len(whole) // 2])
    result = invoke(*common, "--overwrite", "--overlay", "--coco", "c.json")
    assert result.exit_code == 3
    assert result.stdout.startswith("out: masks of 2 images, 1 set aside, in ")
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("set aside: "))
    assert line.startswith("set aside: 00 (00.png): 00.png: ")
    assert sorted(path.name for path in Path("out/masks").iterdir()) == ["01.png", "02.png"]
    table = {row["id"]: row for row in table_of(Path("out"))}
    assert table["00"]["reason"].startswith("00.png: ")
    assert table["00"]["mask"] == ""
    assert table["01"]["reason"] == ""
    names = [image["file_name"] for image in json.loads(Path("c.json").read_bytes())["images"]]
    assert names == ["01.png", "02.png"]


def test_nothing_is_written_over_unless_asked_for(here, invoke):
    common = ("predict", "first", "data/images/00.png", "--store", "two.zarr", "-o", "out")
    assert invoke(*common).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in here.glob("out/**/*")}
    result = invoke(*common)
    assert result.exit_code == 2
    assert result.stderr.endswith(
        "out/masks/00.png is there already (and 2 more files); name another folder by -o, or "
        "replace what is there by --overwrite\n"
    )
    assert {path: path.stat().st_mtime_ns for path in here.glob("out/**/*")} == before
    assert invoke(*common, "--overwrite").exit_code == 0


def test_no_input_is_ever_written_over(here, invoke):
    shutil.copytree(here / "data", here / "mine")
    (here / "mine" / "masks").rename(here / "mine" / "labels")
    table = here / "mine" / "manifest.csv"
    table.write_text("id,image,mask\n00,images/00.png,masks/00.png\n", encoding="utf-8")
    (here / "mine" / "labels").rename(here / "mine" / "masks")
    mask = (here / "mine" / "masks" / "00.png").read_bytes()
    result = invoke("predict", "first", "mine", "--store", "two.zarr", "-o", "mine", "--overwrite")
    assert result.exit_code == 2
    assert "is one of the files that were given" in result.stderr
    assert (here / "mine" / "masks" / "00.png").read_bytes() == mask


def test_no_table_that_was_named_is_ever_written_over(here, invoke):
    (here / "out").mkdir()
    table = here / "out" / "predictions.csv"
    table.write_text(f"image\n{(here / 'data' / 'images' / '00.png').as_posix()}\n", "utf-8")
    before = table.read_bytes()
    common = ("--store", "two.zarr", "-o", "out", "--overwrite")
    result = invoke("predict", "first", "out/predictions.csv", *common)
    assert result.exit_code == 2
    assert "predictions.csv is one of the files that were given" in result.stderr
    assert table.read_bytes() == before


def test_a_killed_run_leaves_whole_files_alone_and_can_be_run_again(here, invoke):
    (here / "many").mkdir()
    for number in range(40):
        shutil.copy(here / "data" / "images" / "00.png", here / "many" / f"{number:02}.png")
    common = ("predict", "first", "many", "--store", "two.zarr", "-o", "out", "--coco", "c.json")
    program = [sys.executable, "-m", "sam3cache", *common, "--device", "cpu", "--overlay"]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 100
        while len(list(here.glob("out/masks/*.png"))) < 3:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    masks = list(here.glob("out/masks/*.png"))
    assert 3 <= len(masks) < 40
    for path in masks:
        with Image.open(path) as image:
            assert set(np.unique(np.array(image))) == {0, 255}
    assert not (here / "c.json").exists()
    assert not (here / "out" / "summary.json").exists()
    assert invoke(*common).exit_code == 2
    assert invoke(*common, "--overwrite").exit_code == 0
    assert len(list(here.glob("out/masks/*.png"))) == 40
    assert len(json.loads((here / "c.json").read_bytes())["annotations"]) == 40


def test_each_frame_of_a_cine_has_a_mask_of_its_own(here, invoke):
    (here / "new").mkdir()
    stills = []
    for number in range(2):
        with Image.open(here / "data" / "images" / "00.png") as image:
            stills.append(np.array(image)[:, :: 1 - 2 * number])
    np.save(here / "new" / "run.npy", np.stack(stills))
    result = invoke("predict", "first", "new/run.npy", "--store", "two.zarr", "-o", "out")
    assert result.exit_code == 0, result.output
    table = table_of(here / "out")
    assert [(row["id"], row["frame"], row["features"], row["mask"]) for row in table] == [
        ("run#0", "0", "store", "masks/run#0.png"),
        ("run#1", "1", "tower", "masks/run#1.png"),
    ]


def test_a_head_is_exported_with_or_without_images(here, invoke):
    result = invoke("predict", "first", "--export", "head.pt2", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)["export"]
    assert record.pop("path") == "head.pt2"
    assert record == json.loads(Path("head.json").read_bytes())
    assert record["threshold"] == 0.48
    both = invoke(
        *("predict", "first", "data/images/00.png", "--store", "two.zarr", "-o", "out"),
        *("--export", "head.pt2", "--overwrite"),
    )
    assert both.exit_code == 0, both.output
    assert both.stdout.splitlines()[0].startswith("head.pt2: the head, as torch.export has it;")
    assert Path("out/masks/00.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["first"], 2, "no images are named"),
        (["first", "data"], 2, "no folder for the masks is named"),
        (["first", "nowhere.png", "-o", "out"], 2, "nowhere.png: no such file"),
        (["first", "*.tif", "-o", "out"], 2, "matches no picture"),
        (["nowhere", "data", "-o", "out"], 1, "no checkpoint at nowhere"),
        (["first", "data", "-o", "out", "--store", "nowhere.zarr"], 1, "nowhere.zarr"),
        (["first", "data", "-o", "out", "--weights", "nowhere.pt"], 1, "nowhere.pt"),
        (["first", "data", "-o", "out", "--weights", "random"], 1, "weights_sha256"),
        (["first", "data", "-o", "out", "--primary-angle", "30"], 2, "primary angles of its own"),
        (["first", "data/images", "-o", "out", "--primary-angle", "181"], 2, "primary angle 181"),
        (["first", "data", "-o", "out", "--threshold", "1"], 2, "threshold 1.0"),
        (["numbers", "data", "-o", "out", "--threshold", "0.4"], 2, "leave --threshold out"),
        (["first", "data", "-o", "out", "--batch-size", "0"], 2, "batch size 0"),
        (["first", "data", "-o", "file"], 2, "results cannot be written to file"),
        (["first", "data", "-o", "out", "--coco", "data"], 2, "data is there already"),
        (["first", "data", "-o", "out", "--coco", "out/masks/s00.png"], 2, "written twice"),
        (["first", "data", "-o", "out", "--columns", "nowhere.toml"], 1, "nowhere.toml"),
        (["first", "--export", "head.onnx"], 2, "ends in .pt2"),
        (["first", "--export", "absent/head.pt2"], 2, "there is no folder absent; make it first"),
        (["first", "data", "-o", "out", "--head", "linear"], 1, "checkpoint of head film-conv"),
    ],
)
def test_what_cannot_be_done_is_one_line_on_stderr(here, invoke, arguments, exit_code, words):
    (here / "file").write_text("", encoding="utf-8")
    result = invoke("predict", *arguments)
    assert result.exit_code == exit_code, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("sam3cache: error: ")
    assert words in line
    assert result.stdout == ""
    assert not list(here.glob("out/masks"))


def test_the_document_is_true(here, monkeypatch, capsys):
    """Every command and every example of docs/predict.md, in its order, in one place."""
    for name, source in (
        ("checkpoints/first", "first"),
        ("features/angio.zarr", "two.zarr"),
        ("features/phantoms.zarr", "two.zarr"),
        ("phantoms", "data"),
    ):
        shutil.copytree(here / source, here / name)
    shutil.copy(here / "data" / "two.csv", here / "phantoms" / "manifest.csv")
    assert [kind for kind, _ in FENCES].count("python") == 2
    for kind, body in FENCES:
        if kind == "python":
            exec(compile(body, str(DOCUMENT), "exec"), {})
            continue
        assert kind == "bash"
        for line in body.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "sam3cache"
            arguments = [re.sub(r"p0001_\w+", "00", part) for part in arguments]
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 0, result.output
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "('vessel',) 0.48 (1, 480, 512)"
    assert len(printed) == 5
    assert printed[3:] == ["['vessel'] (1, 96, 128)", "['vessel'] (1, 128, 96)"]
