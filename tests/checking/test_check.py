"""Every defect is found in real files, told in one line, and shown on the page."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from dicom_files import write_dicom
from PIL import Image

from sam3cache.checking import PAGE_FILE, CheckConfig, check
from sam3cache.errors import ConfigError
from sam3cache.images import parse_classes

SIDE_PX = 128
NUM_SAMPLES = 24
SPLITS = ("train", "train", "val", "test")
HEADER = ("id", "image", "mask", "primary_angle", "secondary_angle", "split", "group", "segment")


def lines(seed, width_px=3):
    """Some crossing lines, as a mask of 0 and 255."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    at = np.arange(SIDE_PX)
    for slope, start in zip(rng.uniform(-0.6, 0.6, 4), rng.uniform(30, 98, 4), strict=True):
        across = np.rint(start + slope * (at - SIDE_PX / 2) + 6 * np.sin(at / 9 + slope)).astype(
            int
        )
        for k in range(width_px):
            inside = (across + k >= 0) & (across + k < SIDE_PX)
            mask[across[inside] + k, at[inside]] = 255
    return mask


def picture(seed, mask):
    """A grey picture whose lines are dark, on a ground that shades off, with noise."""
    rng = np.random.default_rng(1000 + seed)
    ground = 150 + 40 * np.linspace(-1, 1, SIDE_PX)[:, None] * np.linspace(0, 1, SIDE_PX)
    noisy = ground - 45 * (mask > 0) + rng.normal(0, 8, mask.shape)
    return noisy.clip(0, 255).astype(np.uint8)


class Data:
    """A folder of pictures and masks with a manifest, good but for what a test does to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows = []
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True)
        for i in range(NUM_SAMPLES):
            mask = lines(i)
            Image.fromarray(picture(i, mask)).save(root / f"images/{i}.png")
            Image.fromarray(mask).save(root / f"masks/{i}.png")
            values = (f"s{i}", f"images/{i}.png", f"masks/{i}.png", 7 * i - 80, 40 - 3 * i)
            names = (SPLITS[i % 4], f"p{i}", ("LAD", "RCA")[i // 4 % 2])
            self.rows.append(dict(zip(HEADER, (*values, *names), strict=True)))

    def save(self, kind, number, pixels):
        """Write the picture or the mask of a sample."""
        Image.fromarray(np.asarray(pixels)).save(self.root / f"{kind}/{number}.png")

    def mask(self, number):
        return np.asarray(Image.open(self.root / f"masks/{number}.png"))

    def image(self, number):
        return np.asarray(Image.open(self.root / f"images/{number}.png"))

    def write(self, header=HEADER):
        with (self.root / "angio.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, header, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        return self.root / "angio.csv"


@pytest.fixture
def data(tmp_path):
    return Data(tmp_path / "data")


def shift_mask(data, number=3, by=6):
    data.save("masks", number, np.roll(data.mask(number), by, axis=0))


def shift_all(data):
    for i in range(NUM_SAMPLES):
        data.save("masks", i, np.roll(data.mask(i), -1, axis=1))


def set_all(**values):
    def change(data):
        for row in data.rows:
            row.update(values)

    return change


def set_one(number, **values):
    return lambda data: data.rows[number].update(values)


def drop_splits(*splits):
    def change(data):
        data.rows = [row for row in data.rows if row["split"] not in splits]

    return change


def nan_picture(data):
    np.save(data.root / "images/nan.npy", np.full((SIDE_PX, SIDE_PX), np.nan, np.float32))
    data.rows[2]["image"] = "images/nan.npy"


def deep_picture(data):
    data.save("images", 2, data.image(2).astype(np.uint16) * 16)


def small_val(data):
    for i, row in enumerate(data.rows):
        row["split"] = ("train", "val")[i % 2]
        if i % 2:
            data.save("images", i, data.image(i)[::2, ::2])


def zero_views(data):
    for row in data.rows[:12]:
        row.update(primary_angle=0, secondary_angle=0)


def radians(data):
    for i, row in enumerate(data.rows):
        row.update(primary_angle=0.1 * i - 1.2, secondary_angle=0.5 - 0.02 * i)


def copy_file(data, source, target):
    (data.root / f"images/{target}.png").write_bytes(
        (data.root / f"images/{source}.png").read_bytes()
    )


def turn_picture(data, i=3):
    exif = Image.Exif()
    exif[0x0112] = 3
    path = data.root / f"images/{i}.png"
    Image.open(path).save(path, exif=exif)


DEFECTS = [
    # what is done, kind, what the finding's line says
    (lambda d: (d.root / "images/3.png").unlink(), "unusable", "error: .*s3: .*no such file"),
    (
        lambda d: (d.root / "images/3.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40),
        "unusable",
        "error: cannot be used: s3: images/3.png: ",
    ),
    (nan_picture, "unusable", "s2: images/nan.npy: holds values that are not finite"),
    (
        lambda d: d.save("masks", 3, d.mask(3)[:100]),
        "unusable",
        "s3: masks/3.png: mask of 100 x 128 for an image of 128 x 128",
    ),
    (set_one(3, primary_angle=200), "unusable", "s3: primary angle 200 is outside"),
    (set_one(3, secondary_angle="much"), "unusable", "s3: secondary angle 'much'"),
    (set_one(3, group="p4"), "group-in-several-splits", "error: .*s3 and s4: group p4: train 1"),
    (
        lambda d: copy_file(d, 4, 6),
        "picture-in-several-splits",
        "error: one picture in several splits: s4 and s6: the same pixels in train 1, val 1",
    ),
    (
        lambda d: copy_file(d, 4, 5),
        "duplicate",
        "warning: .*s4 and s5: the same pixels in 2 places",
    ),
    (lambda d: d.save("masks", 3, 0 * d.mask(3)), "empty-mask", "warning: mask marks nothing: s3"),
    (lambda d: d.save("masks", 3, 0 * d.mask(3) + 9), "full-mask", "s3: 100.0% of it is marked"),
    (
        shift_mask,
        "shifted-mask",
        r"warning: .*s3: fits better 6 px up \(correlation 0\.\d\d, where",
    ),
    (
        lambda d: shift_mask(d, by=16),
        "shifted-mask",
        r"s3: fits better at least 16 px up, the edge of the search \(correlation",
    ),
    (shift_all, "all-masks-shifted", "2[0-4] masks fit best 1 px right, the median"),
    (set_one(3, mask=""), "missing-mask", "note: without a mask: s3: 1 of 24 samples"),
    (set_all(mask=""), "no-masks", "warning: no mask at all: 24 samples without a mask"),
    (
        lambda d: d.save("masks", 3, d.mask(3)[::2, ::2]),
        "mask-of-other-size",
        r"note: .*: s3: 64 x 64 for a picture of 128 x 128 \(1\)",
    ),
    (
        turn_picture,
        "orientation",
        r"warning: .*different orientation tags: s3: picture 3, mask 1 \(1 is not turned\)",
    ),
    (
        lambda d: d.save("images", 3, np.full((SIDE_PX, SIDE_PX), 77, np.uint8)),
        "constant-picture",
        "warning: picture of nothing: s3: all pixels within 1 grey level\\.",
    ),
    (deep_picture, "mixed-depths", r"warning: .*uint8 \(23\); s2: uint16 \(1\)"),
    (
        lambda d: d.save("images", 3, np.stack([d.image(3)] * 3, axis=-1)),
        "mixed-colours",
        r"note: grey and colour pictures \(2\): grey \(23\); s3: colour \(1\)",
    ),
    (small_val, "sizes-differ-by-split", "warning: .*100% of val would need .*64 px in val, 128"),
    (
        set_one(3, primary_angle=""),
        "missing-angles",
        "warning: .*s3: .* unknown in 1 of 24",
    ),
    (set_all(primary_angle="", secondary_angle=""), "missing-angles", "note: .*24 of 24 samples"),
    (set_all(primary_angle=30, secondary_angle=-20), "constant-angles", "30/-20 degrees in all 24"),
    (
        zero_views,
        "zero-angles",
        "warning: .*s0, s1, s2 and others: 0/0 degrees in 12 of 24",
    ),
    (radians, "angles-in-radians", "(?s)warning: .*none beyond 1.20 in 24 samples.*radians"),
    (
        drop_splits("val", "test"),
        "empty-split",
        r"warning: split without a sample \(2\): val; test",
    ),
    (set_all(split=""), "hashed-split", "note: .*70/15/15 by hash of the group, seed 0: train"),
]


@pytest.mark.parametrize(("defect", "kind", "line"), DEFECTS)
def test_a_defect_is_found_and_told_with_what_was_expected_and_what_to_do_below(
    data, defect, kind, line
):
    defect(data)
    result = check(CheckConfig(data.write()))
    (finding,) = [finding for finding in result.findings if finding.kind == kind]
    text = str(finding)
    assert re.search(line, text), text
    met, expected, advice = text.splitlines()
    assert re.fullmatch(r"    Expected: .+\.", expected)
    assert re.fullmatch(r"    What to do: .+\.", advice)
    assert met.endswith(".")


def test_good_data_has_nothing_to_mend(data):
    seen = []
    result = check(CheckConfig(data.write()), lambda *counts: seen.append(counts))
    assert result.findings == ()
    assert result.exit_code == 0
    assert seen == [(i, NUM_SAMPLES) for i in range(1, NUM_SAMPLES + 1)]
    assert result.splits["train"] == dict.fromkeys(result.splits["train"], 12)
    assert result.classes == {"foreground": {"train": 12, "val": 6, "test": 6}}
    assert sum(result.views.values()) == NUM_SAMPLES


def test_a_folder_is_said_to_have_neither_groups_nor_splits(data):
    kinds = [finding.kind for finding in check(CheckConfig(data.root, min_samples=0)).findings]
    assert kinds == ["missing-angles", "hashed-split", "no-groups"]


def write_stack(data):
    with h5py.File(data.root / "a.h5", "w") as file:
        file["images"] = np.stack([data.image(i) for i in range(4)])
    return data.root / "a.h5", "4 of 4 samples"


def write_dicoms(data):
    (data.root / "study").mkdir()
    for i, patient in enumerate(("P1", None, None)):
        tags = {"PatientID": patient, "StudyInstanceUID": None}
        write_dicom(data.root / f"study/{i}.dcm", data.image(i), **tags)
    return data.root / "study", "2 of 3 samples"


def write_csv_with_gaps(data):
    for row in data.rows[:5]:
        row["group"] = ""
    return data.write(), "5 of 24 samples"


@pytest.mark.parametrize("write", [write_stack, write_dicoms, write_csv_with_gaps])
def test_samples_without_a_group_are_counted_whatever_they_come_from(
    data, monkeypatch, tmp_path, write
):
    monkeypatch.setenv("SAM3CACHE_KEY_FILE", str(tmp_path / "names.key"))
    manifest, words = write(data)
    findings = {finding.kind: finding for finding in check(CheckConfig(manifest)).findings}
    (case,) = findings["no-groups"].cases
    assert case.value.startswith(words)


def test_a_container_of_hidden_names_shows_none(data, invoke, tmp_path):
    path, _ = write_stack(data)
    named = path.rename(data.root / f"{NAME}.h5")
    (tmp_path / "columns.toml").write_text("hash_paths = true", encoding="utf-8")
    out = tmp_path / "out"
    result = invoke("check", named, "--columns", tmp_path / "columns.toml", "-o", out)
    assert "4 of 4 samples" in result.output
    texts = [result.output, *(path.read_text(encoding="utf-8") for path in out.iterdir())]
    assert not any(re.search("doe.?john", text, re.IGNORECASE) for text in texts)


@pytest.mark.parametrize(("num", "expected"), [(6, []), (7, ["val", "test"])])
def test_classes_of_few_samples_are_told_by_split(data, num, expected):
    result = check(CheckConfig(data.write(), min_samples=num))
    cases = [case.value for finding in result.findings for case in finding.cases]
    assert cases == [f"foreground: 6 in {split}" for split in expected]


@pytest.mark.parametrize(
    ("classes", "mask_columns"),
    [("lad=1,rca=2", ("numbers",)), ("lad,rca", ("lad", "rca"))],
)
def test_classes_are_counted_from_numbers_and_from_planes(data, classes, mask_columns):
    for i, row in enumerate(data.rows):
        lad = data.mask(i) > 0
        rca = np.zeros_like(lad)
        rca[:, SIDE_PX // 2 :] = lad[:, SIDE_PX // 2 :] & (i % 4 == 2)  # in val alone
        lad &= ~rca
        for name, pixels in (("numbers", lad + 2 * rca), ("lad", lad), ("rca", rca)):
            (data.root / name).mkdir(exist_ok=True)
            data.save(name, i, pixels.astype(np.uint8))
            row[name] = f"{name}/{i}.png"
    manifest = data.write((*HEADER, "numbers", "lad", "rca"))
    config = CheckConfig(manifest, classes=parse_classes(classes), mask_columns=mask_columns)
    result = check(config)
    assert result.classes == {
        "lad": {"train": 12, "val": 6, "test": 6},
        "rca": {"train": 0, "val": 6, "test": 0},
    }
    (finding,) = result.findings
    assert [case.value for case in finding.cases] == ["rca: 0 in train", "rca: 0 in test"]
    with pytest.raises(ConfigError, match="3 columns of masks for the classes lad, rca"):
        replace(config, mask_columns=("a", "b", "c"))


def test_values_of_a_column_count_as_classes_do(data):
    data.rows[2]["segment"] = "LCX"
    config = CheckConfig(data.write(), by=("segment",), min_samples=1)
    (finding,) = check(config).findings
    assert [case.value for case in finding.cases] == [
        "segment LCX: 0 in train",
        "segment LCX: 0 in test",
    ]
    with pytest.raises(
        ConfigError, match=r"--by phase: no such column .*; expected one of segment"
    ):
        check(replace(config, by=("phase",)))


def test_leaks_are_only_warned_of_where_they_are_allowed(data):
    data.rows[3]["group"] = "p4"
    copy_file(data, 4, 6)
    for allow_leak, severity, exit_code in ((False, "error", 1), (True, "warning", 3)):
        result = check(CheckConfig(data.write(), allow_leak=allow_leak))
        assert [finding.severity for finding in result.findings] == [severity, severity]
        assert result.exit_code == exit_code


def test_rows_of_one_picture_are_no_duplicates(data):
    data.rows[5]["image"] = data.rows[4]["image"]
    assert check(CheckConfig(data.write())).findings == ()


def test_the_program_prints_lines_and_json_and_ends_by_severity(data, invoke, tmp_path):
    shift_mask(data)
    manifest = data.write()
    result = invoke("check", manifest, "-o", tmp_path / "out")
    assert result.exit_code == 3, result.output
    lines_of = result.stdout.splitlines()
    assert lines_of[0].startswith("angio.csv: 24 samples, 24 can be used (train 12, val 6, test 6)")
    assert lines_of[1].startswith("warning: mask fits better elsewhere: s3: ")
    assert lines_of[2:] == [
        "    Expected: the best fit where it lies.",
        "    What to do: look at the overlay on the page (-o FOLDER): the mask may be of another "
        "frame, cropped otherwise, or written with another origin.",
        "Found: 0 errors, 1 warning, 0 notes.",
        f"Look at it: {tmp_path / 'out' / PAGE_FILE}",
    ]
    printed = invoke("check", manifest, "--json")
    assert printed.exit_code == 3
    found = json.loads(printed.stdout)
    assert found["findings"][0]["cases"][0]["samples"] == ["s3"]
    written = json.loads((tmp_path / "out" / "check.json").read_text(encoding="utf-8"))
    assert written | {"elapsed_s": 0} == found | {"elapsed_s": 0}

    html = (tmp_path / "out" / PAGE_FILE).read_text(encoding="utf-8")
    assert "where it fits better" in html
    assert 'id="shifted-mask"' in html
    assert html.count('src="data:image/jpeg') == 1 + 18  # the overlay, and thumbnails
    assert not re.search(r"""(src|href)=["'](?!data:|#)|@import|<script|<link""", html)


def test_errors_end_with_1_and_a_wrong_command_with_2(data, invoke):
    (data.root / "images/3.png").unlink()
    assert invoke("check", data.write()).exit_code == 1
    nowhere = invoke("check", "nowhere.csv")
    assert nowhere.exit_code == 2
    assert "nowhere.csv: no such file or folder" in nowhere.stderr
    result = invoke("check", data.root / "angio.csv", "--by", "phase")
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1


def test_what_was_found_is_told_even_if_the_folder_cannot_be_written(data, invoke, tmp_path):
    shift_mask(data)
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    result = invoke("check", data.write(), "-o", tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "warning: mask fits better elsewhere: s3: " in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if "file" in line]
    assert str(tmp_path / "file") in line


NAME = "DOE_JOHN"


def test_no_name_gets_into_what_is_written_where_it_is_to_be_hashed(data, invoke, tmp_path):
    """Names in folders and groups, of files that are missing, damaged, twice, in two splits."""
    for i, row in enumerate(data.rows):
        folder = data.root / f"{NAME}_{i}"
        folder.mkdir()
        for field in ("image", "mask"):
            target = folder / f"{NAME}-{field}.png"
            (data.root / row[field]).rename(target)
            row[field] = target.relative_to(data.root).as_posix()
        row["id"] = ""
        row["patient_id"] = f"{NAME} {i // 3}"  # in several splits
    (data.root / data.rows[0]["image"]).write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    (data.root / data.rows[1]["image"]).unlink()
    np.save(data.root / f"{NAME}_2/{NAME}.npy", np.full((9, 9), np.nan))
    data.rows[2]["image"] = f"{NAME}_2/{NAME}.npy"
    (data.root / data.rows[4]["image"]).write_bytes(
        (data.root / data.rows[5]["image"]).read_bytes()
    )
    data.rows[6]["primary_angle"] = 400
    manifest = data.write((*HEADER, "patient_id"))
    (tmp_path / "columns.toml").write_text(
        'hash_paths = true\ngroup = "patient_id"\n', encoding="utf-8"
    )
    out = tmp_path / "out"
    result = invoke("check", manifest, "--columns", tmp_path / "columns.toml", "-o", out)
    assert result.exit_code == 1
    assert "in several splits" in result.stdout
    assert "line 2: " in result.stdout  # how to find what cannot be used
    assert "line 8: primary angle 400" in result.stdout
    assert "line 8: line 8" not in result.stdout
    texts = [result.output, *(path.read_text(encoding="utf-8") for path in out.iterdir())]
    assert len(texts) == 3
    for text in texts:
        assert not re.search("doe.?john", text, re.IGNORECASE)
