"""What a training is about to learn from, for people to read before it begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sam3cache.features import count_classes, open_store
from sam3cache.training.config import TrainConfig
from sam3cache.training.division import divide
from sam3cache.training.opening import label_set_of, new_head, open_to_train
from sam3cache.training.state import as_begun


@dataclass(frozen=True)
class Outlook:
    """What a training learns from and is judged by.

    Attributes:
        num_train: images that are learned from.
        num_variants: variants of them that are drawn from as well.
        num_variants_left_out: variants of them that the store has, and that are not drawn from.
        num_val: images that are validated on.
        num_classes: of the label set.
        not_trained: where there are several, classes that no image learned from shows.
        not_validated: classes that no image validated on shows.
    """

    num_train: int
    num_variants: int
    num_variants_left_out: int
    num_val: int
    num_classes: int
    not_trained: tuple[str, ...] = ()
    not_validated: tuple[str, ...] = ()


def look_ahead(
    config: TrainConfig,
    report: Callable[[int, int], None] = lambda num_done, num_total: None,
) -> Outlook:
    """Count what a training has; of several classes every mask of it is read.

    Args:
        config: of the training.
        report: called with masks done and masks in all.

    Raises:
        ConfigError: the label set, the splits or the variants are not there.
        StoreError: the store cannot be used.
    """
    config = as_begun(config)
    store = open_store(config.store, allow_unsealed=config.allow_unsealed, overlay=config.overlay)
    classes = label_set_of(store, config).classes
    rows = divide(store, config)
    learned = [group[0] for group in rows.groups]  # an image's own row, without its variants
    own = frozenset(learned)
    num_stored = sum(variant.base_row in own for variant in store.variants)
    num_left_out = num_stored - rows.num_variants
    outlook = Outlook(
        len(learned), rows.num_variants, num_left_out, len(rows.val), num_classes=len(classes)
    )
    if len(classes) == 1:
        return outlook
    num_masks = len(learned) + len(rows.val)

    def absent(of: list[int], num_before: int) -> tuple[str, ...]:
        counts = count_classes(
            store,
            config.label_set,
            lambda num_done, _: report(num_before + num_done, num_masks),
            only=frozenset(of),
        )
        return tuple(count.name for count in counts if not any(count.num_samples.values()))

    return replace(
        outlook,
        not_trained=absent(learned, 0),
        not_validated=absent(rows.val, len(learned)),
    )


def levels_of_head(config: TrainConfig) -> tuple[str, ...]:
    """Return the levels that a configuration's head reads, having built it.

    Raises:
        HeadError: it cannot be built for the store and the label set.
        ConfigError: there is no such label set, or the head does not read what is augmented.
        StoreError: the store cannot be used.
    """
    return tuple(new_head(open_to_train(config), config).needs)
