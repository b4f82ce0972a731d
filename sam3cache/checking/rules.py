"""What the samples of a manifest, as they were looked at, say of it: finding after finding."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from sam3cache.checking.findings import MAX_NAMED, Case, Finding, Severity
from sam3cache.checking.look import Look
from sam3cache.checking.shift import Shift, common_shift
from sam3cache.images import Manifest
from sam3cache.records import SPLITS, Sample, SetAside
from sam3cache.views import view_region

FULL_SHARE = 0.995
"""Share of a mask from which on it is taken for full: a border may be left."""

LEAST_GREY_LEVELS = 8
"""Of 255, between the darkest and the brightest pixel; below is a picture of nothing."""

MAX_SIZE_DIFFERENCE = 0.3
"""Share of a split's pictures that would need another size for it to be as the training split."""

MIN_COMPARED = 10
"""Samples from which on shares and repeated values say something."""

MAX_ZERO_VIEWS = 0.2
"""Share of views of exactly 0/0 degrees from which on they look like a filled gap."""


@dataclass(frozen=True, slots=True)
class Looked:
    """A sample of the manifest that can be used, and what was seen of it."""

    sample: Sample
    look: Look


@dataclass(frozen=True, slots=True)
class Limits:
    """What findings depend on, beside the data.

    Attributes:
        min_samples: of a class, or of a column's value, in each split.
        allow_leak: whether groups and pictures may be in several splits.
    """

    min_samples: int
    allow_leak: bool


def findings_of(
    manifest: Manifest,
    looked: Sequence[Looked],
    problems: Sequence[SetAside],
    classes: Sequence[str],
    by: Sequence[str],
    limits: Limits,
) -> Iterator[Finding]:
    """Yield all findings, some of them without a case.

    Args:
        manifest: that was checked.
        looked: its samples that can be used.
        problems: those that cannot, beside what the manifest has set aside itself.
        classes: names of the masks' classes.
        by: other columns, whose values are counted by split as classes are.
        limits: what findings depend on.
    """
    yield Finding(
        "unusable",
        "error",
        "cannot be used",
        tuple(Case((p.id,), p.bare_reason) for p in (*manifest.set_aside, *problems)),
        "files that can be read, and values in their range",
        "mend or remove them; extract would set these samples aside and go on",
    )
    yield from _leaks(manifest.samples, limits)
    yield from _duplicates(looked, limits)
    yield from _masks(looked)
    yield from _pictures(looked)
    yield from _angles(looked)
    yield from _splits(manifest, looked)
    yield from _classes(looked, classes, by, limits)


def _leaks(samples: Iterable[Sample], limits: Limits) -> Iterator[Finding]:
    splits: dict[str, Counter[str]] = defaultdict(Counter)
    names: dict[str, dict[str, str]] = defaultdict(dict)
    for sample in samples:
        splits[sample.group][sample.split] += 1
        names[sample.group].setdefault(sample.split, sample.id)
    yield Finding(
        "group-in-several-splits",
        _unless(limits.allow_leak),
        "one group in several splits",
        tuple(
            Case(tuple(names[group].values()), f"group {group}: {_counts(counts)}")
            for group, counts in splits.items()
            if len(counts) > 1
        ),
        "all samples of a group (a patient) in one split",
        "correct the split or the group; or divide anew once the store is there, by `sam3cache "
        "store annotations split`" + _if_meant(limits),
    )


def _duplicates(looked: Sequence[Looked], limits: Limits) -> Iterator[Finding]:
    """Find pictures of the same pixels; rows of one file and frame may well be several."""
    by_digest: dict[str, list[Sample]] = defaultdict(list)
    for item in looked:
        by_digest[item.look.digest].append(item.sample)
    across, within = [], []
    for samples in by_digest.values():
        files = {(sample.source, sample.frame) for sample in samples}
        splits = Counter(sample.split for sample in samples)
        if len(splits) > 1:
            across.append(Case(_names(samples), f"the same pixels in {_counts(splits)}"))
        elif len(files) > 1:
            groups = {sample.group for sample in samples}
            of = "" if len(groups) == 1 else f", of {len(groups)} groups"
            within.append(Case(_names(samples), f"the same pixels in {len(files)} places{of}"))
    yield Finding(
        "picture-in-several-splits",
        _unless(limits.allow_leak),
        "one picture in several splits",
        tuple(across),
        "pictures of the training split in no other",
        "remove all but one, or put them into one split" + _if_meant(limits),
    )
    yield Finding(
        "duplicate",
        "warning",
        "one picture in several places",
        tuple(within),
        "each picture once",
        "remove all but one: it counts several times, and if its masks differ, one is wrong",
    )


def _masks(looked: Sequence[Looked]) -> Iterator[Finding]:
    with_mask = [item for item in looked if item.look.mask_size_px is not None]
    if with_mask:
        yield _missing_masks(looked)
        yield _empty_masks(with_mask)
        yield _full_masks(with_mask)
        yield _shifted_masks(with_mask)
        yield _all_shifted(with_mask)
        yield _masks_of_other_size(with_mask)
        yield _turned_alone(with_mask)
    else:
        yield _no_masks(looked)


def _no_masks(looked: Sequence[Looked]) -> Finding:
    return Finding(
        "no-masks",
        "warning",
        "no mask at all",
        (Case((), f"{len(looked)} samples without a mask"),) if looked else (),
        "masks to learn from",
        "name them in the manifest; features can be extracted without, and masks set later",
    )


def _missing_masks(looked: Sequence[Looked]) -> Finding:
    without = [item.sample for item in looked if item.look.mask_size_px is None]
    return Finding(
        "missing-mask",
        "note",
        "without a mask",
        _some(without, f"{len(without)} of {len(looked)} samples"),
        "a mask for each sample that is to be learned from or measured on",
        "fill them in, or leave it: such samples are stored and left out of training",
    )


def _empty_masks(with_mask: Sequence[Looked]) -> Finding:
    return Finding(
        "empty-mask",
        "warning",
        "mask marks nothing",
        tuple(
            Case((item.sample.id,), "no pixel of it is marked")
            for item in with_mask
            if not item.look.marked_share
        ),
        "some marked pixels",
        "check that it is the right file; if there is nothing to mark, leave it: Dice is then 0 "
        "where a head marks anything, and not defined where it marks nothing",
    )


def _full_masks(with_mask: Sequence[Looked]) -> Finding:
    return Finding(
        "full-mask",
        "warning",
        "mask marks everything",
        tuple(
            Case((item.sample.id,), f"{item.look.marked_share:.1%} of it is marked")
            for item in with_mask
            if (item.look.marked_share or 0) >= FULL_SHARE
        ),
        "background, too",
        "check that it is a mask: any value above 0 counts as marked",
    )


def _shifted_masks(with_mask: Sequence[Looked]) -> Finding:
    return Finding(
        "shifted-mask",
        "warning",
        "mask fits better elsewhere",
        tuple(
            Case((item.sample.id,), shift_text(shift))
            for item in with_mask
            if (shift := item.look.shift) is not None and shift.is_clear
        ),
        "the best fit where it lies",
        "look at the overlay on the page (-o FOLDER): the mask may be of another frame, cropped "
        "otherwise, or written with another origin",
    )


def _all_shifted(with_mask: Sequence[Looked]) -> Finding:
    """Find what a single mask cannot tell: a small shift that most of them share."""
    common = common_shift([item.look.shift for item in with_mask])
    return Finding(
        "all-masks-shifted",
        "warning",
        "masks shifted on the whole",
        ()
        if common is None
        else (
            Case(
                (),
                f"{common.num_masks} masks fit best "
                f"{_way(common.down_px, common.right_px, common.reach_px)}, the median",
            ),
        ),
        "the best fit where they lie",
        "check how they were resized or cropped: half a pixel of a small grid is many of a large "
        "one",
    )


def _masks_of_other_size(with_mask: Sequence[Looked]) -> Finding:
    by_size: dict[str, list[Sample]] = defaultdict(list)
    for item in with_mask:
        size_px = (item.look.height_px, item.look.width_px)
        if item.look.mask_size_px not in (None, size_px):
            text = f"{_size(item.look.mask_size_px)} for a picture of {_size(size_px)}"
            by_size[text].append(item.sample)
    return Finding(
        "mask-of-other-size",
        "note",
        "mask of another size than its picture",
        tuple(
            Case(_names(samples), f"{text} ({len(samples)})")
            for text, samples in sorted(by_size.items(), key=lambda size: -len(size[1]))
        ),
        "any size of the same aspect ratio",
        "leave it: results are measured on the mask's own grid",
    )


def _turned_alone(with_mask: Sequence[Looked]) -> Finding:
    return Finding(
        "orientation",
        "warning",
        "picture and mask turned by different orientation tags",
        tuple(
            Case((item.sample.id,), f"picture {tags[0]}, mask {tags[1]} (1 is not turned)")
            for item in with_mask
            if (tags := item.look.orientations) is not None and tags[0] != tags[1]
        ),
        "one orientation tag, or none, in both",
        "look at the overlay: if the mask lies otherwise, save both as seen, without a tag",
    )


def _size(size_px: tuple[int, int]) -> str:
    return f"{size_px[0]} x {size_px[1]}"


def shift_text(shift: Shift) -> str:
    """Say where a mask fits better."""
    return (
        f"fits better {_way(shift.down_px, shift.right_px, shift.reach_px)} (correlation "
        f"{shift.correlation:.2f}, where it lies {shift.correlation_here:.2f})"
    )


def _way(down_px: float, right_px: float, reach_px: float) -> str:
    """Write a shift: "3 px up and 2 px left"; one as far as is looked may be larger."""

    def distance_text(distance_px: float, words: tuple[str, str]) -> str:
        text = f"{abs(distance_px):.0f} px {words[distance_px < 0]}"
        return f"at least {text}" if abs(distance_px) >= reach_px else text

    way = " and ".join(
        distance_text(distance_px, words)
        for distance_px, words in ((down_px, ("down", "up")), (right_px, ("right", "left")))
        if distance_px
    )
    is_at_edge = max(abs(down_px), abs(right_px)) >= reach_px
    return f"{way}, the edge of the search" if is_at_edge else way


def _pictures(looked: Sequence[Looked]) -> Iterator[Finding]:
    yield Finding(
        "constant-picture",
        "warning",
        "picture of nothing",
        tuple(
            Case((item.sample.id,), _grey_levels(item.look.grey_levels + 1))
            for item in looked
            if item.look.grey_levels < LEAST_GREY_LEVELS
        ),
        f"at least {LEAST_GREY_LEVELS + 1} of 256 grey levels",
        "remove it, or export it again: deeper pixels may have been cut to 8 bits",
    )
    yield Finding(
        "mixed-depths",
        "warning",
        "pictures of several depths",
        _kinds(looked, lambda look: look.pixel_type),
        "one type of pixels",
        "export them alike: 8 bits stay as they are, anything else is mapped by a DICOM file's own "
        "window or by percentiles",
    )
    yield Finding(
        "mixed-colours",
        "note",
        "grey and colour pictures",
        _kinds(looked, lambda look: "grey" if look.num_channels == 1 else "colour"),
        "all grey or all in colour",
        "leave it, if they show the same",
    )
    yield Finding(
        "sizes-differ-by-split",
        "warning",
        "sizes differ between splits",
        tuple(_other_sizes(looked)),
        "pictures of the same sizes as in the training split",
        "check that splits are not of different sources; thin structures get lost in small ones",
    )


def _other_sizes(looked: Sequence[Looked]) -> Iterator[Case]:
    """Compare, with the training split, how sizes are distributed, as total variation distance."""
    # By quarters of an octave: crops of any size are not each a size of their own.
    sizes: dict[str, Counter[int]] = defaultdict(Counter)
    longest: dict[str, list[int]] = defaultdict(list)
    for item in looked:
        side_px = max(item.look.height_px, item.look.width_px)
        sizes[item.sample.split][round(4 * math.log2(side_px))] += 1
        longest[item.sample.split].append(side_px)
    train = sizes["train"]
    for split in SPLITS[1:]:
        other = sizes[split]
        if min(train.total(), other.total()) < MIN_COMPARED:
            continue
        distance = 0.5 * sum(
            abs(train[size] / train.total() - other[size] / other.total()) for size in train | other
        )
        if distance > MAX_SIZE_DIFFERENCE:
            median_px, train_px = (round(median(longest[name])) for name in (split, "train"))
            yield Case(
                (),
                f"{distance:.0%} of {split} would need another size to be as train (median of the "
                f"longest side {median_px} px in {split}, {train_px} px in train)",
            )


def _angles(looked: Sequence[Looked]) -> Iterator[Finding]:
    unknown = [item.sample for item in looked if None in _view(item.sample)]
    known = [view for item in looked if None not in (view := _view(item.sample))]
    yield Finding(
        "missing-angles",
        "warning" if known else "note",
        "view angles missing",
        _some(unknown, f"one or both are unknown in {len(unknown)} of {len(looked)} samples"),
        "a primary and a secondary angle for each sample",
        "fill them in where they are known; a head gets one learned embedding for unknown views",
    )
    views = Counter(known)
    is_constant = len(views) == 1 and len(known) > 1
    yield Finding(
        "constant-angles",
        "warning",
        "view angles the same for all",
        (Case((), f"{_degrees(known[0])} in all {len(known)} samples"),) if is_constant else (),
        "angles that differ with the view",
        "check the column: a head cannot use a constant",
    )
    num_zero = views[(0.0, 0.0)]
    is_filled = not is_constant and num_zero >= max(MIN_COMPARED, MAX_ZERO_VIEWS * len(known))
    yield Finding(
        "zero-angles",
        "warning",
        "view angles exactly zero",
        _some(
            [item.sample for item in looked if _view(item.sample) == (0.0, 0.0)],
            f"0/0 degrees in {num_zero} of {len(known)} samples",
        )
        if is_filled
        else (),
        "few views straight from the front",
        "leave the cells of unknown angles empty, if 0 stands for that",
    )
    largest = max((abs(angle) for view in views for angle in view if angle is not None), default=0)
    is_radians = len(views) >= MIN_COMPARED and 0 < largest <= math.pi
    yield Finding(
        "angles-in-radians",
        "warning",
        "view angles very small",
        (Case((), f"none beyond {largest:.2f} in {len(known)} samples"),) if is_radians else (),
        "degrees",
        "convert them, if they are in radians",
    )


def _splits(manifest: Manifest, looked: Sequence[Looked]) -> Iterator[Finding]:
    counts = Counter(item.sample.split for item in looked)
    yield Finding(
        "empty-split",
        "warning",
        "split without a sample",
        tuple(Case((), split) for split in SPLITS if not counts[split]),
        "samples in train, val and test",
        "fill the split column; or divide once the store is there, by `sam3cache store "
        "annotations split`",
    )
    is_hashed = "split" not in manifest.fields
    yield Finding(
        "hashed-split",
        "note",
        "no split in the manifest",
        (Case((), f"{manifest.split_rule}: {_counts(counts)}"),) if is_hashed and looked else (),
        "a split column, or this",
        "leave it; or share classes and views out evenly once the store is there, by `sam3cache "
        "store annotations split`",
    )
    num_ungrouped, num_samples = manifest.num_ungrouped, len(manifest.samples)
    yield Finding(
        "no-groups",
        "note",
        "without a group",
        (Case((), f"{num_ungrouped} of {num_samples} samples are groups of their own"),)
        if num_ungrouped
        else (),
        "a group (patient) for each sample",
        "name the column, or fill it in: pictures of one patient may now be in two splits unseen",
    )


def _classes(
    looked: Sequence[Looked], classes: Sequence[str], by: Sequence[str], limits: Limits
) -> Iterator[Finding]:
    cases = []
    for what, counts in class_counts(looked, classes, by).items():
        for split in SPLITS:
            in_split = sum(item.sample.split == split for item in looked)
            if in_split and counts[split] < limits.min_samples:
                cases.append(Case((), f"{what}: {counts[split]} in {split}"))
    yield Finding(
        "few-samples",
        "warning",
        "class of few samples",
        tuple(cases),
        f"{limits.min_samples} or more samples of each class in each split (--min-samples)",
        "add some, join classes, or divide anew: so few are neither learned nor measured well",
    )


def class_counts(
    looked: Sequence[Looked], classes: Sequence[str], by: Sequence[str]
) -> dict[str, Counter[str]]:
    """Return, of each class and each value of some columns, its samples by split."""
    counts: dict[str, Counter[str]] = {}
    if any(item.look.mask_size_px is not None for item in looked):
        counts = {name: Counter() for name in classes}
    for item in looked:
        for k in item.look.classes:
            counts[classes[k]][item.sample.split] += 1
    for column in by:
        values: dict[str, Counter[str]] = defaultdict(Counter)
        for item in looked:
            values[item.sample.extra.get(column, "")][item.sample.split] += 1
        counts |= {f"{column} {value or '(empty)'}": values[value] for value in sorted(values)}
    return counts


def view_counts(looked: Iterable[Looked]) -> dict[str, int]:
    """Return samples by view region; those of an unknown view under ""."""
    return dict(Counter(view_region(*_view(item.sample)) for item in looked))


def _view(sample: Sample) -> tuple[float | None, float | None]:
    return sample.primary_angle_deg, sample.secondary_angle_deg


def _degrees(view: tuple[float | None, float | None]) -> str:
    return "/".join(f"{angle:g}" for angle in view if angle is not None) + " degrees"


def _unless(is_allowed: bool) -> Severity:
    return "warning" if is_allowed else "error"


def _if_meant(limits: Limits) -> str:
    return "" if limits.allow_leak else "; --allow-leak if it is meant"


def _names(samples: Iterable[Sample]) -> tuple[str, ...]:
    return tuple(sample.id for sample in samples)[:MAX_NAMED]


def _some(samples: Sequence[Sample], value: str) -> tuple[Case, ...]:
    """Return one case of all these samples; none where there are none."""
    return (Case(_names(samples), value),) if samples else ()


def _kinds(looked: Iterable[Looked], kind_of: Callable[[Look], str]) -> tuple[Case, ...]:
    """Return a case a kind where there are several; samples are named of all but the usual one."""
    by_kind: dict[str, list[Sample]] = defaultdict(list)
    for item in looked:
        by_kind[kind_of(item.look)].append(item.sample)
    usual, *others = sorted(by_kind.items(), key=lambda kind: -len(kind[1])) or [("", [])]
    if not others:
        return ()
    rare = (Case(_names(samples), f"{kind} ({len(samples)})") for kind, samples in others)
    return (Case((), f"{usual[0]} ({len(usual[1])})"), *rare)


def _grey_levels(number: int) -> str:
    return f"all pixels within {number} grey level{'' if number == 1 else 's'}"


def _counts(counts: Mapping[str, int]) -> str:
    """Write counts by split in their usual order."""
    return ", ".join(f"{split} {counts[split]}" for split in SPLITS if counts.get(split))
