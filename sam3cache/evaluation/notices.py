"""What a reader of an evaluation has to know first: of its pictures, features and masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sam3cache.evaluation.predicting import IMAGE_LEVEL_PREFIX
from sam3cache.evaluation.report import EvalResult
from sam3cache.evaluation.spacing import num_unreadable
from sam3cache.evaluation.statistics import MIN_GROUPS
from sam3cache.features import FeatureStore, StoredSample
from sam3cache.heads import CheckpointInfo
from sam3cache.heads.checkpoint import LAST, is_to_be_replaced

MINIATURE = "sam3-mini"
OWN_WEIGHTS = "default"
"""What a store records of the weights where no others were named."""

RANDOM_WEIGHTS = "random:"
"""Begins the hash of weights that nobody trained."""


def notices_of(
    result: EvalResult,
    store: FeatureStore,
    samples: Sequence[StoredSample],
    info: CheckpointInfo,
) -> tuple[str, ...]:
    """Return whole sentences, the gravest first; none where there is nothing to warn of.

    Args:
        result: the figures.
        store: that was measured on.
        samples: the images that were measured.
        info: of the checkpoint.
    """
    sentences = [*_of_pictures(result.num_synthetic, result.num_images), *result.origin]
    if is_to_be_replaced(Path(result.checkpoint).parent):
        sentences.append(
            "This is the run of before: `train --overwrite` was ended before it was trained anew; "
            "`train --resume` does it."
        )
    num_seen, num_in_groups = result.num_seen_in_training, result.num_in_training_groups
    # Who measures on the training split asks for just that.
    if result.split != "train" and (num_seen or num_in_groups):
        sentences.append(
            f"The head was trained on {num_seen or 0} of these images, and on groups with the "
            f"names of {num_in_groups or 0} of them: scores on those say little about new ones."
        )
    sentences += _of_chosen_epoch(result, store, info)
    sentences += of_few_groups(result.num_groups)
    if result.threshold_choice.on_evaluated:
        sentences.append(
            f"The threshold was chosen on images of split {result.threshold_choice.split} that are "
            "measured here: scores are a little too high."
        )
    choice = result.threshold_choice
    if choice.num_seen:
        sentences.append(
            f"The threshold was chosen on {choice.num_images} images of split {choice.split}, of "
            f"which the head was trained on {choice.num_seen}: it is surer of those than of new "
            "ones, and the threshold may not suit these."
        )
    num_unknown = num_unreadable(samples)
    if num_unknown:
        sentences.append(
            f"{num_unknown} of {len(samples)} images have a pixel spacing that is not one or two "
            "positive numbers: they have no distances in millimetres."
        )
    if result.num_without_mask:
        sentences.append(
            f"{result.num_without_mask} of {len(samples)} images without a mask: they have no "
            "scores."
        )
    num_classes = len(result.classes)
    num_pairs = (result.num_images - result.num_without_mask) * num_classes
    of = "images" if num_classes == 1 else f"pairs of an image and one of {num_classes} classes"
    if result.num_empty_against_empty:
        sentences.append(
            f"{result.num_empty_against_empty} of {num_pairs} {of} have a mask without a pixel, "
            "and a prediction without one: they have no Dice and are left out of the means."
        )
    if result.num_one_empty:
        sentences.append(
            f"{result.num_one_empty} of {num_pairs} {of} have a prediction or a mask, but not "
            "both: there is no distance between borders then, so that the means of HD95 and ASSD "
            "leave such failures out."
        )
    return tuple(sentences)


def origin_of(result: EvalResult, store: FeatureStore, info: CheckpointInfo) -> tuple[str, ...]:
    """Say what limits all figures because of the features, masks and angles they come from."""
    sentences = [*notices_of_features(store, tuple(info.levels)), *_of_data(result, info)]
    if not store.sealed:
        sentences.append(
            "The store is not sealed: its extraction has not finished, so that images may be "
            "missing here."
        )
    return tuple(sentences)


def of_few_groups(num_groups: int) -> list[str]:
    """Say where there are too few groups for a verdict, and enough for an interval."""
    if not 1 < num_groups < MIN_GROUPS:
        return []
    return [f"Only {num_groups} groups of images: intervals from so few are wide, and say little."]


def num_synthetic(samples: Sequence[StoredSample]) -> int:
    """Count the pictures that were drawn by ``sam3cache phantom``."""
    return sum(sample.extra.get("synthetic") == "yes" for sample in samples)


def _of_chosen_epoch(result: EvalResult, store: FeatureStore, info: CheckpointInfo) -> list[str]:
    """Say where the images are those that the epoch was chosen on."""
    own_name = info.settings.get("store") == store.path.name
    own = own_name or info.data.get("samples_sha256") == result.data["samples_sha256"]
    if result.split not in ("val", "all") or not own or Path(result.checkpoint).name == LAST:
        return []
    return [
        "The checkpoint is that of the epoch with the highest Dice on split val, which is measured "
        "here: scores on it are a little too high."
    ]


def _of_data(result: EvalResult, info: CheckpointInfo) -> list[str]:
    """Say which labels and annotations of these pictures are not those of the training."""
    trained, here = info.data, result.data
    # Of other pictures they are others anyhow.
    if not trained or trained["samples_sha256"] != here["samples_sha256"]:
        return []
    different = []
    if trained["labels_sha256"] != here["labels_sha256"]:
        was = "" if info.label_set == result.label_set else f", trained on {info.label_set}"
        different.append(f"masks (label set {result.label_set}{was})")
    different += [
        name
        for name, digest in here["annotations_sha256"].items()
        if trained["annotations_sha256"].get(name) != digest
    ]
    if not different:
        return []
    return [
        f"The head was trained with other {', '.join(different)} of these pictures: corrected "
        "since, or others were chosen."
    ]


def _of_pictures(num_drawn: int, num_pictures: int) -> list[str]:
    """Say where pictures are not of patients.

    Args:
        num_drawn: of them that are synthetic.
        num_pictures: in all.
    """
    if not num_drawn:
        return []
    silent = "nothing here speaks" if num_drawn == num_pictures else "these do not speak"
    return [
        f"{num_drawn} of {num_pictures} pictures are synthetic angiograms, drawn and not "
        f"measured: {silent} of patients."
    ]


def notices_of_features(store: FeatureStore, read: Sequence[str]) -> list[str]:
    """Say what limits a figure because of the features that it comes from.

    Args:
        store: that holds them.
        read: levels that the head reads.
    """
    levels = [level for level in read if not level.startswith(IMAGE_LEVEL_PREFIX)]
    if not levels:
        return []
    hashes = [str(store.fingerprint(level).fields.get("weights_sha256", "")) for level in levels]
    if any(digest.startswith(RANDOM_WEIGHTS) for digest in hashes):
        return ["The features come from random weights: they mean nothing."]
    if store.settings.get("backbone") == MINIATURE:
        own = store.settings.get("weights") in (None, OWN_WEIGHTS)
        origin = " pretrained on synthetic angiograms" if own else ""
        return [
            f"The features come from {MINIATURE}, a miniature of SAM 3's classes{origin}: this "
            "shows that the road works, not how good SAM 3 is."
        ]
    return []
