import json
import os
import re
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3cache.errors import ManifestError
from sam3cache.images import read_manifest
from sam3cache.images.columns import names_a_person
from sam3cache.records import Sample, SetAside

COLUMNS = "id,image,mask,frame,primary_angle,secondary_angle,split,group\n"


def write(root: Path, text: str, columns: str | None = None, *, encoding="utf-8", newline="\n"):
    """Write manifest.csv (and columns.toml), and return the arguments to read it with."""
    (root / "manifest.csv").write_text(text, encoding=encoding, newline=newline)
    if columns is None:
        return root / "manifest.csv", None
    (root / "columns.toml").write_text(columns, encoding="utf-8")
    return root / "manifest.csv", root / "columns.toml"


def read(root: Path, text: str, columns: str | None = None, *, seed=0, **options):
    return read_manifest(*write(root, text, columns, **options), seed=seed)


def picture(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)


# CSV ------------------------------------------------------------------------------------------


def test_columns_named_like_our_fields_are_used_directly(tmp_path):
    manifest = read(
        tmp_path,
        COLUMNS.replace("\n", ",vendor\n") + "a,i/a.npy,m/a.png,3,-30.5,25,val,p1,Acme\n",
    )
    assert manifest.samples == (
        Sample(
            id="a",
            source="i/a.npy",
            root=tmp_path,
            frame=3,
            mask="m/a.png",
            primary_angle_deg=-30.5,
            secondary_angle_deg=25.0,
            split="val",
            group="p1",
            extra={"vendor": "Acme"},
        ),
    )
    assert manifest.split_rule == "column 'split'"
    assert manifest.set_aside == manifest.leaks == ()


def test_all_but_the_image_is_optional(tmp_path):
    (sample,) = read(tmp_path, "image\nscans/a.b.png\n").samples
    assert (sample.id, sample.source, sample.group) == (
        "scans/a.b",
        "scans/a.b.png",
        "scans/a.b.png",
    )
    assert sample.mask is sample.frame is sample.primary_angle_deg is None
    assert sample.mask_path is None


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("image,split\na.png,train\nb.png,test\n", {}),
        ("image,split\na.png,train\nb.png,test\n", {"encoding": "utf-8-sig"}),
        ("image,split\na.png,train\nb.png,test\n", {"newline": "\r\n"}),
        ("image;split\na.png;train\nb.png;test\n", {}),
        ("image\tsplit\na.png\ttrain\nb.png\ttest\n", {}),
        ("image,split\na.png,train\n\nb.png,test\n,\n , \n\n", {}),
        ("image , split\n a.png , train\nb.png,test", {}),
        (",image,split\n0,a.png,train\n1,b.png,test\n", {}),
        ('"image","split"\n"a.png","Training"\n"b.png","TEST"\n', {}),
        ("image,split,\na.png,train,\nb.png,test,,\n", {}),
    ],
)
def test_dialects_of_csv(tmp_path, text, options):
    samples = read(tmp_path, text, **options).samples
    assert [(s.id, s.split) for s in samples] == [("a", "train"), ("b", "test")]
    assert {frozenset(s.extra) for s in samples} == {frozenset()}


@pytest.mark.parametrize(
    ("cell", "source"),
    [
        (r"cines\p1\a.npy", "cines/p1/a.npy"),
        (r"cines\p1/a.npy", "cines/p1/a.npy"),
        ("scans with spaces/é.npy", "scans with spaces/é.npy"),
    ],
)
def test_relative_paths_have_forward_slashes_on_every_system(tmp_path, cell, source):
    (sample,) = read(tmp_path, f"image,mask\n{cell},{cell}\n").samples
    assert (sample.source, sample.mask) == (source, source)
    assert sample.image_path == sample.mask_path == tmp_path / source


def test_an_absolute_path_inside_the_manifests_folder_becomes_relative(tmp_path):
    path = tmp_path / "cines" / "a.npy"
    (sample,) = read(tmp_path, f"image,mask\n{path},{path}\n").samples
    assert (sample.source, sample.mask) == ("cines/a.npy", "cines/a.npy")
    assert sample.image_path == sample.mask_path == path


def test_an_absolute_path_outside_keeps_a_name_and_a_hash_and_is_still_found(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "here").mkdir()
    path = tmp_path / "data" / "a.png"
    picture(path)
    (sample,) = read(tmp_path / "here", f"image,mask,note\n{path},{path},{path}\n").samples
    assert sample.image_path == sample.mask_path == path
    kept = [sample.id, sample.source, sample.mask, sample.group, *sample.extra.values()]
    assert not any(str(tmp_path) in text or "/" in text or "\\" in text for text in kept)
    assert sample.source.startswith("a-")
    assert sample.source.endswith(".png")


@pytest.mark.parametrize(
    "cell",
    [
        "./i/a.npy",
        "i//a.npy",
        "i/./a.npy",
        ".\\i\\a.npy",
        "i/a.npy/",
        "x/../i/a.npy",
        "../here/i/a.npy",
    ],
)
def test_a_path_is_called_the_same_however_it_is_spelt(tmp_path, cell):
    root = tmp_path / "here"
    for folder in ("x", "i"):
        (root / folder).mkdir(parents=True)
    np.save(root / "i" / "a.npy", np.zeros((4, 4), np.uint8))
    for text in (cell, root / cell.replace("\\", "/")):
        (sample,) = read(root, f"image,mask\n{text},{text}\n").samples
        assert (sample.id, sample.source, sample.group) == ("i/a", "i/a.npy", "i/a.npy")
        assert sample.mask == "i/a.npy"
        assert sample.image_path.is_file()
        assert sample.mask_path.is_file()


@pytest.mark.parametrize("cell", ["a.h5::p//x/../y", "file:///a.png", ".a.npy", "a..b/x.npy"])
def test_what_is_meant_inside_a_file_is_no_path_nor_is_an_address(tmp_path, cell):
    assert read(tmp_path, f"image\n{cell}\n").samples[0].source == cell


@pytest.mark.parametrize(
    "cell", ["../DOE_JOHN/a.png", "..\\DOE_JOHN\\a.png", "x/../../DOE_JOHN/./a.png"]
)
def test_a_relative_path_that_leads_outside_keeps_a_name_and_a_hash_and_is_still_found(
    tmp_path, cell
):
    names = set()
    for place in ("one", "two"):
        root = tmp_path / place / "here"
        (root / "x").mkdir(parents=True)
        picture(root.parent / "DOE_JOHN" / "a.png")
        for columns in ("", "hash_paths = true"):
            (sample,) = read(root, f"image,mask\n{cell},{cell}\n", columns).samples
            kept = [sample.id, sample.source, sample.mask, sample.group]
            assert not any("DOE" in text or "/" in text for text in kept)
            assert sample.image_path.is_file()
            assert sample.mask_path.is_file()
            names.add(sample.source)
    # The same wherever both folders lie together.
    plain, hashed_name = sorted(names, key=len)
    assert re.fullmatch(r"a-[0-9a-f]{8}\.png", plain)
    assert HASHED.fullmatch(hashed_name)


def test_a_detour_through_a_link_leads_where_the_system_says(tmp_path):
    root, elsewhere = tmp_path / "here", tmp_path / "elsewhere" / "deep"
    root.mkdir()
    elsewhere.mkdir(parents=True)
    picture(elsewhere.parent / "a.png")
    try:
        (root / "link").symlink_to(elsewhere, target_is_directory=True)
    except OSError:
        pytest.skip("this user may not make links")
    if sys.platform == "win32":
        pytest.skip("there, the system itself drops the detour")
    (sample,) = read(root, "image\nlink/../a.png\n").samples
    assert sample.image_path.samefile(elsewhere.parent / "a.png")


def test_the_manifests_own_folder_is_no_image_and_no_traceback(tmp_path):
    root = tmp_path / "here"
    root.mkdir()
    for cell in (root, "../here", "sub/..", "."):
        manifest = read(root, f"id,image\nx,{cell}\ny,a.npy\n")
        names = [sample.source for sample in manifest.samples]
        assert len(names) + len(manifest.set_aside) == 2
        assert names[-1] == "a.npy"


@pytest.mark.parametrize("columns", ["", "hash_paths = true"])
def test_rows_of_one_cine_are_one_group_whatever_frame_and_spelling(tmp_path, columns):
    rows = ["1,a.npy,contrast", "2,a.npy,1", "3,./a.npy,2", "4,a.npy::contrast,", "5,x/../a.npy,3"]
    samples = read(tmp_path, "id,image,frame\n" + "\n".join(rows), columns).samples
    assert len({sample.group for sample in samples}) == 1
    assert len({sample.split for sample in samples}) == 1
    assert {sample.source.partition("::")[0] for sample in samples} == {samples[0].group}
    assert [sample.image_member for sample in samples] == ["contrast", "", "", "contrast", ""]
    assert [sample.frame for sample in samples] == [None, 1, 2, None, 3]


@pytest.mark.skipif(sys.platform == "win32", reason="there, these are the machine's own paths")
def test_paths_of_a_windows_machine_do_not_enter_elsewhere_either(tmp_path):
    text = "image,note\n" + "D:\\Data\\Doe\\a.npy,\\\\server\\Doe\\x\nD:/Data/Doe/b.npy,ok\n"
    samples = read(tmp_path, text).samples
    kept = " ".join([s.id + s.source + s.group + "".join(s.extra.values()) for s in samples])
    assert "Doe" not in kept
    assert samples[0].source.startswith("a-")
    assert samples[1].extra == {"note": "ok"}


def test_files_of_one_name_in_two_outer_folders_stay_apart(tmp_path):
    outer = [tmp_path / "x" / "a.png", tmp_path / "y" / "a.png"]
    (tmp_path / "here").mkdir()
    samples = read(tmp_path / "here", f"image\n{outer[0]}\n{outer[1]}\n").samples
    assert len({s.source for s in samples}) == len({s.id for s in samples}) == 2


def test_columns_that_name_a_person_are_not_kept_unless_asked_for(tmp_path):
    text = "image,patient_id,PatientName,mrn,vessel_name\na.png,7,Doe,9,LAD\n"
    (sample,) = read(tmp_path, text).samples
    assert sample.extra == {"vessel_name": "LAD"}
    (sample,) = read(tmp_path, text, 'extra = ["patient_id"]').samples
    assert sample.extra == {"patient_id": "7"}


@pytest.mark.parametrize(
    ("columns", "is_kept"),
    [
        ("patient_id PatientName patient subjectID SUBJECT pat_name PAT_ID patid", False),
        ("StudyInstanceUID studyinstanceuid sop_instance_uid uid case_uid", False),
        ("accession_number AccessionNumber accession", False),
        ("study_date StudyDate studydate date date_of_birth exam-date datetime", False),
        ("name full_name LastName firstname surname physician_name OperatorsName", False),
        ("birthdate birth_year dob mrn MRN ssn pid email phone_number address", False),
        ("hospital_id HospitalNumber medical_record_number referring_physician", False),
        ("class_name vessel_name file_name dataset_name hospital_name fluid guid_wire", True),
        ("frame_rate frame_time update candidate subjective_quality pattern patch path", True),
        ("case_id study vendor hospital age sex n_frames birefringence space", True),
    ],
)
def test_names_of_columns_tell_whether_they_tell_who_somebody_is(columns, is_kept):
    for column in columns.split():
        assert names_a_person(column) != is_kept, column


def test_it_is_told_which_columns_are_left_out(tmp_path):
    text = "image,patient_id,vessel_name,StudyDate\na.png,7,LAD,19991231\n"
    (note,) = read(tmp_path, text).notes
    assert "patient_id, StudyDate" in note
    assert "vessel_name" not in note
    for columns in ('group = "patient_id"\nextra = ["StudyDate"]', "hash_paths = true"):
        assert read(tmp_path, text, columns).notes == ()


def test_a_group_from_a_patients_column_becomes_a_pseudonym(tmp_path):
    text = "image,patient_id,clinic\na.png,Doe,K1\nb.png,Doe,K1\nc.png,Roe,K2\n"
    groups = [s.group for s in read(tmp_path, text, 'group = "patient_id"').samples]
    assert groups[0] == groups[1] != groups[2]
    assert "Doe" not in groups[0]
    assert [s.group for s in read(tmp_path, text, 'group = "clinic"').samples] == ["K1", "K1", "K2"]
    as_is = read(tmp_path, text, 'group = { column = "patient_id", hash = false }')
    assert as_is.samples[0].group == "Doe"
    hashed = read(tmp_path, text, 'group = { column = "clinic", hash = true }')
    assert hashed.samples[0].group != "K1"


def test_ids_come_from_image_and_frame_and_then_from_the_mask(tmp_path):
    text = "image,frame,mask\nc.npy,3,m/lad.npy\nc.npy,4,m/lad.npy\nc.npy,3,m/rca.npy\n"
    assert [s.id for s in read(tmp_path, text).samples] == ["c#3", "c#4", "c#3@rca"]


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ("a,x.png,,,400,0,train,p", "primary angle 400 is outside [-180, 180]"),
        ("a,x.png,,,-180.5,0,train,p", "primary angle -180.5 is outside"),
        ("a,x.png,,,0,91,train,p", "secondary angle 91 is outside [-90, 90]"),
        ("a,x.png,,,inf,0,train,p", "outside"),
        ("a,x.png,,,LAO 30,0,train,p", "'LAO 30' is not a number"),
        ("a,x.png,,,0,n/a,train,p", "'n/a' is not a number"),
        ('a,x.png,,,"17,3",0,train,p', "'17,3' is not a number"),
        ("a,x.png,,-1,0,0,train,p", "frame '-1'"),
        ("a,x.png,,1.5,0,0,train,p", "frame '1.5'"),
        ("a,x.png,,last,0,0,train,p", "frame 'last'"),
        ("a,x.png,,inf,0,0,train,p", "frame 'inf'"),
        ("a,,,,0,0,train,p", "no image"),
    ],
)
def test_a_bad_row_is_set_aside_with_its_reason(tmp_path, cells, words):
    manifest = read(tmp_path, COLUMNS + cells + "\ngood,y.png,,,,,train,p\n")
    assert [s.id for s in manifest.samples] == ["good"]
    (bad,) = manifest.set_aside
    assert bad.id == "a"
    assert bad.source == ("x.png" if "x.png" in cells else "")
    assert words in bad.reason
    assert "\n" not in bad.reason


@pytest.mark.parametrize("angle", ["180", "-180", "0", "1e1", " 17.3 "])
def test_angles_up_to_the_limits_are_taken(tmp_path, angle):
    (sample,) = read(tmp_path, f"image,primary_angle\na.png,{angle}\n").samples
    assert sample.primary_angle_deg == float(angle)


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "NAN"])
def test_an_angle_that_is_nan_is_unknown_as_an_empty_one(tmp_path, cell):
    (sample,) = read(tmp_path, f"image,primary_angle\na.png,{cell}\n").samples
    assert sample.primary_angle_deg is None


def test_a_row_without_an_id_that_is_set_aside_is_named_by_its_line(tmp_path):
    manifest = read(tmp_path, "image,frame\na.png,x\nb.png,\n")
    assert manifest.set_aside[0].id == "line 2"


# columns.toml ---------------------------------------------------------------------------------


def test_a_value_comes_from_a_column_a_constant_or_a_json_file(tmp_path):
    (tmp_path / "a.json").write_text('{"view": {"primary": -12.5}}', encoding="utf-8-sig")
    (sample,) = read(
        tmp_path,
        "cine,t,info,set\na.npy,12.0,.\\a.json,tuning\n",
        """
        image = "cine"
        frame = { column = "t" }
        split = { column = "set", values = { tuning = "val" } }
        group = { constant = "phantom" }
        secondary_angle = { constant = 30 }
        primary_angle = { json = "info", key = "view.primary" }
        """,
    ).samples
    assert (sample.frame, sample.split, sample.group) == (12, "val", "phantom")
    assert (sample.primary_angle_deg, sample.secondary_angle_deg) == (-12.5, 30.0)
    assert sample.extra == {}


def test_a_columns_file_overrides_and_else_our_names_hold(tmp_path):
    text = "image,cine,split,id\nthumb.png,a.npy,test,same\nthumb.png,b.npy,test,same\n"
    samples = read(tmp_path, text, 'image = "cine"\nid = { constant = "" }').samples
    assert [(s.id, s.source, s.split) for s in samples] == [
        ("a", "a.npy", "test"),
        ("b", "b.npy", "test"),
    ]


def test_a_constant_split_says_so(tmp_path):
    manifest = read(tmp_path, "image\na.png\n", 'split = { constant = "training" }')
    assert manifest.samples[0].split == "train"
    assert "constant" in manifest.split_rule


@pytest.mark.parametrize(
    ("document", "cell", "words"),
    [
        ('{"view": {"primary": null}}', "a.json", None),
        ('{"view": {"primary": 5}}', "", None),
        ('{"view": {}}', "a.json", "no key 'view.primary'"),
        ('{"view": [1, 2]}', "a.json", "no key 'view.primary'"),
        ("[]", "a.json", "no key"),
        ('{"view": ', "a.json", "not JSON"),
        ("", "a.json", "not JSON"),
        ("[" * 100_000, "a.json", "not JSON"),
        ('{"view": {"primary": "steep"}}', "a.json", "'steep' is not a number"),
        ('{"view": {"primary": true}}', "a.json", "'True' is not a number"),
        ('{"view": {"primary": 400}}', "a.json", "outside"),
        ('{"view": {"primary": [5]}}', "a.json", "'view.primary' is a list"),
        ('{"view": {"primary": {"name": "Doe"}}}', "a.json", "'view.primary' is an object"),
        ("{}", "absent.json", "absent.json"),
        ("{}", ".", ".: "),
    ],
)
def test_angles_of_json_files_are_checked(tmp_path, document, cell, words):
    (tmp_path / "a.json").write_text(document, encoding="utf-8")
    manifest = read(
        tmp_path,
        f"id,image,info\nx,a.npy,{cell}\ny,b.npy,\n",
        'primary_angle = { json = "info", key = "view.primary" }',
    )
    if words is None:
        assert [s.primary_angle_deg for s in manifest.samples] == [None, None]
    else:
        (bad,) = manifest.set_aside
        assert bad.id == "x"
        assert words in bad.reason
        assert str(tmp_path) not in bad.reason
        assert "\n" not in bad.reason


def test_of_large_json_files_only_the_values_asked_for_stay_in_memory(tmp_path):
    rows = []
    for n in range(20):
        contours = {"view": {"primary": n}, "points": [i + 0.5 for i in range(10_000)]}
        (tmp_path / f"{n}.json").write_text(json.dumps(contours), encoding="utf-8")
        rows += [f"{n}.npy,{frame},{n}.json" for frame in range(2)]
    paths = write(
        tmp_path,
        "image,frame,info\n" + "\n".join(rows) + "\n",
        'primary_angle = { json = "info", key = "view.primary" }',
    )
    tracemalloc.start()
    try:
        manifest = read_manifest(*paths)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [s.primary_angle_deg for s in manifest.samples] == [n // 2 for n in range(40)]
    assert peak_bytes < 2e6  # one file takes 0.5 MB, all of them 7 MB


# hash_paths -----------------------------------------------------------------------------------

HASHED = re.compile(r"[0-9a-f]{16}\.png")


def hashed(root: Path, text: str, columns: str = ""):
    return read(root, text, "hash_paths = true\n" + columns)


def test_hashed_paths_name_nobody_and_still_lead_to_the_files(tmp_path):
    (tmp_path / "here").mkdir()
    outside = tmp_path / "DOE_JOHN" / "b.png"
    for path in [outside, *(tmp_path / "here" / f / "DOE_JOHN" / "a.png" for f in "im")]:
        picture(path)
    text = "image,mask,frame,file\n" + "".join(
        f"{image},m\\DOE_JOHN\\a.png,{frame},DOE_JOHN\n"
        for image, frame in [("i/DOE_JOHN/a.png", ""), ("i/DOE_JOHN/a.png", 3), (outside, "")]
    )
    samples = hashed(tmp_path / "here", text).samples
    for s in samples:
        assert HASHED.fullmatch(s.source)
        assert HASHED.fullmatch(s.mask)
        assert s.image_path.is_file()
        assert s.mask_path == tmp_path / "here" / "m" / "DOE_JOHN" / "a.png"
        kept = [s.id, s.source, s.mask, s.group, *s.extra.values()]
        assert "DOE" not in " ".join(kept)
    assert samples[0].source == samples[1].source != samples[2].source
    assert samples[1].id == samples[0].id + "#3"


def test_a_hashed_path_is_the_same_however_it_is_written_and_wherever_the_folder_lies(tmp_path):
    sources = set()
    for root in (tmp_path / "one", tmp_path / "two"):
        root.mkdir()
        for cell in (
            "i/a.png", "i\\a.png", "./i/a.png", "x/../i/a.png", "i//a.png",
            root / "i" / "a.png", root / "x" / ".." / "i" / "a.png",
        ):  # fmt: skip
            sources.add(hashed(root, f"image\n{cell}\n").samples[0].source)
    assert len(sources) == 1


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.PNG", ".PNG"), ("a.npy", ".npy"), ("DOE.JOHN", ""), ("scan", ""), ("a.JOHN.tif", ".tif")],
)
def test_of_a_hashed_path_only_a_pictures_suffix_is_kept(tmp_path, name, suffix):
    (sample,) = hashed(tmp_path, f"image\n{name}\n").samples
    assert sample.source[16:] == suffix


def test_with_hashed_paths_other_columns_are_kept_only_where_asked_for(tmp_path):
    text = "image,pseudo_label,phase,raw\na.png,p/DOE/a.png,late,/data/DOE/a.npy\n"
    assert hashed(tmp_path, text).samples[0].extra == {}
    (sample,) = hashed(tmp_path, text, 'extra = ["phase", "raw"]').samples
    assert sample.extra["phase"] == "late"
    assert re.fullmatch(r"[0-9a-f]{16}\.npy", sample.extra["raw"])


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ("DOE/a.png,,1.5,", "frame '1.5'"),
        ("DOE/a.png,,,DOE/absent.json", ".json: "),
        ("DOE/a.png,,,DOE/broken.json", "not JSON"),
        ("DOE/a.png,,,DOE/empty.json", "no key 'angle'"),
    ],
)
def test_with_hashed_paths_a_row_set_aside_is_found_by_its_line(tmp_path, cells, words):
    (tmp_path / "DOE").mkdir()
    (tmp_path / "DOE" / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "DOE" / "empty.json").write_text("{}", encoding="utf-8")
    (bad,) = hashed(
        tmp_path,
        f"image,mask,frame,info\ngood.png,,,\n{cells}\n",
        'primary_angle = { json = "info", key = "angle" }',
    ).set_aside
    assert bad.reason.startswith("line 3: ")
    assert words in bad.reason
    assert HASHED.fullmatch(bad.source)
    assert "DOE" not in bad.id + bad.source + bad.reason


# Splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("train", "train"), ("Training", "train"), ("trn", "train"),
        ("val", "val"), ("VALIDATION", "val"), ("valid", "val"), ("dev", "val"),
        ("test", "test"), ("testing", "test"), ("holdout", "test"),
    ],
)  # fmt: skip
def test_common_names_of_splits_are_known(tmp_path, text, split):
    assert read(tmp_path, f"image,split\na.png,{text}\n").samples[0].split == split


def groups_of(num_groups, per_group=3):
    rows = [f"{g}_{i}.png,g{g}" for g in range(num_groups) for i in range(per_group)]
    return "image,group\n" + "\n".join(rows) + "\n"


def test_without_a_split_groups_are_split_70_15_15(tmp_path):
    manifest = read(tmp_path, groups_of(1000, per_group=2))
    by_group = {s.group: s.split for s in manifest.samples}
    assert all(by_group[s.group] == s.split for s in manifest.samples)
    counts = Counter(by_group.values())
    assert abs(counts["train"] - 700) < 60
    assert abs(counts["val"] - 150) < 50
    assert abs(counts["test"] - 150) < 50
    assert "seed 0" in manifest.split_rule
    assert manifest.leaks == ()


def test_new_samples_move_no_old_group_and_the_seed_does(tmp_path):
    small = read(tmp_path, groups_of(40)).samples
    large = {s.id: s.split for s in read(tmp_path, groups_of(80, per_group=5)).samples}
    assert all(large[s.id] == s.split for s in small)
    other = read(tmp_path, groups_of(40), seed=1).samples
    assert [s.split for s in other] != [s.split for s in small]


def test_a_column_of_empty_splits_is_no_split(tmp_path):
    assert "hash" in read(tmp_path, "image,split\na.png,\nb.png,\n").split_rule


def test_frames_of_one_cine_stay_in_one_split(tmp_path):
    rows = "".join(f"c{c}.npy,{t}\n" for c in range(30) for t in range(4))
    splits = {}
    for s in read(tmp_path, "image,frame\n" + rows).samples:
        assert splits.setdefault(s.source, s.split) == s.split
    assert len(set(splits.values())) > 1


def test_a_group_in_two_given_splits_is_kept_and_named(tmp_path):
    text = "image,group,split\na.png,p1,train\nb.png,p1,test\nc.png,p2,val\n"
    manifest = read(tmp_path, text)
    assert [s.split for s in manifest.samples] == ["train", "test", "val"]
    assert manifest.leaks == ("p1",)


# Manifests that stop everything ---------------------------------------------------------------

WRONG = {
    "empty file": ("", None, ["no rows"]),
    "header only": ("image,mask\n", None, ["no rows"]),
    "blank rows only": ("image,mask\n,\n\n , \n", None, ["no rows"]),
    "no image column": ("path,mask\na,b\n", None, ["'image'", "path, mask", "--columns"]),
    "no row has an image": ("image,mask\n,b\n,c\n", None, ["none of 2 lines", "no image"]),
    "duplicated ids": ("id,image\nx,a\ny,b\nx,c\n", None, ["'x'", "lines 2 and 4"]),
    "the same sample twice": ("image,mask\na,m\na,m\na,m\n", None, ["lines", "'a@m'"]),
    "duplicated columns": ("image,image\na,b\n", None, ["two columns", "'image'"]),
    "too many cells": ("image,mask\na,b,c\n", None, ["line 2", "3 cells"]),
    "unknown split": ("image,split\na,train\nb,traim\n", None, ["'traim'", "'b'", "train, val"]),
    "a gap in the splits": ("image,split\na,train\nb,\n", None, ["''", "every row"]),
    "mapped column missing": ("cine\na\n", 'image = "cines"', ["'cines'", "has cine"]),
    "json column missing": (
        "image\na\n",
        'primary_angle = { json = "info", key = "a" }',
        ["'info'", "has image"],
    ),
    "extra column missing": ("image\na\n", 'extra = ["phase"]', ["'phase'", "has image"]),
    "image not mapped": ("cine\na\n", 'mask = "cine"', ["'image'", "cine"]),
    "unknown field": ("image\na\n", 'angle = "a"', ["unknown field 'angle'", "primary_angle"]),
    "unknown key": ("image\na\n", 'mask = { colunm = "a" }', ["'colunm'", "column"]),
    "json without key": ("image\na\n", 'mask = { json = "image" }', ["mask", "key"]),
    "key without json": ("image\na\n", 'mask = { column = "image", key = "a" }', ["mask", "json"]),
    "two sources": ("image\na\n", 'mask = { column = "image", constant = "a" }', ["mask"]),
    "no source": ("image\na\n", "mask = {}", ["mask", "(none)"]),
    "a number": ("image\na\n", "mask = 3", ["mask = 3"]),
    "a column that is a number": ("image\na\n", "mask = { column = 3 }", ["wrong type"]),
    "a constant that is a list": ("image\na\n", "mask = { constant = [1] }", ["wrong type"]),
    "values that are a list": (
        "image\na\n",
        'mask = { column = "image", values = ["a"] }',
        ["wrong type"],
    ),
    "a hash that is a text": (
        "image\na\n",
        'group = { column = "image", hash = "yes" }',
        ["wrong type"],
    ),
    "extra that is a text": ("image\na\n", 'extra = "phase"', ["extra", "list"]),
    "a hash_paths that is a text": ("image\na\n", 'hash_paths = "yes"', ["hash_paths", "true or"]),
    "not toml": ("image\na\n", "image: cine", ["not TOML"]),
    "toml twice": ("image\na\n", 'image = "image"\nimage = "image"', ["not TOML"]),
}


def check_message(error: ManifestError, words, root: Path):
    assert "\n" not in str(error)
    assert all(word in str(error) for word in words), str(error)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_manifest_stops_before_anything_starts(tmp_path, case):
    text, columns, words = WRONG[case]
    with pytest.raises(ManifestError) as caught:
        read(tmp_path, text, columns)
    check_message(caught.value, words, tmp_path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("image\nä.png\n".encode("latin-1"), ["UTF-8"]),
        ("image\na.png\n".encode("utf-16"), ["UTF-8"]),
        (b"\x89PNG\r\n\x1a\n\x00\x00", ["UTF-8"]),
        (b'image\n"' + b"a" * 200_000 + b'"\n', ["line 2", "not CSV"]),
    ],
)
def test_what_is_no_csv_is_refused(tmp_path, data, words):
    (tmp_path / "m.csv").write_bytes(data)
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path / "m.csv")
    check_message(caught.value, words, tmp_path)


def test_a_manifest_or_a_columns_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ManifestError, match="no such file or folder"):
        read_manifest(tmp_path / "absent.csv")
    write(tmp_path, "image\na.png\n")
    with pytest.raises(ManifestError, match=r"absent\.toml"):
        read_manifest(tmp_path / "manifest.csv", tmp_path / "absent.toml")


# Folders --------------------------------------------------------------------------------------


def test_a_folder_matches_images_and_masks_by_stem(tmp_path):
    for name in ["images/a.png", "images/b.JPG", "images/sub/a.tif", "images/notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"not opened here")
    for name in ["masks/a.npy", "masks/sub/a.png", "masks/.hidden.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"not opened here")
    manifest = read_manifest(tmp_path)
    assert [(s.id, s.source, s.mask) for s in manifest.samples] == [
        ("a", "images/a.png", "masks/a.npy"),
        ("b", "images/b.JPG", None),
        ("sub/a", "images/sub/a.tif", "masks/sub/a.png"),
    ]
    assert [s.group for s in manifest.samples] == [s.source for s in manifest.samples]
    assert manifest.set_aside == ()


def test_a_folder_of_pictures_alone_is_a_manifest(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "results" / "b.png")
    assert [s.source for s in read_manifest(tmp_path).samples] == ["a.png"]


def test_a_folders_manifest_speaks_for_it(tmp_path):
    for name in ["images/a.png", "images/stray.png", "masks/a.png"]:
        picture(tmp_path / name)
    write(tmp_path, "picture,note\nimages/a.png,of the CSV\n", 'image = "picture"')
    (sample,) = read_manifest(tmp_path, tmp_path / "columns.toml").samples
    assert (sample.source, sample.mask, sample.extra) == (
        "images/a.png",
        None,
        {"note": "of the CSV"},
    )
    assert sample.root == tmp_path
    assert sample.image_path.is_file()
    with pytest.raises(ManifestError, match=r"manifest\.csv: no column 'image'"):
        read_manifest(tmp_path)


def test_a_mask_without_an_image_is_listed(tmp_path):
    for name in ["images/a.png", "masks/a.png", "masks/b.png"]:
        picture(tmp_path / name)
    manifest = read_manifest(tmp_path)
    assert manifest.set_aside == (
        SetAside(
            "masks/b.png",
            "masks/b.png",
            "mask without an image of its stem; rename it or remove it",
        ),
    )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], ["no pictures", "images"]),
        (["images/a.txt"], ["no pictures"]),
        (["a.csv"], ["did you mean", "a.csv"]),
        (["masks/a.png"], ["no pictures"]),
        (["images/a.png", "images/a.jpg"], ["a.jpg", "a.png", "one stem"]),
        (["images/a.png", "masks/a.png", "masks/a.npy"], ["masks/a.npy", "both masks"]),
        (["images/a.png", "masks/a_mask.png"], ["no mask matches", "a_mask.png"]),
    ],
)
def test_a_wrong_folder_stops_before_anything_starts(tmp_path, names, words):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path)
    check_message(caught.value, words, tmp_path)


def test_a_columns_file_for_a_folder_is_refused(tmp_path):
    picture(tmp_path / "images" / "a.png")
    with pytest.raises(ManifestError, match="folder"):
        read_manifest(tmp_path, tmp_path / "columns.toml")


def test_paths_may_be_relative_to_the_working_directory(tmp_path, monkeypatch):
    picture(tmp_path / "data" / "images" / "a.png")
    write(tmp_path / "data", "image\nimages/a.png\n")
    monkeypatch.chdir(tmp_path)
    for path in (Path("data"), Path("data") / "manifest.csv"):
        (sample,) = read_manifest(path).samples
        os.chdir(tmp_path.parent)  # what a worker's working directory is does not matter
        assert sample.image_path.is_file()
        os.chdir(tmp_path)


def test_a_sample_travels_to_another_process(tmp_path):
    import pickle

    samples = read(tmp_path, "image,phase\na.png,late\n").samples
    assert pickle.loads(pickle.dumps(samples)) == samples
    assert json.dumps(dict(samples[0].extra)) == '{"phase": "late"}'
