"""Does a head use the features? Dice with an image's own and with those of another image.

A head with a stem of its own on the picture can learn to do without the tower's features, which
then cost their extraction for nothing. So each image is predicted again with its own angles and
its own picture, but with the features of an image of another group; and the other way round. Dice
of an image is that of the evaluation: the mean over its classes that are there or predicted.

Shape legend: N images, S shuffles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from sam3cache.evaluation.predicting import (
    IMAGE_LEVEL_PREFIX,
    Prediction,
    Rule,
    logits_of,
    predict,
)
from sam3cache.evaluation.shuffling import (
    NEGLIGIBLE_DICE,
    Difference,
    Verdict,
    Wording,
    derangement,
    difference,
    verdict,
)
from sam3cache.features import FeatureStore
from sam3cache.heads import Head
from sam3cache.loading import CachedSamples
from sam3cache.records import Batch

NUM_FEATURE_SHUFFLES = 2
"""Each reads the split's features once more; that there are several images evens out the rest."""


@dataclass(frozen=True, slots=True)
class PartUse:
    """What a head makes of some of the levels that it reads.

    Attributes:
        levels: given of another image, all at once.
        verdict: see ``shuffling.Verdict``.
        sentence: the verdict and its reason in plain words.
        dice_shuffled: mean Dice with the levels of other images.
        true_minus_shuffled: paired difference of Dice.
        max_probability_change: largest change of any probability under shuffling.
    """

    levels: tuple[str, ...]
    verdict: Verdict
    sentence: str
    dice_shuffled: float | None = None
    true_minus_shuffled: Difference | None = None
    max_probability_change: float | None = None


@dataclass(frozen=True, slots=True)
class FeatureUse:
    """What a head makes of what it reads of the store.

    Attributes:
        verdict: on the tower's features, or on the picture where it reads nothing else.
        sentence: of the features and of the picture, with their reasons, in plain words.
        num_images: images compared: those with a mask that is not empty.
        num_groups: groups that these belong to.
        num_shuffles: shuffles that each shuffled Dice is averaged over.
        dice_true: mean Dice with the images' own levels.
        parts: the tower's features together, each of them where there are several, the picture.
    """

    verdict: Verdict
    sentence: str
    num_images: int = 0
    num_groups: int = 0
    num_shuffles: int = NUM_FEATURE_SHUFFLES
    dice_true: float | None = None
    parts: tuple[PartUse, ...] = ()


@dataclass
class _Part:
    """A part while it is measured."""

    levels: tuple[str, ...]
    wording: Wording
    dice_SN: NDArray[np.float64]
    max_change: float = field(default=0.0)


class FeatureCheck:
    """Dice of every image with its own levels, and with those of an image of another group.

    Shuffles go across the whole split, not within batches; what is given to a batch is read from
    the store in step with it, so that memory holds a batch of each.

    Args:
        store: that the levels are read from.
        cached: the images.
        levels: that the head reads.
        has_mask: by image; without one it takes no part.
        batch_size: that ``cached`` is iterated by.
        seed: of the shuffles.
        device: where batches are made.
    """

    def __init__(
        self,
        store: FeatureStore,
        cached: CachedSamples,
        levels: Sequence[str],
        has_mask: Sequence[bool],
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self._cached = cached
        self._true_N = np.full(len(cached), np.nan)
        shuffled_SN = np.stack([self._true_N] * NUM_FEATURE_SHUFFLES)
        self._parts = [_Part(part, wording, shuffled_SN.copy()) for part, wording in _parts(levels)]
        self._reads_features = any(not name.startswith(IMAGE_LEVEL_PREFIX) for name in levels)
        self._donors: list[tuple[NDArray[np.intp], Iterator[Batch]]] = []
        among_whom = exchanges(cached, np.flatnonzero(has_mask))
        self._can_shuffle = bool(among_whom)
        rng = np.random.default_rng(seed)
        for _ in range(NUM_FEATURE_SHUFFLES if among_whom else 0):
            donor_N = np.full(len(cached), -1, dtype=np.intp)
            for among_M, kind_M in among_whom:
                donor_M = derangement(kind_M, rng)
                donor_N[among_M] = np.where(donor_M >= 0, among_M[donor_M], -1)
            # Who is left out is given its own: batches stay of one size, and it is not scored.
            given_N = np.where(donor_N >= 0, donor_N, np.arange(len(cached)))
            rows = [cached.rows[i] for i in given_N]
            donors = CachedSamples(store, rows, levels, device=device, residency="stream")
            self._donors.append((donor_N, donors.iterate(batch_size)))

    def compare(self, head: Head, batch: Batch, true: Mapping[int, Prediction], rule: Rule) -> None:
        """Predict the next batch again with levels of other images.

        Args:
            head: the head.
            batch: with the images' own levels.
            true: by index of the image, what the head made of it, in the batch's order.
            rule: how logits become masks.
        """
        for i, prediction in true.items():
            if prediction.scores is not None:
                self._true_N[i] = prediction.dice()
        for s, (donor_N, donors) in enumerate(self._donors):
            given = next(donors)
            here = {i for i in true if donor_N[i] >= 0}
            if not here:
                continue
            for part in self._parts:
                levels = {**batch.levels, **{name: given.levels[name] for name in part.levels}}
                logits_BKSS = logits_of(head, replace(batch, levels=levels))
                for i, logits_KSS in zip(true, logits_BKSS, strict=True):
                    if i not in here:
                        continue
                    letterbox, own = self._cached.letterbox(i), true[i]
                    prediction = predict(logits_KSS, letterbox, own.mask_CHW, rule)
                    part.dice_SN[s, i] = prediction.dice()
                    change = (prediction.probability_CHW - own.probability_CHW).abs().max()
                    part.max_change = max(part.max_change, float(change))

    def result(self, groups: Sequence[str], seed: int) -> FeatureUse:
        """Judge, once all batches have been compared.

        Args:
            groups: by image, its group.
            seed: of the bootstrap.
        """
        what = "features" if self._reads_features else "picture"
        unknown = f"Whether the head uses the {what} cannot be told: "
        if not self._can_shuffle:
            return FeatureUse(
                "undecided",
                f"{unknown}no two groups here have a mask and images of one size to shuffle.",
            )
        judged = [self._judge(part, groups, seed) for part in self._parts]
        # What is compared is the same in all parts: the images decide, not the levels.
        images = np.flatnonzero(self._compared(self._parts[0]))
        if not len(images):
            return FeatureUse("undecided", f"{unknown}all masks here are empty.")
        main = [judged[0], *(p for p in judged[1:] if p.levels == _pictures(p.levels))]
        sentence = " ".join(part.sentence for part in main)
        if not self._reads_features:
            sentence = f"The head reads no features of a tower. {sentence}"
        return FeatureUse(
            judged[0].verdict,
            sentence,
            num_images=len(images),
            num_groups=len({groups[i] for i in images}),
            dice_true=float(self._true_N[images].mean()),
            parts=tuple(judged),
        )

    def _compared(self, part: _Part) -> NDArray[np.bool_]:
        return np.asarray(np.isfinite(self._true_N) & np.isfinite(part.dice_SN).any(axis=0))

    def _judge(self, part: _Part, groups: Sequence[str], seed: int) -> PartUse:
        images = np.flatnonzero(self._compared(part))
        if not len(images):
            return PartUse(part.levels, "undecided", "")
        true, shuffled = self._true_N[images], np.nanmean(part.dice_SN[:, images], axis=0)
        groups_here = [groups[i] for i in images]
        gain = difference(true - shuffled, groups_here, seed)
        judged, sentence = verdict(
            part.wording,
            gain,
            len(set(groups_here)),
            part.max_change,
            finds_nothing=max(true.mean(), shuffled.mean()) <= NEGLIGIBLE_DICE,
        )
        return PartUse(part.levels, judged, sentence, float(shuffled.mean()), gain, part.max_change)


def exchanges(
    cached: CachedSamples, with_mask: NDArray[np.intp]
) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Return the images that can be given each other's features, and the group of each.

    They lie alike on the padded square: else one would be given the padding of another, and lose
    Dice for that.
    """
    boxes = [cached.letterbox(i) for i in with_mask]
    sizes = np.array([(box.content_height_px, box.content_width_px) for box in boxes])
    found = []
    for size in np.unique(sizes.reshape(-1, 2), axis=0):
        among = with_mask[(sizes == size).all(axis=1)]
        groups, kind = np.unique([cached.samples[i].group for i in among], return_inverse=True)
        if len(groups) > 1:
            found.append((among, kind))
    return found


def _pictures(levels: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in levels if name.startswith(IMAGE_LEVEL_PREFIX))


def _parts(levels: Sequence[str]) -> list[tuple[tuple[str, ...], Wording]]:
    """Return what is shuffled together: all features, each level of several, the picture."""
    pictures = _pictures(levels)
    features = tuple(name for name in levels if name not in pictures)
    parts = []
    if features:
        parts.append((features, Wording("the features", "features", "images")))
    if len(features) > 1:
        parts += [
            ((name,), Wording(f"level {name}", f"features of {name}", "images"))
            for name in features
        ]
    if pictures:
        parts.append((pictures, Wording("the picture", "pictures", "images")))
    return parts
