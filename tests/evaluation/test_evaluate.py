import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from compare_store import HEAD as SHIFTED
from compare_store import write_shifted
from page_store import Drawn, write_page_store
from store_builder import build_store
from torch.nn import functional as F
from view_store import (
    FINGERPRINT,
    LEVEL,
    MASK_HEIGHT_PX,
    MASK_WIDTH_PX,
    View,
    write_checkpoint,
    write_view_store,
)

from sam3cache.errors import (
    CheckpointError,
    ConfigError,
    FingerprintError,
    MissingSampleError,
    NotAStoreError,
    Sam3CacheError,
    UnsealedStoreError,
)
from sam3cache.evaluation import EvalConfig, EvalResult, ImageScore, evaluate
from sam3cache.features import open_store
from sam3cache.heads import load_checkpoint
from sam3cache.heads.film_conv import FilmConv
from sam3cache.loading import CachedSamples
from sam3cache.loading.folds import fold_of_groups
from sam3cache.training import TrainConfig, train
from sam3cache.training.division import trained_on

VIEWS: list[View] = [(-30.0 + 70.0 * (i % 2), float(i)) for i in range(12)]
SIDED = "view_store:Sided"
SMALL = {"embedding_dim": 32, "widths": [8, 8]}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_view_store(tmp_path / "a.zarr", VIEWS)


@pytest.fixture
def sided(tmp_path: Path) -> Path:
    """A run whose head predicts the right half from the angle alone."""
    return write_checkpoint(tmp_path / "sided", SIDED)


# The page takes longer than the figures here; test_page.py has its tests.
figures_alone = partial(EvalConfig, page=False)


def config(store: Path, run: Path) -> EvalConfig:
    return figures_alone(store, run, head=SIDED)


def test_a_perfect_head_scores_one_on_the_masks_own_grid(store: Path, sided: Path) -> None:
    result = evaluate(config(store, sided))
    assert [image.dice for image in result.images] == [1.0] * 12
    assert {image.true_px for image in result.images} == {MASK_HEIGHT_PX * MASK_WIDTH_PX // 2}
    assert result.images[0].predicted_px == MASK_HEIGHT_PX * MASK_WIDTH_PX // 2
    assert (result.num_images, result.num_groups, result.num_without_mask) == (12, 12, 0)


def test_scores_are_those_of_an_independent_computation(store: Path, tmp_path: Path) -> None:
    """Upsampled by torch's own interpolation, cropped and counted with numpy."""
    run = write_checkpoint(tmp_path / "run", "linear")
    result = evaluate(figures_alone(store, run, batch_size=5))
    opened = open_store(store)
    head, _ = load_checkpoint(run / "best")
    batch = CachedSamples(opened, range(12), ["fpn_72"]).batch(range(12))
    with torch.inference_mode():
        logits_B1SS = head(batch)
    # 72 x 96 px fill 756 x 1008 of the square: 54 of the 72 rows; the mask's grid is 36 x 48.
    content_B1SS = logits_B1SS[:, :, :54]
    grid_B1HW = F.interpolate(content_B1SS, (MASK_HEIGHT_PX, MASK_WIDTH_PX), mode="bilinear")
    for i, image in enumerate(result.images):
        predicted = grid_B1HW[i, 0].numpy() >= 0
        mask = opened.read_mask(i)
        assert mask is not None
        true = mask[0] == 1
        hits = (predicted & true).sum()
        expected = (
            2 * hits / (predicted.sum() + true.sum()),
            hits / (predicted | true).sum(),
            hits / predicted.sum(),
            hits / true.sum(),
        )
        # A probability within rounding of the threshold may fall on either side of it.
        scores = (image.dice, image.iou, image.precision, image.recall)
        assert scores == pytest.approx(expected, abs=2e-3)
        assert image.predicted_px == pytest.approx(predicted.sum(), abs=2)
    dice = [image.dice for image in result.images]
    assert result.classes["vessel"]["dice"].mean == pytest.approx(np.mean(dice))  # type: ignore[arg-type]


def test_images_without_a_mask_and_empty_ones_are_counted_not_averaged(
    tmp_path: Path, sided: Path
) -> None:
    empty = np.zeros((1, MASK_HEIGHT_PX, MASK_WIDTH_PX), dtype=np.uint8)
    ignored = np.full_like(empty, 255)
    store = write_view_store(tmp_path / "b.zarr", VIEWS, masks={0: None, 1: empty, 2: ignored})
    result = evaluate(config(store, sided))
    missing, wrong, nothing = result.images[:3]
    assert (missing.dice, missing.true_px, missing.predicted_px) == (None, None, 72 * 48)
    assert (wrong.dice, wrong.recall, wrong.precision) == (0.0, None, 0.0)
    assert (nothing.dice, nothing.predicted_px, nothing.true_px) == (None, 0, None)
    assert (result.num_without_mask, result.num_empty_against_empty) == (1, 0)
    assert result.classes["vessel"]["dice"].num_values == 10
    assert result.classes["vessel"]["recall"].num_values == 9


def test_the_batch_size_changes_no_score(store: Path, tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", "film-conv", options=SMALL)
    one, many = (evaluate(figures_alone(store, run, batch_size=size)) for size in (1, 12))
    for a, b in zip(one.images, many.images, strict=True):
        assert a.dice == pytest.approx(b.dice, abs=1e-3)


def test_every_image_is_a_line_of_the_csv_and_the_summary_is_json(
    tmp_path: Path, sided: Path
) -> None:
    store = write_view_store(tmp_path / "a.zarr", [*VIEWS, (None, None)])
    result = evaluate(config(store, sided))
    assert result.output == sided / "eval-test"
    with (result.output / "per_image.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [f.name for f in fields(ImageScore) if f.name != "annotations"]
    assert [line["id"] for line in lines] == [f"s{i}" for i in range(13)]
    assert (lines[0]["primary_angle_deg"], lines[12]["primary_angle_deg"]) == ("-30.0", "")
    assert lines[0]["source"] == "images/0.png"
    summary = json.loads((result.output / "summary.json").read_text(encoding="utf-8"))
    assert summary == json.loads(json.dumps(result.record()))
    assert summary["classes"]["vessel"]["dice"]["mean"] == 1.0
    assert summary["bootstrap"]["unit"] == "group"
    assert summary["epoch"] == 7


def test_results_repeat_exactly_and_may_be_written_again(store: Path, sided: Path) -> None:
    first, second = evaluate(config(store, sided)), evaluate(config(store, sided))
    assert replace(first, elapsed_s=0) == replace(second, elapsed_s=0)


def test_a_checkpoint_is_named_by_its_run_or_by_itself(store: Path, sided: Path) -> None:
    by_run = evaluate(config(store, sided))
    by_itself = evaluate(config(store, sided / "best"))
    assert by_run.checkpoint == by_itself.checkpoint
    assert by_itself.output == sided / "best" / "eval-test"


def test_another_store_of_the_same_fingerprint_is_welcome(tmp_path: Path, sided: Path) -> None:
    other = write_view_store(tmp_path / "other.zarr", VIEWS[:7], split="train")
    result = evaluate(replace(config(other, sided), split="all"))
    assert (result.num_images, result.classes["vessel"]["dice"].mean) == (7, 1.0)


def test_the_threshold_is_the_checkpoints_unless_given(store: Path, tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", "linear")
    default = evaluate(figures_alone(store, run))
    strict = evaluate(figures_alone(store, run, threshold=0.9))
    assert (default.threshold, strict.threshold) == (0.5, 0.9)
    assert sum(i.predicted_px for i in strict.images) < sum(i.predicted_px for i in default.images)


def refused(tmp_path: Path, change: str) -> EvalResult:
    """Evaluate with one thing wrong."""
    store = write_view_store(tmp_path / "a.zarr", VIEWS, seal=change != "unsealed")
    run = write_checkpoint(
        tmp_path / "run",
        SIDED,
        fingerprint=FINGERPRINT | {"weights_sha256": "old"} if change == "weights" else None,
    )
    good = config(store, run)
    if change == "class numbers":
        mask = np.full((1, MASK_HEIGHT_PX, MASK_WIDTH_PX), 14, dtype=np.uint8)
        other = write_view_store(tmp_path / "c.zarr", VIEWS, masks={3: mask})
        return evaluate(replace(good, store=other))
    if change == "another store's results":
        evaluate(good)
        other = write_view_store(tmp_path / "b.zarr", VIEWS, masks={3: None})
        return evaluate(replace(good, store=other))
    if change == "a file in the way":
        (run / "eval-test").write_text("", encoding="utf-8")
    bad = {
        "no store": replace(good, store=tmp_path),
        "no checkpoint": replace(good, checkpoint=tmp_path / "absent"),
        "split": replace(good, split="val"),
        "label set": replace(good, label_set="vessels"),
        "head": replace(good, head=None),
    }
    return evaluate(bad.get(change, good))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ("no store", NotAStoreError, "is not a feature store"),
        ("unsealed", UnsealedStoreError, "--allow-unsealed"),
        ("no checkpoint", CheckpointError, "no checkpoint at"),
        ("weights", FingerprintError, "weights_sha256 old → w"),
        ("split", ConfigError, "no images in split val (it has: 12 test)"),
        ("label set", MissingSampleError, "no label set vessels (it has: mask)"),
        ("head", CheckpointError, "name it again with --head"),
        ("class numbers", ConfigError, "mask of s3 holds class numbers"),
        ("another store's results", ConfigError, "holds the results on another store"),
        ("a file in the way", ConfigError, "name another folder by -o"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    tmp_path: Path, change: str, error: type[Sam3CacheError], words: str
) -> None:
    with pytest.raises(Sam3CacheError) as caught:
        refused(tmp_path, change)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_refused_leaves_no_folder(tmp_path: Path, store: Path, sided: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(ConfigError, match="no images in split val"):
        evaluate(replace(config(store, sided), output=folder, threshold="auto"))
    assert not folder.exists()


def test_a_run_that_is_still_to_be_replaced_is_said(store: Path, sided: Path) -> None:
    (sided / ".to-replace").touch()
    notices = evaluate(config(store, sided)).notices
    assert any(sentence.startswith("This is the run of before:") for sentence in notices)


@pytest.mark.parametrize("content", ['{"runs": []}', "[1]", "Fläche", '{"store": null}'])
def test_what_is_of_something_else_is_not_written_over(
    tmp_path: Path, store: Path, sided: Path, content: str
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    summary = folder / "summary.json"
    summary.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match="is of something else than an evaluation; name another"):
        evaluate(replace(config(store, sided), output=folder))
    assert summary.read_text(encoding="latin-1") == content
    # What was once ours and is damaged is written anew.
    (folder / "per_image.csv").write_text("id\n", encoding="utf-8")
    assert evaluate(replace(config(store, sided), output=folder)).num_images == len(VIEWS)


def test_an_evaluation_that_ends_between_its_files_leaves_no_summary_of_others(
    tmp_path: Path, store: Path, sided: Path
) -> None:
    settings = replace(config(store, sided), output=tmp_path / "out")
    evaluate(settings)
    images = tmp_path / "out" / "per_image.csv"
    images.unlink()
    (images / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=r"per_image\.csv"):
        evaluate(replace(settings, threshold=0.9))
    assert not (tmp_path / "out" / "summary.json").exists()
    shutil.rmtree(images)
    assert evaluate(settings).threshold == 0.5


def test_an_unsealed_store_is_evaluated_when_asked_for(tmp_path: Path, sided: Path) -> None:
    store = write_view_store(tmp_path / "a.zarr", VIEWS, seal=False)
    result = evaluate(replace(config(store, sided), allow_unsealed=True))
    assert not result.sealed
    assert result.classes["vessel"]["dice"].mean == 1.0


@pytest.mark.parametrize(
    "setting",
    [{"split": "tset"}, {"threshold": 0.0}, {"threshold": 1.5}, {"batch_size": 0}, {"seed": -1}],
)
def test_a_setting_that_cannot_be_used_is_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting)).replace("_", " ")):
        EvalConfig(Path("a.zarr"), Path("run"), **setting)  # type: ignore[arg-type]


def test_a_head_that_lives_by_the_angle_is_told(store: Path, sided: Path) -> None:
    use = evaluate(config(store, sided)).angle_use
    assert use is not None
    assert use.verdict == "used"
    assert use.sentence.startswith("The head uses the view angle: true angles give ")
    assert use.dice_true == 1.0
    assert use.dice_shuffled is not None
    assert use.dice_shuffled < 0.7
    # Constant angles are right for one half of the images, and wrong for the other.
    assert use.dice_constant == 0.5
    assert use.max_probability_change == pytest.approx(1.0)


def test_a_head_misled_by_the_angle_is_told(store: Path, tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", SIDED, options={"gain": -50.0})
    use = evaluate(config(store, run)).angle_use
    assert use is not None
    assert use.verdict == "harmful"


def silence_film(head: torch.nn.Module) -> None:
    """Let the view encoder stay, and its modulation do nothing."""
    assert isinstance(head, FilmConv)
    torch.nn.init.zeros_(head.film.scale_shift.weight)


@pytest.mark.parametrize("head", ["linear", "film-conv"])
def test_a_head_that_ignores_the_angle_is_told(store: Path, tmp_path: Path, head: str) -> None:
    options, edit = (SMALL, silence_film) if head == "film-conv" else ({}, lambda head: None)
    run = write_checkpoint(tmp_path / "run", head, options=options, edit=edit)
    use = evaluate(figures_alone(store, run)).angle_use
    assert use is not None
    assert use.verdict == "unused"
    assert use.max_probability_change == 0.0
    assert use.sentence.startswith("The head does not use the view angle: ")


@pytest.mark.parametrize(
    ("views", "reason"),
    [([(30.0, -25.0)] * 8, "LAO 30.0 CAU 25.0"), ([(None, None)] * 8, "known angles")],
)
def test_one_view_or_none_leaves_the_question_open(
    tmp_path: Path, sided: Path, views: list[View], reason: str
) -> None:
    store = write_view_store(tmp_path / "b.zarr", views)
    use = evaluate(config(store, sided)).angle_use
    assert use is not None
    assert use.verdict == "undecided"
    assert "cannot be told" in use.sentence
    assert reason in use.sentence


def test_a_head_whose_masks_the_angle_does_not_change_hardly_uses_it(
    store: Path, tmp_path: Path
) -> None:
    def predict_everything(head: torch.nn.Module) -> None:
        """Shift the logits of an untrained head, which the angle moves a little, away from 0."""
        assert isinstance(head, FilmConv)
        head.segmentation[-1].bias.data += 3  # type: ignore[union-attr, operator]

    run = write_checkpoint(tmp_path / "run", "film-conv", options=SMALL, edit=predict_everything)
    use = evaluate(figures_alone(store, run)).angle_use
    assert use is not None
    assert use.verdict == "negligible", use.sentence
    assert use.sentence.startswith("The head hardly uses the view angle: ")
    assert use.max_probability_change is not None
    assert use.max_probability_change > 0


def test_a_head_trained_on_views_is_found_to_use_them(store: Path, tmp_path: Path) -> None:
    def train(head: torch.nn.Module) -> None:
        optimiser = torch.optim.AdamW(head.parameters(), lr=1e-3)
        batch = CachedSamples(open_store(store), range(12), ["fpn_72"], target_size_px=72).batch(
            range(12)
        )
        assert batch.target_BKTT is not None
        counted = batch.target_BKTT != 255
        for _ in range(40):
            loss = F.binary_cross_entropy_with_logits(
                head(batch)[counted], batch.target_BKTT[counted].float()
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    run = write_checkpoint(tmp_path / "run", "film-conv", options=SMALL, edit=train)
    use = evaluate(figures_alone(store, run)).angle_use
    assert use is not None
    assert use.verdict == "used", use.sentence
    assert use.dice_true is not None
    assert use.dice_true > 0.9


def test_the_angles_check_can_be_left_out(store: Path, sided: Path) -> None:
    assert evaluate(replace(config(store, sided), check_angles=False)).angle_use is None


def test_the_levels_and_data_measured_are_recorded(store: Path, sided: Path) -> None:
    result = evaluate(config(store, sided))
    assert result.levels == {"fpn_72": open_store(store).fingerprint("fpn_72").digest}
    assert len(result.data_sha256) == 64
    assert LEVEL.name in result.levels


def test_folds_are_dealt_again_only_on_the_images_that_they_were_made_of(tmp_path: Path) -> None:
    splits = ("train", "train", "val")
    store = write_page_store(tmp_path / "x.zarr", [Drawn(i % 4) for i in range(12)], splits=splits)
    other = write_page_store(tmp_path / "y.zarr", [Drawn(i % 3) for i in range(9)], splits=splits)
    settings = {"folds": 3, "fold": 1, "fold_seed": 0, "stratify": None, "store": "x.zarr"}
    run = write_shifted(tmp_path / "run", store, 0, settings=settings)
    quick = {"check_angles": False, "check_features": False, "page": False, "head": SHIFTED}

    def ids(where: Path, split: str) -> set[str]:
        output = tmp_path / f"{where.stem}-{split}"
        result = evaluate(EvalConfig(where, run, split=split, output=output, **quick))  # type: ignore[arg-type]
        with (result.output / "per_image.csv").open(encoding="utf-8", newline="") as file:
            return {line["id"] for line in csv.DictReader(file)}

    fold_of = fold_of_groups(open_store(store).samples, 3, 0, None)
    held_out = {s.id for s in open_store(store).samples if fold_of[s.group] == 1}
    assert ids(store, "val") == held_out
    assert ids(store, "train") == {f"s{i}" for i in range(12)} - held_out
    with pytest.raises(ConfigError, match="no longer has the folds"):
        ids(other, "val")
    chosen = "The checkpoint is that of the epoch with the highest Dice on split val"
    notices = evaluate(EvalConfig(store, run, split="val", **quick)).notices  # type: ignore[arg-type]
    assert any(sentence.startswith(chosen) for sentence in notices)
    # The last epoch is the last, whatever it reached.
    last = Path(shutil.copytree(run / "best", run / "last"))
    notices = evaluate(EvalConfig(store, last, split="val", **quick)).notices  # type: ignore[arg-type]
    assert not any(sentence.startswith(chosen) for sentence in notices)


@pytest.mark.parametrize("split", ["val", "test"])
def test_of_a_fold_no_image_that_was_learned_from_counts_as_held_out(
    tmp_path: Path, split: str
) -> None:
    def write(name: str, splits: str, ids: Sequence[int] = ()) -> Path:
        # With a group each that stays with its image, whatever the row.
        drawn = [Drawn(0, id=f"s{i}", group=f"g{i}") for i in ids or range(len(splits))]
        named = tuple({"t": "train", "v": "val", "x": "test"}[letter] for letter in splits)
        return write_page_store(tmp_path / name, drawn, splits=named)

    store = write("x.zarr", "ttvttvttvttvx")
    samples = open_store(store).samples[:12]
    fold_of = fold_of_groups(samples, 3, 0, None)
    held_out = {sample.id for sample in samples if fold_of[sample.group] == 1}
    settings = {"folds": 3, "fold": 1, "fold_seed": 0, "stratify": None}
    learned = trained_on([sample for sample in samples if sample.id not in held_out])
    run = write_shifted(tmp_path / "run", store, 0, settings=settings, trained_on=learned)

    def found(where: Path) -> EvalResult:
        output = tmp_path / f"of-{where.stem}"
        threshold = "auto" if split == "test" else None
        return evaluate(
            figures_alone(where, run, split=split, output=output, threshold=threshold, head=SHIFTED)
        )

    # One more picture to test on changes no fold.
    result = found(write("more.zarr", "ttvttvttvttvxx"))
    if split == "val":
        assert {image.id for image in result.images} == held_out
    else:
        assert result.threshold_choice.num_images == len(held_out)
    # Other groups are dealt otherwise.
    with pytest.raises(ConfigError, match="no longer has the folds") as refused:
        found(write("fewer.zarr", "ttvttvttx"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("empty_mask_rows", [(), (4,)], ids=["all-filled", "one-empty"])
def test_the_validation_dice_is_the_one_that_training_saw(
    tmp_path: Path, empty_mask_rows: tuple[int, ...]
) -> None:
    store = build_store(
        tmp_path / "a.zarr",
        num_samples=8,
        level_shapes={"fpn_72": (4, 72, 72)},
        empty_mask_rows=empty_mask_rows,
    )
    trained = train(
        TrainConfig(
            *(str(store), "run", "linear"),
            output=str(tmp_path),
            epochs=2,
            learning_rate=0.1,
            loss_size_px=72,
            device="cpu",
        )
    )
    result = evaluate(figures_alone(store, trained.run_dir, split="val"))
    assert result.classes["vessel"]["dice"].mean == pytest.approx(trained.best_dice)
    assert trained.best_dice > 0


def test_images_and_groups_that_the_head_was_trained_on_are_counted(
    tmp_path: Path,
) -> None:
    """Images 0, 3 and 6 are trained on; each two images in order are a group."""
    shapes = {"fpn_72": (4, 12, 12)}
    store = build_store(tmp_path / "x.zarr", num_samples=9, level_shapes=shapes)
    trained = train(
        TrainConfig(
            *(str(store), "run", "linear"),
            output=str(tmp_path),
            epochs=1,
            loss_size_px=12,
            device="cpu",
        )
    )
    other = build_store(
        tmp_path / "y.zarr", num_samples=9, level_shapes=shapes, splits=("test", "val", "train")
    )
    strange = build_store(tmp_path / "z.zarr", num_samples=9, level_shapes=shapes, seed=1)
    for path, split, expected in (
        (store, "train", (3, 3)),
        (store, "val", (0, 2)),  # 1 with 0 and 7 with 6, but 4 with 5
        (other, "test", (3, 3)),
        (other, "all", (3, 6)),
        (strange, "all", (0, 6)),
    ):
        result = evaluate(
            figures_alone(
                *(path, trained.run_dir),
                split=split,  # type: ignore[arg-type]
                check_angles=False,
                output=tmp_path / path.stem,
            )
        )
        assert (result.num_seen_in_training, result.num_in_training_groups) == expected
        summary = json.loads((result.output / "summary.json").read_bytes())
        assert (summary["num_seen_in_training"], summary["num_in_training_groups"]) == expected


def test_a_checkpoint_that_lists_no_training_images_is_not_said_to_know_none(
    store: Path, sided: Path
) -> None:
    result = evaluate(config(store, sided))
    assert (result.num_seen_in_training, result.num_in_training_groups) == (None, None)
