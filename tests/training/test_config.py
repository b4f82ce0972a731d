"""Values that a training refuses before it reads anything."""

from typing import Any

import pytest

from sam3cache.errors import ConfigError
from sam3cache.training import TrainConfig
from sam3cache.training.config import check_same_run, resolve_precision


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"epochs": 0}, r"epochs is 0: expected at least 1"),
        ({"batch_size": 0}, r"batch_size is 0"),
        ({"learning_rate": 0.0}, r"learning_rate is 0.0: expected above 0"),
        ({"learning_rate": float("nan")}, r"learning_rate is nan"),
        ({"weight_decay": -1.0}, r"weight_decay is -1.0"),
        ({"bce_weight": 1.5}, r"bce_weight is 1.5: expected between 0"),
        ({"loss_size_px": 0}, r"loss_size_px is 0"),
        ({"seed": -1}, r"seed is -1"),
        ({"precision": "fp8"}, r"precision is 'fp8': expected auto, fp32, bf16 or fp16"),
        ({"residency": "tape"}, r"residency is 'tape'"),
        ({"name": ""}, r"run name ''"),
        ({"name": "../up"}, r"run name '../up'"),
        ({"name": "C:run"}, r"run name 'C:run'"),
        ({"name": "NUL.1"}, r"run name 'NUL.1'.* none that Windows keeps for a device"),
        ({"name": "a."}, r"run name 'a.'"),
        ({"micro_batch": 0}, r"micro_batch is 0: expected at least 1"),
        ({"lr_scaling": "cubic"}, r"lr_scaling is 'cubic': expected none, sqrt, linear"),
        ({"warmup_epochs": 30.0}, r"warmup_epochs is 30.0: expected 0 to below the epochs"),
        ({"ema": 1.0}, r"ema is 1.0: expected 0 \(none\) or a decay below 1"),
        ({"patience": 0}, r"patience is 0: expected at least 1"),
        ({"save_minutes": -1}, r"save_minutes is -1"),
        ({"folds": 1, "fold": 0}, r"folds is 1: expected 0 \(none\), or at least 2"),
        ({"folds": 5}, r"fold is None: expected 0 to 4, as folds is 5"),
        ({"fold": 1}, r"fold is 1: expected none"),
        ({"augment": ("blur",)}, r"augmentation 'blur' is unknown; expected some of crop"),
        ({"epochs": "3"}, r"epochs is '3': expected a whole number"),
        ({"epochs": True}, r"epochs is True: expected a whole number"),
        ({"class_weights": 2}, r"class_weights is 2: expected a list of numbers, or balanced"),
        ({"class_weights": "equal"}, r"class_weights is 'equal': expected a list of numbers"),
        ({"class_weights": ["a", 1]}, r"class_weights holds 'a': expected a list of numbers"),
        ({"class_weights": [None, 1]}, r"class_weights holds None: expected a list of numbers"),
        ({"lr_scaling": ["sqrt"]}, r"lr_scaling is \['sqrt'\]: expected none, sqrt, linear"),
        ({"augment": [["crop"]]}, r"augment holds \['crop'\]: expected a list of names"),
        ({"resume": True, "overwrite": True}, r"resume and overwrite exclude each other"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_in_one_line(
    values: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        TrainConfig(**({"store": "x.zarr", "name": "run"} | values))
    assert "\n" not in str(caught.value)


def test_settings_are_plain_json_and_leave_out_how_and_where_the_run_was_started() -> None:
    settings = TrainConfig(
        "/data/someone/x.zarr",
        "run",
        head_options={"widths": (8, 4)},
        output="/data/someone/runs",
        resume=True,
    ).settings()
    assert settings["head_options"] == {"widths": [8, 4]}
    assert settings["store"] == "x.zarr"
    assert settings["learning_rate"] is None, "the head's own, which the training fills in"
    assert "resume" not in settings
    assert "someone" not in str(settings)


def test_only_settings_that_make_the_result_have_to_be_the_same_on_resuming() -> None:
    old = TrainConfig("x.zarr", "run").settings()
    moved = {"store": "y.zarr", "name": "z", "device": "cuda:0", "residency": "stream"}
    check_same_run(old, old | moved)
    with pytest.raises(ConfigError, match=r"\(batch_size 16 → 8; head film-detail → linear\)"):
        check_same_run(old, old | {"batch_size": 8, "head": "linear"})


def test_a_resumed_run_keeps_to_its_micro_batch_and_refuses_another() -> None:
    begun = TrainConfig("x.zarr", "run", batch_size=8).settings() | {"micro_batch": 8}
    for same in (None, 8, 16):  # More than a batch is the batch.
        check_same_run(begun, begun | {"micro_batch": same})
    with pytest.raises(ConfigError, match=r"\(micro_batch 8 → 4\); repeat all options"):
        check_same_run(begun, begun | {"micro_batch": 4})


def test_class_weights_that_are_found_anew_tell_of_other_data() -> None:
    asked = TrainConfig("x.zarr", "run", class_weights="balanced").settings()
    begun = asked | {"class_weights_used": [0.5, 2.0]}
    check_same_run(begun, dict(begun))
    with pytest.raises(ConfigError, match="learned from other images, angles or masks"):
        check_same_run(begun, asked | {"class_weights_used": [0.5, 2.5]})


def test_a_cpu_computes_in_float32_unless_told_otherwise_and_never_in_fp16() -> None:
    assert resolve_precision("auto", "cpu") == "fp32"
    assert resolve_precision("bf16", "cpu") == "bf16"
    with pytest.raises(ConfigError, match="fp16 needs a CUDA device"):
        resolve_precision("fp16", "cpu")
