"""A run's store, as its configuration has it opened, and the head that it begins with."""

from __future__ import annotations

from sam3cache.errors import ConfigError
from sam3cache.features import FeatureStore, LabelSetSpec, open_store
from sam3cache.heads import Head, build_head
from sam3cache.tasks import num_outputs
from sam3cache.training.config import TrainConfig, require_effect


def open_to_train(config: TrainConfig) -> FeatureStore:
    """Open a run's store, which then serves the precisions that are asked for.

    Raises:
        ConfigError: no level has that precision.
        StoreError: the store cannot be used.
    """
    store = open_store(config.store, allow_unsealed=config.allow_unsealed, overlay=config.overlay)
    if config.feature_precision is not None:
        store.serve(config.feature_precision)
    return store


def label_set_of(store: FeatureStore, config: TrainConfig) -> LabelSetSpec:
    """Return the label set that a run learns.

    Raises:
        ConfigError: the store has none of this name.
    """
    if config.label_set not in store.label_sets:
        raise ConfigError(
            f"{config.store} has no label set {config.label_set!r} (it has "
            f"{', '.join(store.label_sets) or 'none'}); name one with --label-set, or set it "
            f"with `sam3cache store labels set {config.store} {config.label_set} --from MANIFEST`"
        )
    return store.label_sets[config.label_set]


def new_head(store: FeatureStore, config: TrainConfig) -> Head:
    """Build a run's head, on the CPU, with weights drawn from torch's generator.

    Raises:
        HeadError: it cannot be built for the store and the label set.
        ConfigError: there is no such label set, or the head does not read what is augmented.
    """
    label_set = label_set_of(store, config)
    head: Head = build_head(
        config.head,
        {name: spec.shape for name, spec in store.served_levels.items()},
        config.head_options,
        num_classes=num_outputs(label_set.task, len(label_set.classes)),
    )
    require_effect(config, head.needs)
    return head
