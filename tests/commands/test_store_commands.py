"""``sam3cache store`` info, subset, merge, repack, export and import, and what they refuse."""

import json
import shutil
from dataclasses import replace

import pytest
from store_builder import build_store

from sam3cache.features import (
    describe_store,
    open_store,
    seal_store,
    store_lock,
)

SMALL = {"fpn_72": (4, 6, 6), "image_1008": (1, 8, 8)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    build_store(root / "features" / "angio.zarr", num_samples=20, level_shapes=SMALL)
    with_losses(root / "features" / "angio.zarr")
    build_store(root / "other.zarr", num_samples=4, level_shapes=SMALL, seed=1)
    build_store(root / "weights.zarr", num_samples=4, level_shapes=SMALL, weights="new")
    build_store(root / "unsealed.zarr", num_samples=4, level_shapes=SMALL, seal=False)
    (root / "ids.txt").write_text("\ufeffs1\n\n s2 \n", encoding="utf-8")
    (root / "unknown.txt").write_text("s1\nx9\n", encoding="utf-8")
    (root / "aside.txt").write_text("s7\n", encoding="utf-8")
    (root / "empty.txt").write_text("\n", encoding="utf-8")
    (root / "latin.txt").write_bytes(b"s1\xff\n")
    (root / "void").mkdir()
    (root / "text.h5").write_text("no HDF5", encoding="utf-8")
    return root


def with_losses(root):
    """Remove two samples of a store, and set six aside."""
    store = open_store(root)

    def after(row):
        if row.row in (0, 1):
            return replace(row, status="removed", reason="no longer in the manifest")
        if 5 <= row.row <= 10:
            return replace(row, status="aside", reason=f"mask {row.row} cannot be read")
        return row

    with store_lock(root):
        describe_store(
            root,
            settings={**store.settings, "environment": {"sam3cache": "0.9"}, "device": "a card"},
            levels={n: (spec, store.fingerprint(n)) for n, spec in store.levels.items()},
            label_sets=store.label_sets,
            samples=[after(row) for row in store.sample_rows],
            annotations=[note for row, note in store.annotations.items() if row > 1],
        )
        seal_store(root)


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A working directory with these stores and files, for one test to change."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def there(made, monkeypatch):
    """The same, for tests that only look."""
    monkeypatch.chdir(made)
    return made


def test_info_tells_people_what_a_store_holds(there, invoke):
    result = invoke("store", "info")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "features/angio.zarr: format version 2, sealed"
    assert lines[1].startswith(
        "12 samples of 7 groups (6 set aside, 2 gone), 11 with both view angles; "
    )
    rows = [line.split() for line in lines]
    assert ["train", "4", "4"] in rows
    (level,) = [row for row in rows if row[:1] == ["fpn_72"]]
    assert level[1:4] == ["4×6×6", "float16", "2"]
    assert ["mask", "vessel", "11"] in [row[:3] for row in rows]
    assert "fpn_72, image_1008: backbone test, weights test, resize letterbox" in lines
    assert "Made on a card, batch size 1, sam3cache 0.9" in lines
    (dead,) = [line for line in lines if "still take" in line]
    assert dead.startswith("Note: 8 samples that are gone or replaced still take ")
    assert "Set aside: s5 (images/5.png): mask 5 cannot be read" in lines
    assert lines[-1] == "Set aside: 1 more; --json lists all."
    assert max(map(len, (line for line in lines if line.startswith(" ")))) <= 80


def test_info_gives_programs_everything(there, invoke):
    summary = json.loads(invoke("store", "info", "features/angio.zarr", "--json").stdout)
    store = open_store("features/angio.zarr")
    assert summary["num_samples"] == {"ok": 12, "pending": 0, "aside": 6, "removed": 2} | {
        "replaced": 0
    }
    assert sum(split["num_samples"] for split in summary["splits"].values()) == 12
    level = summary["levels"]["fpn_72"]
    fingerprint = store.fingerprint("fpn_72")
    assert (level["digest"], level["fingerprint"]) == (fingerprint.digest, fingerprint.fields)
    shards = [p for p in there.glob("features/angio.zarr/levels/fpn_72/c/**/*") if p.is_file()]
    on_disk = sum(path.stat().st_size for path in shards)
    assert level["size_bytes"] == on_disk
    assert summary["settings"] == store.settings
    assert len(summary["set_aside"]) == 6
    assert summary["seal"] == store.seal
    assert summary["dead"]["num_samples"] == 8
    whole = sum(p.stat().st_size for p in there.glob("features/angio.zarr/**/*") if p.is_file())
    assert 0 <= whole - summary["size_bytes"] < 4000


def test_info_says_that_a_store_is_unfinished(there, invoke):
    result = invoke("store", "info", "unsealed.zarr")
    assert result.exit_code == 0
    assert (
        "NOT SEALED: its making (extraction, copy, import) has not finished"
        in result.stdout.splitlines()[0]
    )
    assert json.loads(invoke("store", "info", "unsealed.zarr", "--json").stdout)["sealed"] is False


def test_a_subset_is_made_and_told(here, invoke):
    arguments = ("store", "subset", "features/angio.zarr", "-o", "x.zarr", "--split", "train,val")
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("x.zarr: 8 samples, sealed; copied in ")
    assert lines[1].startswith("Levels fpn_72, image_1008, masks mask: ")
    assert lines[2].startswith("6 samples were set aside, and stayed behind")
    assert "Copying: 8/8 images" in result.stderr
    again = json.loads(invoke(*arguments, "--json").stdout)
    assert (again["store"], again["num_samples"], again["num_copied"]) == ("x.zarr", 8, 0)
    assert "Copied from angio.zarr" in invoke("store", "info", "x.zarr").stdout


def test_a_subset_takes_ids_values_levels_and_label_sets(here, invoke):
    result = invoke(
        *("store", "subset", "features/angio.zarr", "-o", "x.zarr", "--ids", "ids.txt"),
        *("--where", "vessel=RCA", "--levels", "image_1008", "--label-sets", "none"),
    )
    # s1 is gone.
    assert result.exit_code == 2
    (here / "ids.txt").write_text("s2\ns3\n", encoding="utf-8")
    result = invoke(
        *("store", "subset", "features/angio.zarr", "-o", "x.zarr", "--ids", "ids.txt"),
        *("--where", "vessel=RCA", "--levels", "image_1008", "--label-sets", "none"),
    )
    assert result.exit_code == 0, result.output
    store = open_store("x.zarr")
    assert [sample.id for sample in store.samples] == ["s2"]
    assert (list(store.levels), list(store.label_sets)) == (["image_1008"], [])


def test_an_overlays_labels_and_splits_are_copied_into_a_subset(here, invoke):
    from sam3cache.features import AnnotationRow
    from sam3cache.features.overlay import make_overlay
    from sam3cache.features.relabel import replace_annotations

    store = open_store("other.zarr")
    make_overlay(here / "beside", store)
    replace_annotations(
        here / "beside", [AnnotationRow(row, f"s{row}", "test", "g") for row in range(4)]
    )
    result = invoke("store", "subset", "other.zarr", "-o", "x.zarr", "--overlay", "beside")
    assert result.exit_code == 0, result.output
    assert {sample.split for sample in open_store("x.zarr").samples} == {"test"}
    counts = json.loads(
        invoke("store", "info", "other.zarr", "--overlay", "beside", "--json").stdout
    )
    assert counts["splits"]["test"] == {"num_samples": 4, "num_groups": 1}


def test_stores_are_merged_with_warnings_on_stderr(here, invoke):
    result = invoke("store", "merge", "features/angio.zarr", "other.zarr", "-o", "x.zarr", "--json")
    assert result.exit_code == 1
    assert "sample 's2' is in features/angio.zarr and in other.zarr; pass --prefix" in result.stderr
    shutil.copytree("other.zarr", "twin.zarr")
    result = invoke(
        "store", "merge", "other.zarr", "twin.zarr", "-o", "x.zarr", "--prefix", "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_samples"] == 8
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: 4 pictures are in more than one of the stores, such as other-s0 and twin-s0: "
        "they are copied as often"
    ]


def test_repack_says_what_it_gave_back(here, invoke):
    before = open_store("features/angio.zarr").samples
    result = invoke("store", "repack", "features/angio.zarr")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("features/angio.zarr: ")
    assert " given back in " in lines[0]
    assert lines[1].startswith("8 samples that are gone are deleted, 12 moved, 0 stray files")
    after = open_store("features/angio.zarr").samples
    assert [sample.id for sample in after] == [sample.id for sample in before]
    result = invoke("store", "repack", "features/angio.zarr")
    assert result.stdout == "features/angio.zarr: nothing to give back; left as it is.\n"
    assert json.loads(invoke("store", "repack", "other.zarr", "--json").stdout)["freed_bytes"] == 0


def test_a_store_goes_out_and_comes_back_as_one_file(here, invoke):
    result = invoke("store", "export", "other.zarr", "-o", "out/o.h5")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("out/o.h5: 4 samples, ")
    assert "Exporting: 4/4 images" in result.stderr
    result = invoke("store", "import", "out/o.h5")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("features/o.zarr: 4 samples, sealed; copied in ")
    there, back = open_store("other.zarr"), open_store("features/o.zarr")
    assert [s.id for s in there.samples] == [s.id for s in back.samples]
    assert json.loads(invoke("store", "import", "out/o.h5", "--json").stdout)["num_copied"] == 0
    assert json.loads(invoke("store", "export", "other.zarr", "--json").stdout)["file"] == (
        "other.h5"
    )


def test_the_store_one_stands_in_is_exported_beside_itself(here, invoke, monkeypatch):
    monkeypatch.chdir("other.zarr")
    result = invoke("store", "export", ".", "--json")
    assert result.exit_code == 0, result.output
    assert (here / "other.h5").is_file()
    assert not list((here / "other.zarr").rglob("*.h5"))
    assert json.loads(result.stdout)["num_samples"] == 4


A = "features/angio.zarr"

BAD = [
    ("info nowhere.zarr", 1, "nowhere.zarr does not exist"),
    ("info void", 1, "void is not a feature store"),
    ("info other.zarr --overlay weights.zarr", 1, "is a feature store of its own"),
    (f"subset {A}", 2, "'-o' / '--output'"),
    ("subset nowhere.zarr -o new.zarr", 1, "nowhere.zarr does not exist"),
    ("subset unsealed.zarr -o new.zarr", 1, "unsealed.zarr is not sealed: its extraction"),
    (f"subset {A} -o new.zarr --split tset", 2, "split 'tset'; it has: test, train, val"),
    (f"subset {A} -o new.zarr --split ,", 2, "--split ',' names nothing"),
    (f"subset {A} -o new.zarr --ids nowhere.txt", 2, "--ids nowhere.txt: No such file"),
    (f"subset {A} -o new.zarr --ids void", 2, "--ids void"),
    (f"subset {A} -o new.zarr --ids empty.txt", 2, "holds no id"),
    (f"subset {A} -o new.zarr --ids latin.txt", 2, "not text in UTF-8"),
    (f"subset {A} -o new.zarr --ids unknown.txt", 2, "no sample 's1' and 1 more"),
    (f"subset {A} -o new.zarr --ids aside.txt", 2, "set aside (mask 7 cannot be read)"),
    (f"subset {A} -o new.zarr --where vessel", 2, "expected NAME=VALUE"),
    (f"subset {A} -o new.zarr --where vesel=LAD", 2, "no column 'vesel'"),
    (f"subset {A} -o new.zarr --where vessel=LCX", 2, "vessel 'LCX'; it has: LAD, RCA"),
    (f"subset {A} -o new.zarr --where group=g9 --split val --where vessel=RCA", 2, "no sample of"),
    (f"subset {A} -o new.zarr --levels fpn_73", 2, "known: fpn_72, image_1008"),
    (f"subset {A} -o new.zarr --label-sets stent", 2, "known: mask"),
    (f"subset {A} -o other.zarr", 1, "other.zarr exists and is not what this command makes"),
    (f"subset {A} -o ids.txt", 1, "ids.txt is a file"),
    (f"subset {A} -o features", 1, "features is not empty"),
    (f"subset {A} -o {A}", 1, "exists and is not what"),
    (f"subset {A} -o {A}/new.zarr", 1, "lies inside the store angio.zarr; give -o a folder beside"),
    ("merge other.zarr -o new.zarr", 2, "two stores or more"),
    ("merge -o new.zarr", 2, "Missing argument"),
    ("merge other.zarr other.zarr -o new.zarr", 2, "each of them once"),
    ("merge other.zarr nowhere.zarr -o new.zarr", 1, "nowhere.zarr does not exist"),
    ("merge other.zarr unsealed.zarr -o new.zarr", 1, "unsealed.zarr is not sealed"),
    ("merge other.zarr weights.zarr -o new.zarr", 1, "weights_sha256: test → new"),
    (f"merge other.zarr {A} -o new.zarr", 1, "sample 's2' is in other.zarr and in"),
    (f"merge other.zarr {A} -o weights.zarr --prefix", 1, "weights.zarr exists"),
    ("repack nowhere.zarr", 1, "nowhere.zarr does not exist"),
    ("repack void", 1, "void is not a feature store"),
    ("export nowhere.zarr", 1, "nowhere.zarr does not exist"),
    ("export unsealed.zarr", 1, "unsealed.zarr is not sealed"),
    ("export other.zarr -o ids.txt", 1, "ids.txt exists"),
    ("import nowhere.h5", 1, "nowhere.h5 does not exist"),
    ("import text.h5", 1, "text.h5 is not an HDF5 file"),
    ("import other.zarr", 1, "other.zarr is not a file"),
]


@pytest.mark.parametrize(("line", "exit_code", "words"), BAD, ids=[line for line, *_ in BAD])
def test_what_cannot_be_done_is_one_line_and_leaves_everything_as_it_was(
    there, invoke, line, exit_code, words
):
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*") if path.is_file()}
    result = invoke("store", *line.split())
    assert result.exit_code == exit_code, result.output
    assert words in result.stderr.splitlines()[-1]
    if "Usage:" not in result.stderr:
        (error,) = result.stderr.splitlines()
        assert error.startswith("sam3cache: error: ")
    after = {path: path.stat().st_mtime_ns for path in there.rglob("*") if path.is_file()}
    locks = {path for path in after if path.name == ".lock"}
    assert {p: t for p, t in after.items() if p not in locks} == {
        p: t for p, t in before.items() if p not in locks
    }
    assert not (there / "new.zarr").exists()


@pytest.mark.parametrize("name", ["info", "subset", "merge", "repack", "export", "import"])
def test_help_shows_an_example(invoke, name):
    result = invoke("store", name, "--help")
    assert result.exit_code == 0
    assert f"  sam3cache store {name} " in result.stdout
