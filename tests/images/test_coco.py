"""COCO files: as manifests, and as masks of foreground, class numbers and planes."""

import copy
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from sam3cache.errors import ConfigError, ImageError, ManifestError
from sam3cache.images import (
    parse_classes,
    probe,
    read_image,
    read_labels,
    read_manifest,
    read_mask,
)

HEIGHT, WIDTH = 40, 50
BLOB = np.zeros((HEIGHT, WIDTH), np.uint8)
BLOB[25:35, 10:40] = 1
LETTERS = coco_mask.encode(np.asfortranarray(BLOB))["counts"].decode("ascii")
COUNTS = [int(n) for n in np.diff(np.flatnonzero(np.diff(BLOB.T.ravel(), prepend=2, append=2)))]

DOCUMENT = {
    "images": [
        {"id": 1, "file_name": "1.png", "height": HEIGHT, "width": WIDTH},
        {"id": 2, "file_name": "2.png", "height": HEIGHT, "width": WIDTH},
    ],
    "categories": [{"id": 6, "name": "lad"}, {"id": 13, "name": "lcx"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 6, "segmentation": [[5, 5, 25, 5, 25, 15, 5, 15]]},
        {
            "id": 2,
            "image_id": 1,
            "category_id": 13,
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": LETTERS},
        },
    ],
}


def write(folder, document=DOCUMENT, name="train"):
    """Lay a file out as ARCADE does, and return it."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    for image in document["images"]:
        Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(
            folder / "images" / image["file_name"]
        )
    path = folder / "annotations" / f"{name}.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def changed(**annotation):
    """The document with its first annotation changed."""
    document = copy.deepcopy(DOCUMENT)
    document["annotations"][0] |= annotation
    return document


def polygon():
    picture = Image.new("L", (WIDTH, HEIGHT))
    ImageDraw.Draw(picture).polygon([(5, 5), (24, 5), (24, 14), (5, 14)], fill=1)
    return np.asarray(picture)


def test_a_file_gives_its_images_with_their_masks(tmp_path):
    manifest = read_manifest(write(tmp_path))
    first, second = manifest.samples
    assert (first.source, first.mask) == ("images/1.png", "annotations/train.json::1")
    assert first.mask_path == tmp_path / "annotations" / "train.json"
    assert probe(first).mask_width_px == WIDTH
    assert np.array_equal(read_mask(first)[0], polygon() | BLOB)
    assert not read_mask(second).any()


def test_folders_of_splits_are_read_together(tmp_path):
    write(tmp_path / "train")
    write(tmp_path / "val", name="val")
    manifest = read_manifest(tmp_path)
    assert [s.split for s in manifest.samples] == ["train", "train", "val", "val"]
    assert manifest.samples[2].id == "val/images/1"


def write_several(folder, *names):
    """COCO files of an image each in one folder."""
    for number, name in enumerate(names, 1):
        images = [{"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH}]
        write(folder, {**DOCUMENT, "images": images, "annotations": []}, name)
    return folder


def test_a_split_is_a_word_of_a_files_name(tmp_path):
    names = ("image_info_test-dev2017", "instances_train2017", "instances_val2017", "valid-2")
    manifest = read_manifest(write_several(tmp_path, *names))
    assert [s.split for s in manifest.samples] == ["test", "train", "val", "val"]
    write(tmp_path / "b" / "my_test_2", name="instances")
    write(tmp_path / "b" / "train2017", name="instances")
    manifest = read_manifest(tmp_path / "b")
    assert [s.split for s in manifest.samples] == ["test", "test", "train", "train"]


@pytest.mark.parametrize("name", ["more", "train_and_val", "attest"])
def test_a_file_without_a_split_beside_others_with_one_is_told(tmp_path, name):
    folder = write_several(tmp_path / "test", "train", "val", name)
    with pytest.raises(ManifestError, match=rf"no split in the names of annotations/{name}.json"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("names", "words"), [(("a", "b"), "none of the 2 files"), (("test1", "test2"), "'test'")]
)
def test_that_files_tell_no_splits_is_told(tmp_path, names, words):
    manifest = read_manifest(write_several(tmp_path, *names))
    (note,) = manifest.notes
    assert words in note
    assert "anew" in note


def test_that_a_file_alone_makes_no_split_of_its_name_is_told(tmp_path):
    (note,) = read_manifest(write(tmp_path, name="instances_val2017")).notes
    assert "says 'val'" in note
    assert read_manifest(write(tmp_path, name="instances")).notes == ()


def test_ids_with_a_point_are_those_without_and_strays_are_counted(tmp_path):
    document = changed(image_id=1.0)
    document["annotations"][1]["image_id"] = 99
    manifest = read_manifest(write(tmp_path, document))
    assert np.array_equal(read_mask(manifest.samples[0])[0], polygon())
    assert manifest.samples[0].mask == "annotations/train.json::1"
    assert "train.json: 1 annotations" in manifest.notes[0]


def test_other_json_files_beside_pictures_are_left_alone(tmp_path):
    write(tmp_path).write_text('{"shapes": []}', encoding="utf-8")
    assert [s.mask for s in read_manifest(tmp_path).samples] == [None, None]
    write(tmp_path)
    (tmp_path / "masks").mkdir()
    assert [s.mask for s in read_manifest(tmp_path).samples] == [None, None]


@pytest.mark.parametrize("where", ["images", ".", "../images"])
def test_images_are_found_where_such_files_have_them(tmp_path, where):
    path = write(tmp_path / "annotations")
    moved = tmp_path / "annotations" / "a.json"
    path.replace(moved)
    if where == "../images":
        (tmp_path / "annotations" / "images").replace(tmp_path / "images")
    elif where == ".":
        for picture in (tmp_path / "annotations" / "images").iterdir():
            picture.replace(tmp_path / "annotations" / picture.name)
    assert probe(read_manifest(moved).samples[0]).width_px == WIDTH


@pytest.mark.parametrize("where", ["train2017", "images/train2017"])
def test_images_of_a_split_are_found_in_the_folder_that_the_files_name_ends_in(tmp_path, where):
    path = write(tmp_path, name="instances_train2017")
    write(tmp_path, name="instances_val2017")
    (tmp_path / "images").replace(tmp_path / "pictures")
    for number, folder in enumerate((where, where.replace("train", "val"))):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("1.png", "2.png"):
            picture = np.full((HEIGHT, WIDTH), number, np.uint8)
            Image.fromarray(picture).save(tmp_path / folder / name)
    samples = read_manifest(tmp_path).samples
    assert [s.split for s in samples] == ["train", "train", "val", "val"]
    assert [read_image(s).max() for s in samples] == [0, 0, 1, 1]
    assert read_manifest(path).samples[0].image_path == tmp_path / where / "1.png"


def test_a_file_in_each_folder_of_images_is_read_as_a_split(tmp_path):
    for name in ("train", "valid"):
        path = write(tmp_path / name)
        (tmp_path / name / "images").replace(tmp_path / "images")
        path.replace(tmp_path / name / "_annotations.coco.json")
        for picture in (tmp_path / "images").iterdir():
            picture.replace(tmp_path / name / picture.name)
        (tmp_path / "images").rmdir()
    samples = read_manifest(tmp_path).samples
    assert [s.split for s in samples] == ["train", "train", "val", "val"]
    assert [s.source for s in samples] == [
        "train/1.png",
        "train/2.png",
        "valid/1.png",
        "valid/2.png",
    ]


def test_images_that_may_be_those_of_two_folders_are_told(tmp_path):
    path = write(tmp_path)
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes((tmp_path / "images" / name).read_bytes())
    with pytest.raises(ManifestError, match=r"may be those in .*images or in"):
        read_manifest(path)
    (tmp_path / "1.png").unlink()
    assert read_manifest(path).samples[0].source == "images/1.png"


@pytest.mark.parametrize("counts", [LETTERS, COUNTS])
def test_run_lengths_in_letters_and_in_numbers_are_those_of_pycocotools(tmp_path, counts):
    document = changed(segmentation={"size": [HEIGHT, WIDTH], "counts": counts})
    document["annotations"] = document["annotations"][:1]
    (first, _) = read_manifest(write(tmp_path, document)).samples
    assert np.array_equal(read_mask(first)[0], BLOB)


def test_letters_of_random_masks_are_decoded_as_pycocotools_does(tmp_path):
    rng = np.random.default_rng(0)
    for density in (0.01, 0.3, 0.99):
        mask = (rng.random((HEIGHT, WIDTH)) < density).astype(np.uint8)
        counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode("ascii")
        document = changed(segmentation={"size": [HEIGHT, WIDTH], "counts": counts})
        document["annotations"] = document["annotations"][:1]
        sample = read_manifest(write(tmp_path / str(density), document)).samples[0]
        assert np.array_equal(read_mask(sample)[0], mask)


def test_categories_are_a_table_of_classes(tmp_path):
    path = write(tmp_path)
    table = parse_classes(str(path))
    assert table.names == ("lad", "lcx")
    labels = read_labels(read_manifest(path).samples[0].each_mask(), table, (HEIGHT, WIDTH))
    assert labels.shape == (1, HEIGHT, WIDTH)
    assert np.array_equal(labels[0] == 1, polygon() == 1)
    assert np.array_equal(labels[0] == 2, BLOB == 1)


def test_numbers_of_ones_own_name_categories_by_their_ids(tmp_path):
    sample = read_manifest(write(tmp_path)).samples[0]
    labels = read_labels(sample.each_mask(), parse_classes("lcx=13,background=6"), (HEIGHT, WIDTH))
    assert np.array_equal(labels[0], BLOB)


def test_planes_are_taken_by_the_names_of_the_categories(tmp_path):
    sample = read_manifest(write(tmp_path)).samples[0]
    labels = read_labels(sample.each_mask(), parse_classes("lcx,lad"), (HEIGHT, WIDTH))
    assert np.array_equal(labels, [BLOB, polygon()])
    with pytest.raises(ImageError, match="no category 'rca'; it has lad, lcx"):
        read_labels(sample.each_mask(), parse_classes("lad,rca"), (HEIGHT, WIDTH))


def test_one_name_is_a_plane_of_that_category(tmp_path):
    sample = read_manifest(write(tmp_path)).samples[0]
    labels = read_labels(sample.each_mask(), parse_classes("lcx"), (HEIGHT, WIDTH))
    assert np.array_equal(labels, [BLOB])


def with_categories(names):
    """The document with categories of these names, by id, in place of its own of 6 and 13."""
    document = copy.deepcopy(DOCUMENT)
    document["categories"] = [{"id": number, "name": name} for number, name in names.items()]
    for annotation, number in zip(document["annotations"], list(names)[-2:], strict=True):
        annotation["category_id"] = number
    return document


@pytest.mark.parametrize("ids", [(0, 1), (1, 2)])
def test_categories_of_one_name_are_one_plane(tmp_path, ids):
    document = with_categories(dict.fromkeys(ids, "stenosis"))
    for annotation in document["annotations"]:
        annotation["category_id"] = ids[1]
    path = write(tmp_path, document)
    sample = read_manifest(path).samples[0]
    for classes in ("stenosis", str(path)):
        labels = read_labels(sample.each_mask(), parse_classes(classes), (HEIGHT, WIDTH))
        assert np.array_equal(labels, [polygon() | BLOB])
    with pytest.raises(ImageError, match=r"no category 'lad'; it has stenosis$"):
        read_labels(sample.each_mask(), parse_classes("lad"), (HEIGHT, WIDTH))


def test_of_categories_of_one_name_a_crowd_of_one_does_not_hide_the_other(tmp_path):
    document = with_categories({1: "stenosis", 2: "stenosis"})
    document["annotations"][0] |= {"iscrowd": 1, "segmentation": [[0, 0, 50, 0, 50, 40, 0, 40]]}
    sample = read_manifest(write(tmp_path, document)).samples[0]
    labels = read_labels(sample.each_mask(), parse_classes("stenosis"), (HEIGHT, WIDTH))
    assert np.array_equal(labels[0], np.where(BLOB, 1, 255))


@pytest.mark.parametrize("classes", ["lad,lcx", "lad=6,lcx=13", "lad"])
def test_a_mask_of_another_shape_is_refused_whatever_the_classes(tmp_path, classes):
    sample = read_manifest(write(tmp_path)).samples[0]
    with pytest.raises(ImageError, match="40 x 50 for an image of 40 x 40"):
        read_labels(sample.each_mask(), parse_classes(classes), (40, 40))


OTHER_NAMES = {"lcx": {1: "lcx", 2: "lad"}, "stent": {1: "lad", 2: "stent"}}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_classes_of_another_coco_file_are_refused_where_its_categories_differ(tmp_path, name):
    table = parse_classes(str(write(tmp_path / "a", with_categories({1: "lad", 2: "lcx"}))))
    sample = read_manifest(write(tmp_path / "b", with_categories(OTHER_NAMES[name]))).samples[0]
    with pytest.raises(ImageError, match=rf"category \d is '{name}', .*without numbers") as caught:
        read_labels(sample.each_mask(), table, (HEIGHT, WIDTH))
    assert "\n" not in str(caught.value)


def test_numbers_of_ones_own_may_name_categories_anew_but_not_by_anothers_name(tmp_path):
    sample = read_manifest(write(tmp_path)).samples[0]
    labels = read_labels(sample.each_mask(), parse_classes("left=6,left=13"), (HEIGHT, WIDTH))
    assert np.array_equal(labels[0], polygon() | BLOB)
    for classes in ("lad=13,lcx=6", "lcx=6,background=*"):
        with pytest.raises(ImageError, match=r"category \d+ is 'l"):
            read_labels(sample.each_mask(), parse_classes(classes), (HEIGHT, WIDTH))


def test_of_annotations_that_overlap_the_later_is_on_top_and_planes_have_both(tmp_path):
    box = [[10, 25, 40, 25, 40, 35, 10, 35]]
    sample = read_manifest(write(tmp_path, changed(segmentation=box))).samples[0]
    table = parse_classes(str(tmp_path / "annotations" / "train.json"))
    labels = read_labels(sample.each_mask(), table, (HEIGHT, WIDTH))
    assert np.array_equal(labels[0], 2 * BLOB)
    planes = read_labels(sample.each_mask(), parse_classes("lad,lcx"), (HEIGHT, WIDTH))
    assert np.array_equal(planes, [BLOB, BLOB])


@pytest.mark.parametrize("mark", ["iscrowd", "ignore"])
def test_a_crowd_is_not_counted_where_nothing_else_is(tmp_path, mark):
    document = changed(**{mark: 1}, segmentation=[[0, 0, WIDTH, 0, WIDTH, HEIGHT, 0, HEIGHT]])
    sample = read_manifest(write(tmp_path, document)).samples[0]
    assert np.array_equal(read_mask(sample)[0], np.where(BLOB, 1, 255))


def test_ids_that_no_mask_can_hold_are_counted_from_one(tmp_path):
    document = copy.deepcopy(DOCUMENT)
    for category, number in zip(document["categories"], (0, 1000), strict=True):
        category["id"] = number
    for annotation, number in zip(document["annotations"], (0, 1000), strict=True):
        annotation["category_id"] = number
    path = write(tmp_path, document)
    table = parse_classes(str(path))
    labels = read_labels(read_manifest(path).samples[0].each_mask(), table, (HEIGHT, WIDTH))
    assert np.array_equal(labels[0], polygon() + 2 * BLOB)


def test_a_changed_file_is_read_anew(tmp_path):
    path = write(tmp_path)
    assert read_mask(read_manifest(path).samples[0]).any()
    path.write_text(json.dumps({**DOCUMENT, "annotations": []}), encoding="utf-8")
    assert not read_mask(read_manifest(path).samples[0]).any()


BAD_ANNOTATIONS = {
    "two corners": ({"segmentation": [[1, 2, 3, 4]]}, "three corners"),
    "an odd number": ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "three corners"),
    "a word": ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, "no number"),
    "far away": ({"segmentation": [[1, 2, 3, 4, 5, 1e9]]}, "far outside"),
    "nothing": ({"segmentation": None}, "no segmentation"),
    "another size": (
        {"segmentation": {"size": [4, 4], "counts": [16]}},
        r"run lengths of \[4, 4\]",
    ),
    "too few runs": (
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 5]}},
        "do not fill",
    ),
    "a negative run": (
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [-5, 5 + HEIGHT * WIDTH]}},
        "do not fill",
    ),
    "letters cut short": (
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": LETTERS[:-1]}},
        "do not fill",
    ),
    "no letters": (
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "é~"}},
        "do not fill",
    ),
    "a strange category": ({"category_id": 99}, "no known category"),
    "no category": ({"category_id": [1]}, "no known category"),
}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_a_bad_annotation_is_told_with_its_number(tmp_path, case):
    annotation, words = BAD_ANNOTATIONS[case]
    sample = read_manifest(write(tmp_path, changed(**annotation))).samples[0]
    with pytest.raises(ImageError, match=words) as caught:
        read_mask(sample)
    assert "annotations/train.json::1: annotation 1" in str(caught.value)


BAD_FILES = {
    "not JSON": "{",
    "a list": "[]",
    "no categories": json.dumps({**DOCUMENT, "categories": []}),
    "a category twice": json.dumps({**DOCUMENT, "categories": [{"id": 1, "name": "a"}] * 2}),
    "a category without a name": json.dumps({**DOCUMENT, "categories": [{"id": 1}]}),
    "an image twice": json.dumps({**DOCUMENT, "images": DOCUMENT["images"][:1] * 2}),
    "an image without a name": json.dumps({**DOCUMENT, "images": [{"id": 1}]}),
    "half a character": json.dumps({**DOCUMENT, "images": [{"id": 1, "file_name": "/\ud83d.png"}]}),
    "half a character as an id": json.dumps(
        {**DOCUMENT, "images": [{"id": "\ud83d", "file_name": "1.png"}]}
    ),
    "nested without end": "[" * 100_000,
    "no images there": json.dumps({**DOCUMENT, "images": [{"id": 1, "file_name": "x.png"}]}),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_what_is_no_coco_file_is_told_in_one_line(tmp_path, case):
    path = write(tmp_path)
    path.write_text(BAD_FILES[case], encoding="utf-8")
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert "train.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_of_no_size_and_one_that_is_not_there_are_told(tmp_path):
    document = copy.deepcopy(DOCUMENT)
    document["images"][0] |= {"height": 10**9}
    del document["images"][1]["width"]
    first, second = read_manifest(write(tmp_path, document)).samples
    with pytest.raises(ImageError, match="pixels, more than"):
        read_mask(first)
    with pytest.raises(ImageError, match="without a height"):
        read_mask(second)


def test_categories_that_are_none_are_told_as_classes(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"categories": [1]}', encoding="utf-8")
    with pytest.raises(ConfigError, match="without an id"):
        parse_classes(str(path))
