"""HDF5, .npz and Parquet: containers and tables as manifests, and their members in a CSV."""

import re
import zipfile

import h5py
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from sam3cache.errors import ImageError, ManifestError
from sam3cache.images import close_kept_files, probe, read_image, read_manifest, read_mask
from sam3cache.images.files import open_picture
from sam3cache.images.npz import NpzFile
from sam3cache.images.opened import MAX_OPEN, kept_open
from sam3cache.records import Sample

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 20, 30), dtype=np.uint8)
MASKS = IMAGES > 100


@pytest.fixture(autouse=True)
def files_are_closed():
    yield
    close_kept_files()


def write_h5(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name.replace("__", "/")] = values
    return path


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def write_small_npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


STACKS = [(write_h5, "a.h5"), (write_npz, "a.npz"), (write_small_npz, "a.npz")]


@pytest.mark.parametrize(("write", "name"), STACKS)
def test_a_stack_gives_a_sample_a_picture_with_what_stands_beside_it(tmp_path, write, name):
    write(
        tmp_path / name,
        images=IMAGES,
        masks=MASKS,
        angles=np.array([[30.5, -20], [np.nan, 5], [1, 2], [3, 4], [5, 6]]),
        split=np.array([b"train", b"train", b"val", b"test", b"train"]),
        groups=np.array([b"a", b"a", b"b", b"c", b"d"]),
        quality=np.arange(5),
    )
    manifest = read_manifest(tmp_path / name)
    assert [s.source for s in manifest.samples] == [f"{name}::images"] * 5
    assert [s.frame for s in manifest.samples] == list(range(5))
    assert [s.group for s in manifest.samples] == ["a", "a", "b", "c", "d"]
    assert [s.split for s in manifest.samples] == ["train", "train", "val", "test", "train"]
    assert manifest.samples[0].primary_angle_deg == 30.5
    assert manifest.samples[1].primary_angle_deg is None
    assert manifest.samples[1].secondary_angle_deg == 5.0
    assert manifest.samples[3].extra == {"quality": "3"}
    for index in (4, 0, 3):
        sample = manifest.samples[index]
        assert sample.image_path == tmp_path / name
        assert probe(sample).mask_width_px == 30
        assert np.array_equal(read_image(sample)[..., 0], IMAGES[index])
        assert np.array_equal(read_mask(sample)[0], MASKS[index])


@pytest.mark.parametrize(("write", "name"), STACKS)
def test_columns_may_be_tables_of_one_column(tmp_path, write, name):
    write(
        tmp_path / name,
        images=IMAGES,
        split=np.array([[b"train"], [b"val"], [b"test"], [b"test"], [b"test"]]),
        group=np.arange(5)[:, None],
        primary_angle=np.full((5, 1), 7.5),
    )
    samples = read_manifest(tmp_path / name).samples
    assert [s.split for s in samples] == ["train", "val", "test", "test", "test"]
    assert [s.group for s in samples] == ["0", "1", "2", "3", "4"]
    assert samples[4].primary_angle_deg == 7.5
    still = write(tmp_path / f"b{name}", image=IMAGES[0], group=np.array(b"p"), angles=[1.0, 2.0])
    (sample,) = read_manifest(still).samples
    assert (sample.group, sample.primary_angle_deg, sample.secondary_angle_deg) == ("p", 1, 2)


MISFITS = {
    "splits": np.zeros((5, 2), np.uint8),
    "group": np.zeros(4),
    "primary_angle": np.zeros((5, 1, 2)),
    "angles": np.zeros((2, 5)),
    "view_angles": np.zeros(5),
    "masks": MASKS[:4],
    "mask": MASKS[0],
    "frame": np.zeros(()),
    "ids": np.zeros(6),
}


@pytest.mark.parametrize("field", MISFITS)
@pytest.mark.parametrize(("write", "name"), STACKS)
def test_what_is_called_a_field_and_cannot_be_it_is_told(tmp_path, write, name, field):
    write(tmp_path / name, images=IMAGES, **{field: MISFITS[field]})
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path / name)
    shape = str(MISFITS[field].shape)
    assert f"{field!r} has the shape {shape}; expected" in str(caught.value)
    assert "'images' of (5, 20, 30)" in str(caught.value)


def test_what_is_settled_by_hand_need_not_be_an_array(tmp_path):
    write_h5(tmp_path / "a.h5", images=IMAGES, group=np.zeros(4), angles=np.zeros(5))
    (tmp_path / "c.toml").write_text(
        'group = { constant = "p" }\nprimary_angle = { constant = "" }\n'
        'secondary_angle = { constant = "" }\n',
        encoding="utf-8",
    )
    samples = read_manifest(tmp_path / "a.h5", tmp_path / "c.toml").samples
    assert {s.group for s in samples} == {"p"}


@pytest.mark.parametrize(("field", "value"), [("group", [1, 2, 3]), ("angles", [1.0] * 3)])
def test_of_a_group_as_well(tmp_path, field, value):
    write_h5(tmp_path / "a.h5", **{"p__image": IMAGES[0], f"p__{field}": value})
    with pytest.raises(ManifestError, match=rf"'p/{field}' has the shape \(3,\); expected"):
        read_manifest(tmp_path / "a.h5")


@pytest.mark.parametrize(("write", "name"), STACKS)
def test_names_of_ones_own_are_said_by_columns(tmp_path, write, name):
    write(tmp_path / name, frames=IMAGES, vessel=MASKS, lao=np.arange(5.0), who=np.arange(5) // 2)
    (tmp_path / "c.toml").write_text(
        'image = "frames"\nmask = "vessel"\nprimary_angle = "lao"\n'
        'group = { column = "who", hash = true }\n',
        encoding="utf-8",
    )
    samples = read_manifest(tmp_path / name, tmp_path / "c.toml").samples
    assert [s.primary_angle_deg for s in samples] == [0, 1, 2, 3, 4]
    assert len({s.group for s in samples}) == 3
    assert np.array_equal(read_mask(samples[2])[0], MASKS[2])


def test_a_group_a_sample_has_its_values_as_datasets_or_attributes(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for index in range(3):
            group = file.create_group(f"study/p{index}")
            group["image"], group["mask"] = IMAGES[index], MASKS[index]
            group.attrs["primary_angle"] = 10.0 * index
            group["secondary_angle"] = -5.0
            group.attrs["vessel"] = "lad"
        file["study/p2/cine"] = IMAGES
    manifest = read_manifest(tmp_path / "a.h5")
    last = manifest.samples[2]
    assert last.source == "a.h5::study/p2/image"
    assert (last.primary_angle_deg, last.secondary_angle_deg) == (20.0, -5.0)
    assert last.extra == {"vessel": "lad"}
    assert len({sample.group for sample in manifest.samples}) == 3
    assert np.array_equal(read_image(last)[..., 0], IMAGES[2])
    (tmp_path / "c.toml").write_text(
        'image = "*/cine"\nframe = { constant = "3" }\n', encoding="utf-8"
    )
    (cine,) = read_manifest(tmp_path / "a.h5", tmp_path / "c.toml").samples
    assert np.array_equal(read_image(cine)[..., 0], IMAGES[3])


def test_without_groups_it_is_told_what_may_follow(tmp_path):
    manifest = read_manifest(write_h5(tmp_path / "a.h5", images=IMAGES))
    assert [sample.group for sample in manifest.samples] == [f"a.h5::images#{i}" for i in range(5)]
    assert "5 of 5 samples have no group" in manifest.notes[0]
    assert "two splits" in manifest.notes[0]
    assert "group" not in manifest.fields
    manifest = read_manifest(write_h5(tmp_path / "b.h5", study__p1__image=IMAGES[0]))
    assert [sample.group for sample in manifest.samples] == ["b.h5::study/p1"]
    assert manifest.num_ungrouped == 1
    write_h5(tmp_path / "c.h5", images=IMAGES, group=np.array([b"a", b"a", b"", b"b", b"b"]))
    assert read_manifest(tmp_path / "c.h5").num_ungrouped == 1


def test_a_csv_may_name_members_of_containers(tmp_path):
    write_h5(tmp_path / "a.h5", p1__image=IMAGES, p1__mask=MASKS)
    write_npz(tmp_path / "b.npz", x=IMAGES[0])
    (tmp_path / "m.csv").write_text(
        "image,mask,frame\na.h5::p1/image,a.h5::p1/mask,2\nb.npz::x,,\nb.npz,,\n", encoding="utf-8"
    )
    first, second, third = read_manifest(tmp_path / "m.csv").samples
    assert np.array_equal(read_image(first)[..., 0], IMAGES[2])
    assert np.array_equal(read_mask(first)[0], MASKS[2])
    assert np.array_equal(read_image(second), read_image(third))


def test_hashed_names_tell_nothing_of_what_is_inside_a_container(tmp_path):
    write_h5(tmp_path / "DOE.h5", JOHN__image=IMAGES[0])
    (tmp_path / "m.csv").write_text("image\nDOE.h5::JOHN/image\n", encoding="utf-8")
    (tmp_path / "c.toml").write_text("hash_paths = true", encoding="utf-8")
    (sample,) = read_manifest(tmp_path / "m.csv", tmp_path / "c.toml").samples
    assert sample.source.endswith(".h5")
    assert "JOHN" not in sample.source + sample.group + sample.id
    assert np.array_equal(read_image(sample)[..., 0], IMAGES[0])


def half_h5(path):
    write_h5(path, images=IMAGES)
    path.write_bytes(path.read_bytes()[:1500])


def quack_groups(path):
    write_h5(path, DOE_JOHN__lao__image=IMAGES[0], DOE_JOHN__rao__image=IMAGES[1])


def quack_stack(path):
    write_h5(path, images=IMAGES, DOE_JOHN=MASKS)


def quack_npz(path):
    np.savez(path, images=IMAGES, DOE_JOHN=MASKS)


NAMES = re.compile("doe|john|quack|/lao", re.IGNORECASE)


@pytest.mark.parametrize(
    ("write", "name"),
    [(quack_groups, "QUACK.h5"), (quack_stack, "QUACK.h5"), (quack_npz, "QUACK.npz")],
)
def test_a_container_whose_names_are_hidden_has_groups_without_them(tmp_path, write, name):
    write(tmp_path / name)
    (tmp_path / "c.toml").write_text("hash_paths = true", encoding="utf-8")
    manifest = read_manifest(tmp_path / name, tmp_path / "c.toml")
    assert len({sample.group for sample in manifest.samples}) == len(manifest.samples) > 1
    assert "have no group" in manifest.notes[0]
    kept = [[s.id, s.source, s.group, s.split, dict(s.extra)] for s in manifest.samples]
    assert not NAMES.search(f"{kept} {manifest.notes} {manifest.name} {manifest.split_rule}")
    assert read_image(manifest.samples[1]).shape == (20, 30, 1)


# What a container holds, and what is said of it beside its columns.toml.
HIDDEN_FAULTS = {
    "no images": (lambda p: write_h5(p, DOE_JOHN=IMAGES), "", "no such images in it"),
    "a misfit": (
        lambda p: write_h5(p, DOE_JOHN__image=IMAGES[0], DOE_JOHN__group=[1, 2]),
        "",
        "what is the group has the shape (2,); expected one value",
    ),
    "a misfit of a stack": (
        lambda p: write_h5(p, DOE_JOHN=IMAGES, masks=MASKS[:3]),
        'image = "DOE_JOHN"',
        "what is the mask has the shape (3, 20, 30); expected a mask a picture",
    ),
    "damage": (half_h5, "", "damaged; restore it"),
    "one id twice": (
        lambda p: write_h5(p, images=IMAGES, id=np.zeros(5), DOE_JOHN=MASKS),
        "",
        "rows 0 and 1 both have the id",
    ),
    "no such column": (quack_stack, 'split = "part"', "'part' is not in the manifest, which has"),
    "nothing to be used": (
        lambda p: write_h5(p, images=IMAGES, primary_angle=np.full(5, 400)),
        "",
        "none of 5 rows can be used",
    ),
}


@pytest.mark.parametrize("fault", HIDDEN_FAULTS)
def test_what_is_wrong_with_a_container_is_told_without_names_that_are_hidden(tmp_path, fault):
    write, columns, words = HIDDEN_FAULTS[fault]
    path = tmp_path / "QUACK_DOE.h5"
    write(path)
    (tmp_path / "c.toml").write_text(f"hash_paths = true\n{columns}", encoding="utf-8")
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, tmp_path / "c.toml")
    assert words in str(caught.value)
    assert not NAMES.search(str(caught.value))
    with pytest.raises(ManifestError, match=r"masks; it has"):
        read_manifest(write_h5(path, images=IMAGES), mask_columns=["vessel"])


@pytest.mark.parametrize(("write", "name"), STACKS)
def test_a_changed_container_is_opened_anew(tmp_path, write, name):
    write(tmp_path / name, images=IMAGES)
    sample = Sample("a", f"{name}::images", tmp_path, frame=1)
    assert np.array_equal(read_image(sample)[..., 0], IMAGES[1])
    write(tmp_path / "new", images=255 - IMAGES)
    new = tmp_path / "new"
    (new if new.exists() else tmp_path / "new.npz").replace(tmp_path / name)
    assert np.array_equal(read_image(sample)[..., 0], 255 - IMAGES[1])


def test_a_file_stays_open_from_one_sample_to_the_next_but_few_do(tmp_path):
    paths = [write_npz(tmp_path / f"{i}.npz", x=IMAGES) for i in range(2 * MAX_OPEN)]
    files = [kept_open(path, NpzFile) for path in paths]
    assert kept_open(paths[-1], NpzFile) is files[-1]
    assert [file.is_open for file in files] == [False] * MAX_OPEN + [True] * MAX_OPEN
    close_kept_files()
    assert not any(file.is_open for file in files)


def test_a_parquet_file_is_understood_as_a_csv_is(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    table = pa.table(
        {
            "cine": ["x.npy"] * 3,
            "frame": [0.0, 1.0, 9.0],
            "primary_angle": [12.5, None, float("nan")],
            "patient_id": ["p1", "p1", "p2"],
            "note": ["a", None, "c"],
            "points": [[1], [2], [3]],
        }
    )
    parquet.write_table(table, tmp_path / "m.parquet")
    (tmp_path / "c.toml").write_text('image = "cine"\ngroup = "patient_id"\n', encoding="utf-8")
    manifest = read_manifest(tmp_path / "m.parquet", tmp_path / "c.toml")
    first, second, third = manifest.samples
    assert (first.frame, first.primary_angle_deg, second.primary_angle_deg) == (0, 12.5, None)
    assert first.group == second.group != third.group
    assert "p1" not in first.group
    assert first.extra == {"note": "a"}
    assert third.primary_angle_deg is None
    with pytest.raises(ImageError, match="no frame 9"):
        probe(third)


class Runs:
    def __reduce__(self):
        return print, ("ran",)


def pickled(path):
    np.savez(path, images=np.array([Runs()], dtype=object))


def zip_of_text(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", "hello")


def short(path):
    np.savez(path, images=IMAGES)
    path.write_bytes(path.read_bytes()[:1000])


def elsewhere(path):
    with h5py.File(path.with_name("other.h5"), "w") as file:
        file["images"] = IMAGES
    with h5py.File(path, "w") as file:
        file["images"] = h5py.ExternalLink("other.h5", "images")


def outside(path):
    path.with_name("raw").write_bytes(bytes(IMAGES))
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "images", IMAGES.shape, "u1", external=[(str(path.with_name("raw")), 0, IMAGES.size)]
        )


def large_chunks(path):
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "images", (2, 40_000, 40_000), "u1", chunks=(2, 40_000, 20_000), compression="gzip"
        )


BAD = {
    "objects.npz": (pickled, "objects"),
    "text.npz": (zip_of_text, "damaged"),
    "short.npz": (short, "damaged"),
    "fortran.npz": (lambda p: np.savez(p, images=np.asfortranarray(IMAGES)), "Fortran"),
    "none.npz": (lambda p: np.savez(p), "no parts"),
    "other.npz": (lambda p: np.savez(p, x=IMAGES), "no array 'images'; it has x"),
    "strings.npz": (lambda p: np.savez(p, images=np.array([["a"]])), "type"),
    "link.h5": (elsewhere, "is a link"),
    "outside.h5": (outside, "other files"),
    "half.h5": (half_h5, "damaged"),
    "chunks.h5": (large_chunks, "chunks"),
    "group.h5": (lambda p: write_h5(p, images__x=IMAGES), "is no dataset"),
    "other.h5": (lambda p: write_h5(p, x=IMAGES), "no dataset 'images'; it has x"),
    "strings.h5": (lambda p: write_h5(p, images=[[b"a"]]), "type"),
    "empty.h5": (lambda p: write_h5(p, images=np.zeros((0, 4, 4))), "no pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_container_is_told_in_one_line_without_its_path(tmp_path, capfd, name):
    write, words = BAD[name]
    write(tmp_path / name)
    with (
        pytest.raises(ImageError) as caught,
        open_picture(tmp_path / name, name, member="images", frame=0) as picture,
    ):
        picture.read(0)
    message = str(caught.value)
    assert words in message
    assert str(tmp_path) not in message
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


BAD_MANIFESTS = {
    "half.h5": half_h5,
    "short.npz": short,
    "other.h5": lambda p: write_h5(p, x=IMAGES),
    "text.parquet": lambda p: p.write_bytes(b"PAR1" + b"hello" * 20 + b"PAR1"),
    "column.parquet": lambda p: parquet.write_table(pa.table({"a": [1]}), p),
    "rows.parquet": lambda p: parquet.write_table(pa.table({"image": pa.array([], "string")}), p),
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_a_container_that_is_no_manifest_is_told_in_one_line(tmp_path, name):
    BAD_MANIFESTS[name](tmp_path / name)
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_member_of_what_has_none_is_told(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES[0])
    with (
        pytest.raises(ImageError, match="no parts"),
        open_picture(tmp_path / "x.npy", "x.npy", member="a"),
    ):
        pass
