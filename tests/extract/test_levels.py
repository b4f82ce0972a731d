"""What a store's levels depend on, and what is said when that differs from before."""

from pathlib import Path

import pytest

from sam3cache.errors import ConfigError, FingerprintError
from sam3cache.extract import ExtractConfig
from sam3cache.extract.levels import find_digest, halved_batch_size, make_settings, plan_levels

STORE = Path("features/angio.zarr")
OURS, THEIRS = "a1" * 32, "b2" * 32
BASE = {"levels": ("fpn_72", "trunk_72.int8", "image_1008"), "backbone": "sam3-mini"}


def config(**options) -> ExtractConfig:
    return ExtractConfig(Path("angio.csv"), STORE, **{**BASE, **options})


def describe(digest=OURS, **options):
    """What zarr.json says of a store that was made with some options."""
    settings = make_settings(config(**options), 0, None)
    levels = plan_levels(config(**options), None, settings, digest, 1)
    return {
        "settings": settings,
        "levels": {name: {"fingerprint": dict(f.fields)} for name, (_, f) in levels.items()},
    }


def of_another_version(description, version):
    description["settings"]["environment"]["sam3cache"] = version
    for level in description["levels"].values():
        level["fingerprint"]["preprocessing.preprocessing_version"] = 0
    return description


SAME = "Features of two kinds are never mixed: "
ELSE = ", or extract into a new folder with -o"


@pytest.mark.parametrize(
    ("stored", "asked", "digest", "message"),
    [
        pytest.param(
            describe(),
            {"numeric_path": "bf16"},
            OURS,
            "levels fpn_72, trunk_72.int8: numeric_path: fp32 → bf16. "
            f"{SAME}repeat the command with --numeric-path fp32{ELSE}",
            id="numeric path",
        ),
        pytest.param(
            describe(resize_mode="squash"),
            {},
            OURS,
            "levels fpn_72, trunk_72.int8, image_1008: preprocessing.resize_mode: squash → "
            f"letterbox. {SAME}repeat the command with --resize squash{ELSE}",
            id="resize mode",
        ),
        pytest.param(
            describe(),
            {"numeric_path": "bf16", "resize_mode": "squash", "levels": ("fpn_72",)},
            OURS,
            "levels fpn_72, trunk_72.int8: numeric_path: fp32 → bf16; levels fpn_72, "
            "trunk_72.int8, image_1008: preprocessing.resize_mode: letterbox → squash. "
            f"{SAME}repeat the command with --numeric-path fp32 --resize letterbox{ELSE}",
            id="several fields, of different levels",
        ),
        pytest.param(
            describe(levels=("image_1008",)),
            {"resize_mode": "squash"},
            OURS,
            "level image_1008: preprocessing.resize_mode: letterbox → squash. "
            f"{SAME}repeat the command with --resize letterbox{ELSE}",
            id="pictures alone",
        ),
        pytest.param(
            describe(weights="tuned.safetensors"),
            {},
            THEIRS,
            "levels fpn_72, trunk_72.int8: weights_sha256: a1a1a1a1a1a1… → b2b2b2b2b2b2…. "
            f"{SAME}repeat the command with --backbone sam3-mini --weights tuned.safetensors{ELSE}",
            id="weights of another name",
        ),
        pytest.param(
            describe(weights="tuned.safetensors"),
            {"weights": "tuned.safetensors"},
            f"random:{THEIRS}",
            "weights_sha256: a1a1a1a1a1a1… → random:b2b2b2b2b2b2…. "
            f"{SAME}repeat the command with --backbone sam3-mini --weights tuned.safetensors "
            "(weights called tuned.safetensors are others now: find those of SHA-256 "
            f"a1a1a1a1a1a1…){ELSE}",
            id="weights of the same name",
        ),
        pytest.param(
            of_another_version(describe(), "0.0.9"),
            {},
            OURS,
            "preprocessing.preprocessing_version: 0 → 1. "
            f"{SAME}this sam3cache makes it another way: use version 0.0.9{ELSE}",
            id="another version's preprocessing",
        ),
    ],
)
def test_a_difference_is_told_field_by_field_with_the_choices_that_remain(
    stored, asked, digest, message
):
    settings = make_settings(config(**asked), 0, stored)
    with pytest.raises(FingerprintError) as failure:
        plan_levels(config(**asked), stored, settings, digest, 1)
    assert str(failure.value).startswith(f"{STORE} was made differently: level")
    assert str(failure.value).endswith(message)
    assert "\n" not in str(failure.value)


def test_another_backbone_is_told_before_its_weights_are_looked_for():
    with pytest.raises(FingerprintError) as failure:
        find_digest(config(backbone="sam3", weights="nowhere.pt"), describe())
    message = str(failure.value)
    assert "architecture.depth: 4 → 32" in message
    assert "levels fpn_72, trunk_72.int8: " in message
    assert "image_1008" not in message
    assert message.endswith(f"repeat the command with --backbone sam3-mini{ELSE}")


def test_the_same_settings_are_no_difference_and_levels_are_added_behind():
    stored = describe(levels=("fpn_72",))
    asked = config(levels=("image_1008", "fpn_72"))
    settings = make_settings(asked, 0, stored)
    levels = plan_levels(asked, stored, settings, OURS, 3)
    assert list(levels) == ["fpn_72", "image_1008"]
    assert dict(levels["fpn_72"][1].fields) == stored["levels"]["fpn_72"]["fingerprint"]
    assert levels["image_1008"][0].shape == (3, 1008, 1008)


def test_a_store_keeps_to_the_batch_size_that_it_was_made_with():
    stored = describe(batch_size=2)
    with pytest.raises(ConfigError) as failure:
        make_settings(config(batch_size=4), 0, stored)
    assert str(failure.value) == (
        f"--batch-size 4: {STORE} was made with batches of 2, and a store keeps to one size, on "
        "which the last bits of its features depend: leave --batch-size out to go on with it, or "
        "extract into a new folder with -o"
    )
    for same in (None, 2):
        assert make_settings(config(batch_size=same), 0, stored) == stored["settings"]


def test_a_store_of_pictures_alone_takes_any_batch_size():
    stored = describe(levels=("image_1008",), batch_size=2)
    assert make_settings(config(batch_size=4), 0, stored)["batch_size"] == 4


def test_the_smallest_batch_size_that_any_process_came_down_to_is_recorded():
    settings = {"batch_size": 8}
    settings |= halved_batch_size(settings, 4)
    settings |= halved_batch_size(settings, 2)
    assert settings == {"batch_size": 2, "asked_batch_size": 8}
    assert halved_batch_size(settings, 4) == {}


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("fpn_73", "'fpn_73' is unknown"),
        ("fpn_72.int4", "'int4' is no precision"),
        ("image_1008.int8", "'int8' is no precision"),
        ("image_72", "'image_72' is unknown"),
    ],
)
def test_a_level_that_there_is_not_is_refused(name, named):
    with pytest.raises(ConfigError, match=named):
        find_digest(config(levels=(name,)), None)
