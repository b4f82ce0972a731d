"""Whom a picture is of stays out of everything that is written, and strictness of what is bad."""

from pathlib import Path

import h5py
import numpy as np
import pydicom
import pytest
from dicom_files import angiogram, write_dicom
from head_runs import levels_of, write_run
from pyarrow import parquet

from sam3cache.features import open_store
from sam3cache.images import read_manifest
from sam3cache.images.pseudonyms import KEY_FILE_VARIABLE, Key, pseudonym
from sam3cache.inference.inputs import find_images

REAL = Path(pydicom.__file__).parent / "data" / "test_files" / "JPEG2000.dcm"

# Too odd to come about by chance, so that all that is written can be searched, pictures too.
PLANTED = (
    "Zwartebroek",
    "Maximiliaan",
    "MRN-77-4",
    "19570203",
    "19991231",
    "Hospital of",
    "Quackenbush",
    "1.2.840.99999",
)

TAGS = {
    "PatientName": "Zwartebroek^Maximiliaan",
    "PatientID": "MRN-77-4",
    "PatientBirthDate": "19570203",
    "StudyDate": "19991231",
    "StudyInstanceUID": "1.2.840.99999.1",
    "InstitutionName": "Hospital of Zwartebroek",
    "ReferringPhysicianName": "Quackenbush^Hugo",
    "StudyDescription": "Zwartebroek, Maximiliaan",
    "PositionerPrimaryAngle": "30",
    "PositionerSecondaryAngle": "-10",
}

EXTRACT = ("--levels", "image_1008", "--backbone", "sam3-mini", "--devices", "cpu")


@pytest.fixture
def key_file(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / "key" / "names.key"))
    return tmp_path / "key" / "names.key"


def write_study(folder):
    inner = folder / "ZWARTEBROEK_MAXIMILIAAN_19570203"
    inner.mkdir(parents=True)
    write_dicom(inner / "Zwartebroek-1.dcm", angiogram(3, 64, 8, fullest=1), **TAGS)
    write_dicom(inner / "MRN-77-4", angiogram(1, 64, 12)[0], bits=12, **TAGS)
    write_dicom(inner / "damaged-Zwartebroek.dcm", angiogram(1, 64, 8)[0], **TAGS)
    damaged = inner / "damaged-Zwartebroek.dcm"
    damaged.write_bytes(damaged.read_bytes()[:-3000])
    header = inner / "Maximiliaan-header.dcm"
    write_dicom(header, angiogram(1, 16, 8)[0], **TAGS)
    header.write_bytes(header.read_bytes().replace(b"Zwartebroek^Maximiliaan", b"\xff" * 23)[:400])
    real = pydicom.dcmread(REAL)
    del real.SOPClassUID, real.Modality  # Of a folder, what says it is no X-ray is left out.
    real.save_as(inner / "Zwartebroek-real.dcm")
    return folder


def everything_written(folder, but):
    """All bytes of a folder's files with their names, tables of Parquet spelt out."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_relative_to(but):
            yield path.relative_to(folder).as_posix().encode()
            yield path.read_bytes()
            if path.suffix == ".parquet":
                yield repr(parquet.read_table(path).to_pylist()).encode()


def test_nobody_is_named_in_what_an_extraction_writes_and_says(
    tmp_path, monkeypatch, key_file, invoke
):
    monkeypatch.chdir(tmp_path)
    # The folder's own name is one of those that nobody may be told.
    folder = "Zwartebroek-Maximiliaan"
    study = write_study(tmp_path / folder)
    result = invoke("extract", folder, "-o", "x.zarr", *EXTRACT)
    assert result.exit_code == 3, result.output
    assert "set aside" in result.stderr
    assert "warning: no sample of the manifest has a mask" in result.stderr
    assert str(key_file) in result.stderr
    shown = [
        invoke("store", "info", "x.zarr").output,
        invoke("store", "annotations", "show", "x.zarr").output,
        invoke("extract", folder, "-o", "x.zarr", *EXTRACT).output,
        invoke("extract", folder, "-o", "y.zarr", "--strict", *EXTRACT).output,
        invoke("plan", folder, "-o", "y.zarr", "--no-time", *EXTRACT).output,
        invoke("check", folder, "--by", "phase").output,
        invoke("store", "verify", "x.zarr", "--recompute", "3", "--from", folder).output,
    ]
    written = [result.output.encode(), *(text.encode() for text in shown)]
    written += everything_written(tmp_path, but=study)
    for text in written:
        for name in PLANTED:
            assert name.lower().encode() not in text.lower()
    store = open_store(tmp_path / "x.zarr")
    assert len(store.samples) == 3
    assert len({sample.group for sample in store.samples}) == 2
    assert sorted(sample.primary_angle_deg == 30 for sample in store.samples) == [False, True, True]
    # Names that another key gives belong to other files and patients: nothing is mixed.
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / "other.key"))
    other = invoke("extract", folder, "-o", "x.zarr", *EXTRACT)
    assert other.exit_code == 1
    assert "put the old key back" in other.stderr


def test_a_folder_of_somebodys_name_is_not_named_by_what_is_wrong_with_it(
    tmp_path, monkeypatch, key_file, invoke
):
    monkeypatch.chdir(tmp_path)
    for name, side_px in (("1", 64), ("2", 48)):
        (tmp_path / f"Zwartebroek-{name}").mkdir()
        path = tmp_path / f"Zwartebroek-{name}" / f"{name}.dcm"
        write_dicom(path, angiogram(1, side_px, 8)[0], **TAGS)
    assert invoke("extract", "Zwartebroek-1", "-o", "x.zarr", *EXTRACT).exit_code == 0
    other = invoke("extract", "Zwartebroek-2", "-o", "x.zarr", *EXTRACT)
    path.write_bytes(path.read_bytes()[: -48 * 48 - 12])  # A header is left, without pixels.
    none = invoke("extract", "Zwartebroek-2", "-o", "y.zarr", *EXTRACT)
    labels = invoke("store", "labels", "set", "x.zarr", "lad", "--from", "Zwartebroek-1")
    for result, words in (
        (other, "is in the manifest, under whatever name"),
        (none, "the manifest: none of its 1 samples can be used"),
        (labels, "the manifest: none of the 1 rows"),
    ):
        assert result.exit_code == 1
        assert words in result.stderr
        assert "Zwartebroek" not in result.output


def test_frames_of_a_dicom_file_that_tells_no_patient_are_one_group(tmp_path, key_file):
    tags = {"PatientID": None, "StudyInstanceUID": None}
    write_dicom(tmp_path / "a.dcm", angiogram(3, 32, 8), **tags)
    (tmp_path / "m.csv").write_text(
        "image,frame\na.dcm,contrast\na.dcm,1\n./a.dcm,2\n", encoding="utf-8"
    )
    manifest = read_manifest(tmp_path / "m.csv")
    assert len({sample.group for sample in manifest.samples}) == 1
    assert manifest.num_ungrouped == 3
    assert any("3 of 3 samples have no group" in note for note in manifest.notes)


@pytest.mark.parametrize("named", [["study"], ["study/*/*"]], ids=["folder", "files"])
def test_nobody_is_named_in_what_a_prediction_writes_and_says(
    tmp_path, monkeypatch, key_file, invoke, named
):
    monkeypatch.chdir(tmp_path)
    study = write_study(tmp_path / "study")
    made = invoke("extract", "study", "-o", "x.zarr", "--levels", "fpn_72", *EXTRACT[2:])
    assert made.exit_code == 3, made.output
    write_run(levels_of(open_store(tmp_path / "x.zarr")), tmp_path / "run", "linear")
    options = (
        "--store",
        "x.zarr",
        "-o",
        "out",
        "--coco",
        "out/coco.json",
        "--overlay",
        "--device",
        "cpu",
    )
    result = invoke("predict", "run", *named, *options)
    assert result.exit_code == 3, result.output
    shown = invoke("predict", "run", *named, *options, "--overwrite", "--json")
    written = [result.output.encode(), shown.output.encode()]
    written += everything_written(tmp_path / "out", but=study)
    for text in written:
        for name in PLANTED:
            assert name.lower().encode() not in text.lower()
    found = find_images(named).samples
    assert [sample.primary_angle_deg for sample in found].count(30) >= 2
    given = find_images(named, primary_angle_deg=-5).samples
    assert {sample.primary_angle_deg for sample in given} == {-5}


def test_nobody_is_named_by_a_check_of_a_manifest_that_bears_the_name(
    tmp_path, monkeypatch, key_file, invoke
):
    monkeypatch.chdir(tmp_path)
    study = write_study(tmp_path / "Zwartebroek-Maximiliaan")
    result = invoke("check", "Zwartebroek-Maximiliaan", "-o", "out")
    shown = invoke("check", "Zwartebroek-Maximiliaan", "--json")
    assert "\nmanifest: 5 samples" in result.output
    written = [text.encode() for text in (result.output, shown.output)]
    written += everything_written(tmp_path / "out", but=study)
    for text in written:
        for name in PLANTED:
            assert name.lower().encode() not in text.lower()


def test_names_inside_a_container_stay_there_where_paths_are_hidden(tmp_path):
    from sam3cache.errors import ImageError
    from sam3cache.images import probe

    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["Zwartebroek^Maximiliaan/image"] = np.zeros((8, 8), np.uint8)
    np.savez(tmp_path / "x.npz", **{"Zwartebroek^Maximiliaan": np.zeros((8, 8), np.uint8)})
    np.save(tmp_path / "a.npy", np.zeros((8, 8), np.uint8))
    lines = ["image", "x.h5::Quackenbush", "x.npz::Quackenbush", "a.npy::Quackenbush"]
    (tmp_path / "m.csv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "c.toml").write_text("hash_paths = true\n", encoding="utf-8")
    for sample in read_manifest(tmp_path / "m.csv", tmp_path / "c.toml").samples:
        with pytest.raises(ImageError, match=r"no such|no parts") as caught:
            probe(sample)
        assert not any(name in str(caught.value) for name in PLANTED)


@pytest.mark.parametrize("text", ["a\udcff", "\udcff\ud800"])
def test_a_name_that_is_no_unicode_has_a_pseudonym(text):
    assert len(pseudonym(text)) == 12
    assert len(Key(b"k" * 32, Path("k")).pseudonym(text)) == 16


def test_without_a_home_for_the_key_one_line_says_so(tmp_path, monkeypatch, invoke):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / "file" / "names.key"))
    write_dicom(tmp_path / "a.dcm", angiogram(1, 16, 8)[0])
    result = invoke("extract", tmp_path / "a.dcm", "-o", tmp_path / "x.zarr", *EXTRACT)
    assert result.exit_code == 1
    assert KEY_FILE_VARIABLE in result.stderr


def test_strict_stops_at_the_first_line_that_cannot_be_used(tmp_path, monkeypatch, invoke):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.zeros((8, 8), np.uint8))
    Path("m.csv").write_text(
        "id,image,primary_angle\na,a.npy,1\nb,gone.npy,1\nc,a.npy,north\nd,a.npy,\n",
        encoding="utf-8",
    )
    result = invoke("extract", "m.csv", "-o", "x.zarr", "--strict", *EXTRACT)
    assert result.exit_code == 1
    error = result.stderr.strip().splitlines()[-1]
    assert "line 3: sample 'b' cannot be used: gone.npy: no such file" in error
    assert "2 in all" in error
    assert not Path("x.zarr").exists()


# A manifest's cells, one a row: what they are, and what then becomes of the row.
ODD_CELLS = [
    ("../a.npy", "used"),
    ("./sub/../a.npy", "used"),
    ("sub\\b c.npy", "used"),
    ("sub/ünïcode.npy", "used"),
    ("link.npy", "used"),
    ("dangling.npy", "no such file"),
    ("loop.npy", "symbolic links"),
    ("C:\\data\\a.npy", "no such file"),
    ("\\\\server\\share\\a.npy", "no such file"),
    ("sub", "is a folder"),
    ("a.npy::x", "no such file"),
    ("a.npy::contrast", "used"),
    ("con\x00trol.npy", "damaged"),
    ("n" * 300 + ".npy", "damaged"),
]


@pytest.mark.parametrize(("cell", "outcome"), ODD_CELLS, ids=[repr(c[:20]) for c, _ in ODD_CELLS])
def test_an_odd_path_is_used_or_told_in_one_line(tmp_path, cell, outcome):
    from sam3cache.errors import ImageError, ManifestError
    from sam3cache.images import probe

    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    for path in ("a.npy", "data/a.npy", "data/sub/b c.npy", "data/sub/ünïcode.npy"):
        np.save(tmp_path / path, np.zeros((8, 8), np.uint8))
    try:
        (root / "link.npy").symlink_to(root / "a.npy")
        (root / "dangling.npy").symlink_to(root / "nowhere.npy")
        (root / "loop.npy").symlink_to(root / "loop.npy")
    except OSError:
        pytest.skip("this user may not make links")
    (root / "m.csv").write_text(f"image\n{cell}\n", encoding="utf-8")
    said = "used"
    try:
        (sample,) = read_manifest(root / "m.csv").samples
        probe(sample)
    except (ImageError, ManifestError) as error:
        said = str(error)
    assert outcome in said
    assert "\n" not in said
