"""A store as one HDF5 file and back, and files that are damaged or not ours."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from store_builder import build_store
from test_copying import contents, precise_store, remove

from sam3cache.errors import CorruptStoreError, Sam3CacheError, StoreError
from sam3cache.features import open_store
from sam3cache.features.hdf5 import export_hdf5, import_hdf5


@pytest.fixture(scope="module")
def precise(tmp_path_factory):
    """A store with every precision and two label sets, and its export."""
    root = tmp_path_factory.mktemp("precise")
    store = open_store(precise_store(root / "a.zarr"))
    result = export_hdf5(store, root / "a.h5")
    assert (result.num_samples, result.size_bytes) == (3, (root / "a.h5").stat().st_size)
    return root


def test_a_store_comes_back_bit_by_bit(precise, tmp_path):
    result = import_hdf5(precise / "a.h5", tmp_path / "x.zarr")
    assert (result.num_samples, result.num_copied) == (3, 3)
    assert contents(tmp_path / "x.zarr") == contents(precise / "a.zarr")
    there, back = open_store(precise / "a.zarr"), open_store(tmp_path / "x.zarr")
    assert back.settings == there.settings
    assert back.levels == there.levels
    assert back.label_sets == there.label_sets
    for name in there.levels:
        assert back.fingerprint(name) == there.fingerprint(name)
    for path in (precise / "a.zarr").rglob("*"):
        name = path.relative_to(precise / "a.zarr")
        if "/c/" in name.as_posix() and path.is_file():
            assert (tmp_path / "x.zarr" / name).read_bytes() == path.read_bytes()


def test_rows_are_dense_and_samples_that_are_gone_stay_behind(tmp_path):
    root = build_store(tmp_path / "a.zarr", num_samples=20, level_shapes={"fpn_72": (2, 3, 3)})
    remove(root, {0, 5, 17})
    seen = []
    export_hdf5(open_store(root), tmp_path / "a.h5", lambda *numbers: seen.append(numbers))
    import_hdf5(tmp_path / "a.h5", tmp_path / "x.zarr")
    assert contents(tmp_path / "x.zarr") == contents(root)
    assert [sample.row for sample in open_store(tmp_path / "x.zarr").samples] == list(range(17))
    assert (seen[0], seen[-1]) == ((0, 17), (17, 17))


def test_h5py_alone_reads_it(precise):
    store = open_store(precise / "a.zarr")
    with h5py.File(precise / "a.h5") as file:
        assert file.attrs["sam3cache_hdf5_version"] == 1
        for i, sample in enumerate(store.samples):
            assert file["samples/id"].asstr()[i] == sample.id
            stored = store.read_stored("fpn_72", sample.row).data_CHW
            assert np.array_equal(file["levels/fpn_72"][i], stored)
            values = (
                file["levels/fpn_72.int8"][i] * file["levels/fpn_72.int8.scale"][i][:, None, None]
            )
            assert np.array_equal(values.astype(np.float16), store.read("fpn_72.int8", sample.row))
            group = file["labels/parts"]
            mask = store.read_mask(sample.row, "parts")
            assert group["present"][i] == (mask is not None)
            if mask is not None:
                height_px, width_px = group["height_px"][i], group["width_px"][i]
                assert np.array_equal(group["masks"][i, :, :height_px, :width_px], mask)
        assert file["levels/fpn_72"].chunks == (1, 4, 6, 6)
        assert file["levels/fpn_72"].fletcher32
        assert json.loads(file["labels/parts"].attrs["classes"]) == ["artery", "catheter"]
        assert json.loads(file.attrs["settings"]) == store.settings
        fingerprint = json.loads(file["levels/fpn_72"].attrs["fingerprint"])
        assert fingerprint == store.fingerprint("fpn_72").fields
        assert file["annotations/extra/a%2Fb%25"].asstr()[1] == "ü"


def test_a_file_that_is_there_is_not_replaced(precise):
    before = (precise / "a.h5").stat().st_mtime_ns
    with pytest.raises(StoreError, match=r"a\.h5 exists"):
        export_hdf5(open_store(precise / "a.zarr"), precise / "a.h5")
    assert (precise / "a.h5").stat().st_mtime_ns == before


def test_an_import_that_stopped_goes_on_and_another_file_is_refused(precise, tmp_path):
    root = tmp_path / "x.zarr"
    import_hdf5(precise / "a.h5", root)
    assert import_hdf5(precise / "a.h5", root).num_copied == 0
    (root / "complete.json").rename(root / "receipts/folded.json")
    (root / "levels/fpn_72/c/0/0/0/0").unlink()
    assert import_hdf5(precise / "a.h5", root).num_copied == 3
    assert contents(root) == contents(precise / "a.zarr")
    other = build_store(tmp_path / "b.zarr", level_shapes={"fpn_72": (2, 3, 3)})
    export_hdf5(open_store(other), tmp_path / "b.h5")
    with pytest.raises(StoreError, match="is not what this command makes"):
        import_hdf5(tmp_path / "b.h5", root)


def test_an_export_from_a_damaged_store_leaves_no_file(precise, tmp_path):
    root = shutil.copytree(precise / "a.zarr", tmp_path / "a.zarr")
    shard = root / "levels/fpn_72/c/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptStoreError, match="levels/fpn_72"):
        export_hdf5(open_store(root), tmp_path / "out" / "a.h5")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files by POSIX's means")
def test_a_full_disk_is_one_error_that_names_the_file_and_leaves_none(tmp_path):
    """In a process of its own: HDF5 has been seen to end it."""
    root = build_store(tmp_path / "a.zarr", level_shapes={"fpn_72": (256, 72, 72)})
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from sam3cache.features import open_store\n"
        "from sam3cache.features.hdf5 import export_hdf5\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))\n"
        "try:\n"
        "    export_hdf5(open_store(sys.argv[1]), Path(sys.argv[2]))\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, root, tmp_path / "a.h5"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "File too large" in result.stdout
    assert ".a.h5.partial" in result.stdout
    assert not list(tmp_path.glob("*.h5*"))
    assert not list(tmp_path.glob("*.partial"))


# ---------------------------------------------------------------------------- damage


def edit(change):
    def run(path):
        with h5py.File(path, "r+", libver=("v110", "v110")) as file:
            change(file)

    return run


def replace_dataset(name, values):
    def change(file):
        attributes = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, data=values(file) if callable(values) else values)
        for key, value in attributes.items():
            file[name].attrs[key] = value

    return edit(change)


def set_value(name, index, value):
    def change(file):
        file[name][index] = value

    return edit(change)


def set_attribute(name, key, value):
    def change(file):
        file[name].attrs[key] = value

    return edit(change)


def delete(name):
    def change(file):
        del file[name]

    return edit(change)


def truncate(share):
    def run(path):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return run


SPOILED = {
    "missing file": (Path.unlink, "does not exist"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "is not a file"),
    "empty": (lambda path: path.write_bytes(b""), "is not an HDF5 file"),
    "text": (lambda path: path.write_text("id,image\n", encoding="utf-8"), "is not an HDF5 file"),
    "truncated": (truncate(0.6), "cannot be used as it is"),
    "truncated a little": (truncate(0.999), "cannot be used as it is"),
    "other HDF5": (edit(lambda file: file.attrs.pop("sam3cache_hdf5_version")), "not one that"),
    "newer": (set_attribute("/", "sam3cache_hdf5_version", 2), "up to 1; upgrade"),
    "odd version": (set_attribute("/", "sam3cache_hdf5_version", "x"), "its attributes"),
    "no settings": (edit(lambda file: file.attrs.pop("settings")), "its attributes"),
    "settings no JSON": (set_attribute("/", "settings", "{"), "its attributes"),
    "settings no object": (set_attribute("/", "settings", "[]"), "settings"),
    "no levels": (delete("levels"), "its attributes"),
    "empty levels": (edit(lambda file: file["levels"].clear()), "levels: empty"),
    "no scale": (delete("levels/fpn_72.int8.scale"), "levels/fpn_72.int8.scale: it is missing"),
    "odd level name": (edit(lambda f: f.move("levels/fpn_72.r5", "levels/fpn_72.r9")), "r9"),
    "no fingerprint": (edit(lambda f: f["levels/fpn_72"].attrs.pop("fingerprint")), "fpn_72"),
    "other digest": (set_attribute("levels/fpn_72", "digest", np.bytes_(b"0")), "fit each other"),
    "other axes": (replace_dataset("levels/fpn_72", np.zeros((3, 4), "f2")), "its shape (3, 4)"),
    "fewer samples": (replace_dataset("levels/fpn_72", np.zeros((2, 4, 6, 6), "f2")), "3 samples"),
    "other dtype": (replace_dataset("levels/fpn_72", np.zeros((3, 4, 6, 6), "f4")), "float32"),
    "a group for a dataset": (
        edit(lambda f: (f.pop("samples/id"), f.create_group("samples/id"))),
        "samples/id: it is missing",
    ),
    "NaN": (set_value("levels/fpn_72", (1, 0, 0, 0), np.nan), "levels/fpn_72[1] has values"),
    "infinite bf16": (set_value("levels/fpn_72.bf16", (2, 0, 0, 0), 0x7F80), "fpn_72.bf16[2]"),
    "NaN scale": (set_value("levels/fpn_72.int8.scale", (0, 1), np.nan), "fpn_72.int8[0]"),
    "no ids": (delete("samples/id"), "samples/id: it is missing"),
    "numbers for ids": (replace_dataset("samples/id", np.arange(3)), "samples/id: of type int64"),
    "twice one id": (set_value("samples/id", 1, b"s0"), "samples/id: an id is empty or there"),
    "ids no UTF-8": (set_value("samples/id", 1, b"\xff\xfe"), "samples/id"),
    "no splits": (delete("annotations/split"), "annotations/split"),
    "odd split": (set_value("annotations/split", 1, b"tain"), "annotations/split"),
    "no annotations": (delete("annotations"), "annotations"),
    "no masks": (delete("labels/mask/masks"), "labels/mask/masks: it is missing"),
    "no labels": (delete("labels"), "labels"),
    "a mask beyond": (set_value("labels/mask/height_px", 1, 99), "a mask's size is beyond"),
    "no classes": (edit(lambda f: f["labels/mask"].attrs.pop("classes")), "labels/mask"),
    "more classes": (set_attribute("labels/mask", "classes", b'["a","b"]'), "labels/mask/masks"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_file_that_cannot_be_used_is_refused_in_one_line_that_says_where(precise, tmp_path, what):
    spoil, words = SPOILED[what]
    path = Path(shutil.copy(precise / "a.h5", tmp_path / "a.h5"))
    spoil(path)
    with pytest.raises(StoreError) as caught:
        import_hdf5(path, tmp_path / "x.zarr")
    message = str(caught.value)
    assert words in message
    assert str(path) in message
    assert "\n" not in message
    root = tmp_path / "x.zarr"
    assert not (root / "complete.json").exists()


def test_no_flipped_byte_goes_unnoticed(tmp_path):
    """What is imported from a file with one flipped byte is refused, or equal to the original."""
    root = build_store(tmp_path / "a.zarr", num_samples=3, level_shapes={"fpn_72": (2, 4, 4)})
    export_hdf5(open_store(root), tmp_path / "a.h5")
    expected = contents(root)
    whole = (tmp_path / "a.h5").read_bytes()
    spoiled, target = tmp_path / "spoiled.h5", tmp_path / "x.zarr"
    num_refused = 0
    for position in np.random.default_rng(0).choice(len(whole), 60, replace=False):
        data = bytearray(whole)
        data[position] ^= 0xFF
        spoiled.write_bytes(data)
        try:
            import_hdf5(spoiled, target)
        except Sam3CacheError:
            num_refused += 1
        else:
            assert contents(target) == expected, position
        shutil.rmtree(target, ignore_errors=True)
    assert num_refused > 0
