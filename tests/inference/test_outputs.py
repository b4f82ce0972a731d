"""Files of a prediction, read again by others: Pillow, NumPy, pycocotools."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask

from sam3cache.images import read_mask
from sam3cache.inference.coco import CocoImage, annotations_of, coco_json
from sam3cache.inference.outputs import (
    COLOURS,
    OutputLayout,
    class_colours,
    draw_outlines,
    legend_svg,
)
from sam3cache.records import Sample

# Of pycocotools' decoder, which is used here alone.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 1), dtype=np.uint8)
PROBABILITY = RNG.random((2, 20, 30), dtype=np.float32)
MASK = np.zeros((2, 20, 30), bool)
MASK[0, 2:9, 3:12] = True
MASK[0, 4:6, 5:8] = False
MASK[1, 12:18, 20:30] = True


def test_one_class_is_a_mask_of_0_and_255(tmp_path: Path) -> None:
    layout = OutputLayout(tmp_path, "multilabel", ("vessel",))
    files = layout.files("sub/a")
    layout.write(files, MASK[:1], PROBABILITY[:1], PIXELS)
    (path,) = (p for p in tmp_path.rglob("*") if p.is_file())
    assert path == tmp_path / "masks" / "sub" / "a.png"
    np.testing.assert_array_equal(np.array(Image.open(path)), MASK[0] * 255)
    # Our own reader takes it for a mask as well.
    sample = Sample("a", "a.png", tmp_path, mask="masks/sub/a.png")
    np.testing.assert_array_equal(read_mask(sample, (20, 30)), MASK[:1])


def test_several_labels_are_a_folder_each(tmp_path: Path) -> None:
    layout = OutputLayout(tmp_path, "multilabel", ("LAD", "RCA"), probabilities="png")
    files = layout.files("a")
    layout.write(files, MASK, PROBABILITY, PIXELS)
    for number, name in enumerate(("LAD", "RCA")):
        drawn = np.array(Image.open(tmp_path / "masks" / name / "a.png"))
        np.testing.assert_array_equal(drawn, MASK[number] * 255)
        values = np.array(Image.open(tmp_path / "probabilities" / name / "a.png"))
        assert values.dtype == np.uint16
        np.testing.assert_allclose(values / 65535, PROBABILITY[number], atol=0.5 / 65535 + 1e-9)
    assert sorted(files.all) == sorted(p for p in tmp_path.rglob("*") if p.is_file())


def test_classes_that_exclude_each_other_are_numbers_in_one_file(tmp_path: Path) -> None:
    layout = OutputLayout(tmp_path, "multiclass", ("LAD", "RCA"), overlay=True, probabilities="npy")
    files = layout.files("a")
    layout.write(files, MASK, PROBABILITY, PIXELS)
    numbers = np.array(Image.open(tmp_path / "masks" / "a.png"))
    np.testing.assert_array_equal(numbers, MASK[0] + 2 * MASK[1])
    np.testing.assert_array_equal(np.load(tmp_path / "probabilities" / "a.npy"), PROBABILITY)
    drawn = np.array(Image.open(tmp_path / "overlays" / "a.png"))
    np.testing.assert_array_equal(drawn, draw_outlines(PIXELS, MASK))
    assert sorted(files.all) == sorted(p for p in tmp_path.rglob("*") if p.is_file())


def test_contours_lie_around_the_mask_and_nowhere_else() -> None:
    drawn = draw_outlines(PIXELS, MASK)
    changed = (drawn != PIXELS).any(axis=-1)
    for number, plane in enumerate(MASK):
        around = np.zeros_like(plane)
        for y, x in zip(*plane.nonzero(), strict=True):
            around[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = True
        border = around & ~plane
        assert (drawn[border] == COLOURS[number]).all()
        changed &= ~border
    assert not changed.any()


def test_a_legend_names_each_class_in_the_colour_of_its_contours() -> None:
    classes = ("a < b & c", "右冠状动脉")
    svg = "{http://www.w3.org/2000/svg}"
    legend = ElementTree.fromstring(legend_svg(classes))
    assert tuple(text.text for text in legend.iter(f"{svg}text")) == classes
    _, *patches = legend.iter(f"{svg}rect")
    drawn = draw_outlines(PIXELS, MASK)
    for patch, plane in zip(patches, MASK, strict=True):
        left_of_it = np.roll(plane, -1, axis=1) & ~plane
        assert {f"#{bytes(colour).hex()}" for colour in drawn[left_of_it]} == {patch.get("fill")}


def test_no_two_classes_have_one_colour() -> None:
    assert tuple(class_colours(7)) == COLOURS
    for num_classes in (1, 8, 14, 26):
        colours = class_colours(num_classes)
        assert len(set(colours)) == num_classes
        assert tuple(colours[:7]) == COLOURS[:num_classes]


@given(arrays(np.bool_, st.tuples(st.just(1), st.integers(1, 9), st.integers(1, 9))))
def test_run_lengths_say_every_pixel(mask: np.ndarray) -> None:
    probability = np.full(mask.shape, 0.75, np.float32)
    found = annotations_of(mask, probability)
    if not mask.any():
        assert found == ()
        return
    (annotation,) = found
    runs = annotation["segmentation"]
    np.testing.assert_array_equal(coco_mask.decode(runs), mask[0])
    ys, xs = mask[0].nonzero()
    x, y = xs.min(), ys.min()
    assert annotation["bbox"] == [x, y, xs.max() - x + 1, ys.max() - y + 1]
    assert (annotation["area"], annotation["score"]) == (mask.sum(), 0.75)


def test_pycocotools_reads_the_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Only here: it brings matplotlib along.
    from pycocotools.coco import COCO

    images = [
        CocoImage(Sample("a", "x/a.png", tmp_path), 20, 30, annotations_of(MASK, PROBABILITY)),
        CocoImage(Sample("b", "b.npy", tmp_path, frame=3), 20, 30, ()),
    ]
    path = tmp_path / "coco.json"
    path.write_text(coco_json(images, ("LAD", "RCA")), encoding="utf-8")
    data = COCO(path)
    capsys.readouterr()
    assert [c["name"] for c in data.loadCats(data.getCatIds())] == ["LAD", "RCA"]
    assert [i["file_name"] for i in data.loadImgs([1, 2])] == ["x/a.png", "b.npy"]
    assert json.loads(path.read_bytes())["images"][1]["frame"] == 3
    for number, annotation in enumerate(data.loadAnns(data.getAnnIds(imgIds=1))):
        np.testing.assert_array_equal(data.annToMask(annotation), MASK[number])
        expected = float(PROBABILITY[number][MASK[number]].mean())
        assert annotation["score"] == pytest.approx(expected, abs=1e-5)
    assert data.getAnnIds(imgIds=2) == []
