import base64
import csv
import io
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from page_store import CELL_PX, MASK_HEIGHT_PX, MASK_WIDTH_PX, Drawn, write_page_store, write_run
from PIL import Image

from sam3cache.evaluation import EvalConfig, EvalResult, evaluate
from sam3cache.pages import PREDICTED_COLOUR, TRUE_COLOUR

FROM_FEATURES = "page_store:FromFeatures"
SPREAD = [Drawn(2), Drawn(0), Drawn(3), Drawn(1), Drawn(4)]


class Page(HTMLParser):
    """What a browser would find on a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.images: dict[str, str] = {}
        self.tables: list[list[list[str]]] = []
        self._text: list[str] = []
        self._hidden = 0
        self._in_cell = False
        self.feed(html)
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in LINKS]
        if tag == "img":
            self.images[values["alt"] or ""] = values["src"] or ""
        self._hidden += tag in ("style", "script")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("style", "script")
        self._in_cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data
        if not self._hidden:
            self._text.append(data)

    def picture(self, beginning: str) -> np.ndarray:
        """Decode the image whose description begins so, to (H, W, 3)."""
        (uri,) = (src for alt, src in self.images.items() if alt.startswith(beginning))
        data = base64.b64decode(uri.partition("base64,")[2])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


LINKS = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}


def run_of(tmp_path: Path, drawn: list[Drawn], **options: object) -> tuple[EvalConfig, Path]:
    """Write a store and a run whose head predicts what the store says."""
    store = write_page_store(tmp_path / "angio.zarr", drawn, **options)  # type: ignore[arg-type]
    classes = options.get("classes", ("vessel",))
    run = write_run(tmp_path / "first", store, num_classes=len(classes))  # type: ignore[arg-type]
    return EvalConfig(store, run, head=FROM_FEATURES, check_angles=False, threshold=0.5), run


def page_of(config: EvalConfig) -> tuple[Page, EvalResult]:
    result = evaluate(config)
    assert result.page is not None
    return Page(result.page.read_text(encoding="utf-8")), result


@pytest.fixture
def spread(tmp_path: Path) -> EvalConfig:
    return run_of(tmp_path, SPREAD)[0]


def test_the_page_lies_beside_the_figures_and_needs_no_other_file(spread: EvalConfig) -> None:
    page, result = page_of(replace(spread, check_angles=True))
    assert result.page == result.output / "report.html"
    assert json.loads((result.output / "summary.json").read_text(encoding="utf-8"))["page"] == (
        result.page.as_posix()
    )
    outside = [link for link in page.links if not link.startswith(("data:image/", "#"))]
    assert outside == []
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", page.html)
    ids = re.findall(r'\sid="([^"]+)"', page.html)
    assert len(ids) == len(set(ids))
    assert page.tags["svg"] == 4
    assert len(page.html) < 3e6


def test_no_path_of_the_machine_is_on_the_page(tmp_path: Path, spread: EvalConfig) -> None:
    settings = {"store": str(tmp_path / "angio.zarr"), "head_options": {"a": r"C:\data\x.zarr"}}
    write_run(spread.checkpoint, spread.store, settings=settings)
    page, _ = page_of(spread)
    assert str(tmp_path) not in page.html
    assert r"C:\data" not in page.html
    assert "Checkpoint first/best" in page.text
    assert "store angio.zarr" in page.text
    assert "head_options.a x.zarr" in page.text


def test_best_median_and_worst_stand_in_order_with_the_dice_of_the_csv(spread: EvalConfig) -> None:
    page, result = page_of(spread)
    with (result.output / "per_image.csv").open(encoding="utf-8", newline="") as file:
        dice = {line["id"]: float(line["dice"]) for line in csv.DictReader(file)}
    assert dice == {"s0": 0.5, "s1": 1.0, "s2": 0.25, "s3": 0.75, "s4": 0.0}
    shown = re.findall(
        r"(Best|Median|Worst) Dice (\d\.\d+) Image (\w+) (.+?) Group (\w+)", page.text
    )
    assert shown == [
        ("Best", "1.000", "s1", "LAO 30.0 CAU 25.0", "g1"),
        ("Median", "0.500", "s0", "LAO 30.0 CAU 25.0", "g0"),
        ("Worst", "0.000", "s4", "LAO 30.0 CAU 25.0", "g4"),
    ]
    interval = result.classes["vessel"]["dice"].interval
    assert interval is not None
    assert f"Mean Dice 0.500 95% interval {interval.low:.3f} to {interval.high:.3f}" in page.text


def colour(hexadecimal: str) -> np.ndarray:
    return np.array([int(hexadecimal[at : at + 2], 16) for at in (1, 3, 5)])


def nearest_difference(picture_HW3: np.ndarray, x: int, y: int, wanted: str) -> int:
    """How far from a colour the pixel nearest to it is, within 2 pixels of a point."""
    around = picture_HW3[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].astype(int)
    return int(np.abs(around - colour(wanted)).sum(axis=-1).min())


@pytest.mark.parametrize("num_channels", [0, 1, 3])
def test_contours_lie_on_the_borders_of_the_masks(tmp_path: Path, num_channels: int) -> None:
    config, _ = run_of(tmp_path, [Drawn(2)], num_channels=num_channels)
    page, _ = page_of(config)
    drawn_HW3 = page.picture("s0 with the borders")
    # 96 x 128 px at the resolution of the store's pictures, without their padding.
    height_px, width_px = drawn_HW3.shape[:2]
    assert (height_px, width_px) == ((384, 512) if num_channels else (756, 1008))
    cell_px = width_px * CELL_PX // MASK_WIDTH_PX
    assert cell_px == height_px * CELL_PX // MASK_HEIGHT_PX
    middle_y = 4 * cell_px
    assert nearest_difference(drawn_HW3, 3 * cell_px, middle_y, TRUE_COLOUR) < 90
    assert nearest_difference(drawn_HW3, 7 * cell_px, middle_y, TRUE_COLOUR) < 90
    assert nearest_difference(drawn_HW3, 5 * cell_px, middle_y, PREDICTED_COLOUR) < 90
    assert nearest_difference(drawn_HW3, 9 * cell_px, middle_y, PREDICTED_COLOUR) < 90
    # Between the borders there is nothing of either colour.
    for x in (1, 4, 6, 8, 12):
        for wanted in (TRUE_COLOUR, PREDICTED_COLOUR):
            assert nearest_difference(drawn_HW3, x * cell_px, middle_y, wanted) > 150
    if num_channels:
        picture_HW3 = page.picture("Picture of s0")
        assert picture_HW3.shape == (384, 512, 3)
        assert np.abs(picture_HW3.astype(int) - 100).max() <= 2
    else:
        assert "The store keeps no pictures" in page.text
        assert not any(alt.startswith("Picture") for alt in page.images)


def test_a_squashed_picture_is_shown_in_its_own_shape(tmp_path: Path) -> None:
    config, _ = run_of(tmp_path, [Drawn(2)], resize_mode="squash")
    page, _ = page_of(config)
    assert page.picture("Picture of s0").shape == (384, 512, 3)
    drawn_HW3 = page.picture("s0 with the borders")
    assert nearest_difference(drawn_HW3, 3 * 32, 4 * 32, TRUE_COLOUR) < 90
    assert page.picture("Features of s0").shape == (384, 512, 3)


def test_what_the_user_named_is_escaped(tmp_path: Path) -> None:
    name = '<img src=x onerror="alert(1)">&'
    config, _ = run_of(tmp_path, [Drawn(0, id=name, group="<b>g</b>")], classes=("$a_1$ <i>",))
    page, _ = page_of(config)
    assert page.text.count(name) >= 2
    assert "Group <b>g</b>" in page.text
    assert "mask ($a_1$ <i>)" in page.text
    assert page.tags["img"] == 4
    assert not {"x"} & set(page.links)


def test_notices_say_what_the_figures_stand_on(tmp_path: Path) -> None:
    synthetic = {"synthetic": "yes"}
    drawn = [
        Drawn(0, extra=synthetic),
        Drawn(1, extra=synthetic, has_mask=False),
        Drawn(0, extra=synthetic, is_empty=True),
    ]
    config, _ = run_of(tmp_path, drawn, settings={"backbone": "sam3-mini"}, seal=False)
    page, result = page_of(replace(config, allow_unsealed=True))
    beginnings = (
        "3 of 3 pictures are synthetic angiograms, drawn and not measured: nothing here speaks of "
        "patients.",
        "The features come from sam3-mini, a miniature of SAM 3's classes pretrained on synthetic "
        "angiograms: this shows that the road works, not how good SAM 3 is.",
        "The store is not sealed",
        "Only 3 groups of images: intervals from so few are wide",
        "1 of 3 images without a mask",
        "1 of 2 images have a mask without a pixel, and a prediction without one",
    )
    assert len(result.notices) == len(beginnings)
    for notice, beginning in zip(result.notices, beginnings, strict=True):
        assert notice.startswith(beginning)
        assert notice.endswith(".")
        assert notice in page.text
    summary = json.loads((result.output / "summary.json").read_text(encoding="utf-8"))
    assert tuple(summary["notices"]) == result.notices


@pytest.mark.parametrize("backbone", ["sam3-mini", "sam3"])
def test_features_of_random_weights_mean_nothing(tmp_path: Path, backbone: str) -> None:
    settings = {"backbone": backbone}
    config, _ = run_of(tmp_path, SPREAD, settings=settings, weights="random:12ab")
    page, result = page_of(config)
    assert result.notices[0] == "The features come from random weights: they mean nothing."
    assert not any("sam3-mini" in notice for notice in result.notices)
    assert result.notices[0] in page.text


def test_a_few_synthetic_pictures_among_others_are_told_apart(tmp_path: Path) -> None:
    config, _ = run_of(tmp_path, [Drawn(0), Drawn(1, extra={"synthetic": "yes"})])
    notice, few = evaluate(replace(config, page=False)).notices
    assert few.startswith("Only 2 groups")
    assert notice.startswith("1 of 2 pictures are synthetic angiograms")
    assert "nothing here" not in notice


def test_where_there_is_nothing_to_warn_of_there_is_no_box(tmp_path: Path) -> None:
    config, _ = run_of(tmp_path, [Drawn(shift % 4) for shift in range(6)])
    page, result = page_of(config)
    assert result.notices == ()
    assert "Before you read" not in page.text
    assert page.tags["aside"] == 0


METRICS = [
    {"epoch": 1, "train_loss": 0.9, "val_dice": 0.1},
    {"epoch": 2, "train_loss": 0.7, "val_dice": 0.3},
    {"epoch": 3, "train_loss": 0.5, "val_dice": 0.4},
    {"epoch": 4, "train_loss": 0.4, "val_dice": 0.35},
]


def write_metrics(run: Path, lines: list[object]) -> None:
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")


def test_curves_mark_the_epoch_that_was_measured(spread: EvalConfig) -> None:
    write_metrics(spread.checkpoint, [*METRICS])
    page, _ = page_of(spread)
    assert "The epoch measured here, 3, is marked." in page.text
    # Once for a screen, once for a phone.
    assert page.text.count("epoch 3: 0.500") == page.text.count("epoch 3: 0.400") == 2
    assert page.text.count("Validation Dice") == 2
    assert page.tags["svg"] == 6


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (None, "There are none: the run's metrics.jsonl is missing"),
        (["", "half a li", "[]"], "There are none: the run's metrics.jsonl is missing, or has no"),
        ([*METRICS, '{"epoch": 5, "train_l'], "cannot be read: 1, left out."),
        ([{"epoch": 3, "train_loss": 0.5}], "recorded no Dice of a validation split"),
        ([{"epoch": 3, "val_dice": 0.5}], "recorded no training loss"),
        (['{"epoch": 3, "train_loss": NaN, "val_dice": 0.2}'], "recorded no training loss"),
        ([*METRICS, f'{{"epoch": 5, "train_loss": {10**400}}}'], "measured here, 3, is marked."),
        (METRICS[:2], "measured here, 3, is not among those recorded"),
    ],
)
def test_metrics_that_are_missing_or_damaged_are_told(
    spread: EvalConfig, lines: list[object] | None, words: str
) -> None:
    if lines is not None:
        write_metrics(spread.checkpoint, lines)
    page, _ = page_of(spread)
    assert words in page.text


def test_a_checkpoint_outside_a_run_has_no_curves(spread: EvalConfig) -> None:
    write_metrics(spread.checkpoint, [*METRICS])
    moved = (spread.checkpoint / "best").rename(spread.checkpoint / "kept")
    page, _ = page_of(replace(spread, checkpoint=moved))
    assert "There are none: the checkpoint does not lie in the folder of a run." in page.text
    assert "Checkpoint kept" in page.text


def test_the_features_are_shown_beside_the_picture_at_its_size(spread: EvalConfig) -> None:
    page, _ = page_of(spread)
    assert page.picture("Features of s0").shape == page.picture("Picture of s0").shape
    assert "of level fpn_72, 4 channels at each of 16 × 16 places" in page.text
    shares = re.search(r"hold (\d+)% of the variance \((\d+)%, (\d+)%, (\d+)%\)", page.text)
    assert shares is not None
    held, first, second, third = map(int, shares.groups())
    assert abs(held - first - second - third) <= 2


def test_every_class_is_drawn_and_told(tmp_path: Path) -> None:
    config, _ = run_of(tmp_path, SPREAD, classes=("LAD", "LCX"))
    page, result = page_of(config)
    assert len(result.images) == 10
    assert "The borders of all 2 classes are drawn alike: LAD, LCX." in page.text
    assert "Median Dice 0.500 Image s0" in page.text
    assert "LAD 0.500, LCX 0.500" in page.text
    assert page.tags["svg"] == 8
    # The second plane begins one cell below the first, and ends one cell below it.
    drawn_HW3 = page.picture("s1 with the borders")
    for y in (2, 6, 3, 7):
        assert nearest_difference(drawn_HW3, 5 * 32, y * 32, PREDICTED_COLOUR) < 90


@pytest.mark.parametrize("mask", ["missing", "empty"])
def test_without_a_dice_there_are_no_cases_and_the_page_says_so(tmp_path: Path, mask: str) -> None:
    bare = Drawn(0, has_mask=mask != "missing", is_empty=mask == "empty")
    config, _ = run_of(tmp_path, [bare, bare])
    page, _ = page_of(config)
    assert "There are none to show: no image here has a mask and a Dice." in page.text
    assert "Mean Dice – No image here has a Dice" in page.text
    assert list(page.images) == ["Picture of s0", "Features of s0 as colours"]


@pytest.mark.parametrize(
    ("num_images", "title", "titles"),
    [
        (1, "The one case", ["Only image"]),
        (2, "Best and worst case", ["Best", "Worst"]),
        (3, "Best, median and worst case", ["Best", "Median", "Worst"]),
    ],
)
def test_no_image_is_shown_twice_where_there_are_few(
    tmp_path: Path, num_images: int, title: str, titles: list[str]
) -> None:
    config, _ = run_of(tmp_path, [Drawn(0)] * num_images)
    page, _ = page_of(config)
    assert title in page.text
    shown = re.findall(r"(Only image|Best|Median|Worst) Dice 1\.000 Image (s\d)", page.text)
    assert [name for name, _ in shown] == titles
    assert len({image for _, image in shown}) == num_images


def test_a_head_that_reads_no_level_of_a_tower_has_a_page(tmp_path: Path) -> None:
    name = "page_store:FromPicture"
    for has_features in (True, False):
        place = tmp_path / str(has_features)
        store = write_page_store(
            place / "a.zarr",
            [Drawn(0)],
            has_features=has_features,
            settings={"backbone": "sam3-mini"},
        )
        config = EvalConfig(store, write_run(place / "run", store, name), head=name)
        page, result = page_of(config)
        # No feature had a part in it.
        assert result.notices == ()
        if has_features:
            assert "The head reads the picture itself; these are features" in page.text
        else:
            assert "the store holds no features to show" in page.text


def test_what_the_head_makes_of_its_levels_is_told(tmp_path: Path) -> None:
    config, _ = run_of(tmp_path, [Drawn(shift % 4) for shift in range(12)])
    page, result = page_of(replace(config, check_features=True))
    use = result.feature_use
    assert use is not None
    assert f"Were the features used? {use.sentence}" in page.text
    (part,) = use.parts
    gain = part.true_minus_shuffled
    assert gain is not None
    assert gain.interval is not None
    assert (
        f"The image's own {use.dice_true:.4f} features (fpn_72) of another image "
        f"{part.dice_shuffled:.4f} {gain.mean:+.4f} {gain.interval.low:.4f} to "
        f"{gain.interval.high:.4f} 12 images of 12 groups compared"
    ) in page.text
    page, _ = page_of(replace(config, check_features=False))
    assert "Not asked: the evaluation ran without its features check." in page.text


def test_unknown_angles_are_called_unknown(tmp_path: Path) -> None:
    config, _ = run_of(tmp_path, [Drawn(0, angles_deg=(None, None)), Drawn(1)])
    page, _ = page_of(replace(config, check_angles=True))
    assert "Image s0 view unknown Group g0" in page.text
    assert "Whether the head uses the view angle cannot be told" in page.text


def test_the_same_evaluation_is_the_same_page_but_for_its_date(spread: EvalConfig) -> None:
    write_metrics(spread.checkpoint, [*METRICS])
    first, second = (page_of(spread)[0].html for _ in range(2))
    date = r"<span>\d{4}-\d\d-\d\d</span>"
    assert len(re.findall(date, first)) == 1
    assert re.sub(date, "", first) == re.sub(date, "", second)


def test_without_a_page_none_of_earlier_figures_stays(spread: EvalConfig) -> None:
    _, result = page_of(spread)
    again = evaluate(replace(spread, page=False))
    assert again.page is None
    assert json.loads((again.output / "summary.json").read_text(encoding="utf-8"))["page"] is None
    assert sorted(path.name for path in result.output.iterdir()) == [
        "per_image.csv",
        "summary.json",
    ]


def test_a_group_that_is_the_files_own_path_stays_off_the_page(tmp_path: Path) -> None:
    config, _ = run_of(tmp_path, [Drawn(0, group="images/0.png"), Drawn(1, group="Doe")])
    page, _ = page_of(config)
    assert "images/0.png" not in page.text
    assert "Group Doe" in page.text
