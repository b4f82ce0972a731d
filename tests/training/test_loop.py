"""Whole trainings on small stores: what they write, what they refuse, and going on to the bit."""

import dataclasses
import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_heads import write_head
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from store_builder import build_store

from sam3cache.errors import (
    CheckpointError,
    ConfigError,
    FingerprintError,
    HeadError,
    NumericError,
    StoppedError,
    UnsealedStoreError,
)
from sam3cache.features import open_store
from sam3cache.heads import load_checkpoint
from sam3cache.heads.checkpoint import read_record
from sam3cache.metrics import dice_iou_precision_recall
from sam3cache.training import Progress, TrainConfig, train
from sam3cache.training.average import MovingAverage
from sam3cache.training.loop import Run
from sam3cache.training.masks import HeldMasks
from sam3cache.training.state import read_state

SHAPES = {"fpn_72": (8, 12, 12)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four samples: eight train, eight val (one of them without a mask in test)."""
    root = tmp_path_factory.mktemp("training") / "x.zarr"
    return build_store(root, num_samples=24, level_shapes=SHAPES, mask_width_px=40)


def config_for(store: Path, output: Path, **values: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "name": "run",
        "head": "film-conv",
        "epochs": 4,
        "batch_size": 3,
        "learning_rate": 3e-3,
        "loss_size_px": 48,
        "head_options": {"embedding_dim": 16},
        "device": "cpu",
    }
    return TrainConfig(store=str(store), output=str(output), **(defaults | values))


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, random state and losses of two runs are equal to the bit."""
    for file in ("best/model.safetensors", "last/model.safetensors", "last/training.safetensors"):
        first, second = load_file(one / file), load_file(other / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), file
    for name in ("epoch", "lr", "train_loss", "val_dice"):
        assert [m[name] for m in metrics_of(one)] == [m[name] for m in metrics_of(other)]


@pytest.fixture(scope="module")
def straight(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs without an interruption."""
    return train(config_for(store, tmp_path_factory.mktemp("straight"))).run_dir


def test_a_run_learns_and_writes_what_is_needed_to_use_it(store: Path, tmp_path: Path) -> None:
    reports: list[Progress] = []
    config = config_for(store, tmp_path, epochs=8)
    result = train(config, reports.append)
    metrics = metrics_of(result.run_dir)
    assert [line["epoch"] for line in metrics] == list(range(1, 9))
    assert metrics[-1]["train_loss"] < 0.8 * metrics[0]["train_loss"]
    assert result.best_dice == max(line["val_dice"] for line in metrics) > 0.6
    assert result.best_dice == metrics[result.best_epoch - 1]["val_dice"]
    assert (result.num_train, result.num_val, result.residency) == (8, 8, "ram")
    assert all(line["images_per_s"] > 0 and line["peak_memory_bytes"] > 1e8 for line in metrics)
    elapsed_s = [line["elapsed_s"] for line in metrics]
    assert elapsed_s == sorted(elapsed_s)
    assert list((result.run_dir / "tensorboard").glob("events.out.tfevents.*"))

    assert {report.stage for report in reports} == {"load", "train"}
    assert (reports[-1].num_done, reports[-1].num_total) == (64, 64)
    assert reports[-1].best_dice == result.best_dice
    # Validation moves as well: eight images an epoch, by batches.
    validated = [r.num_validated for r in reports if r.num_validated is not None]
    assert validated == sorted(set(validated)) * 8
    assert (validated[-1], reports[-1].num_to_validate) == (8, 8)

    for folder, epoch in (("best", result.best_epoch), ("last", 8)):
        info = read_record(result.run_dir / folder)
        assert info.epoch == epoch
        assert info.metrics["val_dice"] == metrics[epoch - 1]["val_dice"]
        assert info.settings["learning_rate"] == 3e-3
        assert info.settings["store"] == store.name
        assert info.settings["precision"] == "fp32"
        assert info.levels["fpn_72"]["digest"] == open_store(store).fingerprint("fpn_72").digest
        assert (info.head, info.label_set, info.threshold) == ("film-conv", "mask", 0.5)
        for file in (result.run_dir / folder).iterdir():
            assert str(tmp_path).encode() not in file.read_bytes(), f"{file} names a path"
            assert str(store.parent).encode() not in file.read_bytes(), f"{file} names a path"


def test_the_best_dice_is_the_mean_over_images_on_their_masks_own_grid(
    store: Path, straight: Path
) -> None:
    """Computed again from the checkpoint, an image at a time, by the shortest way."""
    from sam3cache.loading import CachedSamples

    head, info = load_checkpoint(straight / "best")
    opened = open_store(store)
    rows = [sample.row for sample in opened.samples if sample.split == "val"]
    samples = CachedSamples(opened, rows, head.needs)
    dice = []
    for index in range(len(samples)):
        mask_KHW = samples.mask(index)
        assert mask_KHW is not None
        assert mask_KHW.shape == (1, 48, 40)
        with torch.no_grad():
            logits_KHW = head(samples.batch([index]))[0]
        on_grid = samples.letterbox(index).logits_to_grid(logits_KHW, 48, 40)
        dice.append(dice_iou_precision_recall(on_grid[0].sigmoid() >= 0.5, mask_KHW[0]).dice)
    assert info.metrics["val_dice"] == pytest.approx(
        sum(d or 0 for d in dice) / len(dice), abs=1e-6
    )


def test_the_learning_rate_is_pytorchs_cosine(straight: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    # The last of the three steps of each epoch.
    assert [line["lr"] for line in metrics_of(straight)] == pytest.approx(rates[2::3])


def test_the_same_seed_gives_the_same_run_wherever_the_samples_lie(
    store: Path, straight: Path, tmp_path: Path
) -> None:
    again = train(config_for(store, tmp_path, residency="stream"))
    assert again.residency == "stream"
    one, other = (
        load_file(run / "best" / "model.safetensors") for run in (straight, again.run_dir)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bfloat16_trains_on_a_cpu_when_asked_for(store: Path, tmp_path: Path) -> None:
    result = train(config_for(store, tmp_path, epochs=2, precision="bf16"))
    assert result.precision == "bf16"
    first, last = metrics_of(result.run_dir)
    assert last["train_loss"] < first["train_loss"]
    weights = load_file(result.best_checkpoint / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "fp16", "fp32"])
@pytest.mark.parametrize("residency", ["device", "ram", "stream"])
def test_a_gpu_learns_the_same_task(
    store: Path, tmp_path: Path, precision: str, residency: str
) -> None:
    values: dict[str, Any] = {"device": "cuda", "precision": precision, "residency": residency}
    config = config_for(store, tmp_path, epochs=8, **values)
    with pytest.raises(_StopError):
        train(config, stop_in_epoch(4))
    result = train(dataclasses.replace(config, resume=True))
    assert result.best_dice > 0.6
    assert 0 < result.peak_memory_bytes < 1e9


class _StopError(Exception):
    """Ends a run from its report, as an interruption would."""


def stop_in_epoch(epoch: int) -> Any:
    def report(progress: Progress) -> None:
        # Once it learns: the first report is of where it begins.
        if progress.epoch == epoch and progress.loss is not None:
            raise _StopError

    return report


DROPOUT_HEAD = """
from torch import nn
from sam3cache.heads import Head

class Noisy(Head):
    needs = ("fpn_72",)
    def __init__(self, level_shapes, *, num_classes=1):
        super().__init__()
        self.layer = nn.Conv2d(level_shapes["fpn_72"][0], num_classes, 3, padding=1)
    def forward(self, batch):
        return self.layer(nn.functional.dropout(self.feature(batch, "fpn_72"), 0.5, self.training))
"""


HUNGRY_HEAD = """
import torch
from torch import nn
from sam3cache.heads import Head

class Hungry(Head):
    needs = ("fpn_72",)
    def __init__(self, level_shapes, *, num_classes=1):
        super().__init__()
        self.layer = nn.Conv2d(level_shapes["fpn_72"][0], num_classes, 1)
    def forward(self, batch):
        if self.training and len(batch.content_B2) > 2:
            raise torch.OutOfMemoryError("as a GPU says it")
        return self.layer(self.feature(batch, "fpn_72"))
"""


def test_a_run_that_runs_out_of_memory_says_what_to_do(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_head(tmp_path, monkeypatch, "hungry_heads", HUNGRY_HEAD)
    config = config_for(
        store, tmp_path, head="hungry_heads:Hungry", head_options={}, epochs=1, batch_size=4
    )
    with pytest.raises(ConfigError, match=r"memory for 4 .* --residency ram .* --micro-batch 2$"):
        train(config)
    train(dataclasses.replace(config, overwrite=True, micro_batch=2))


FAILING_HEAD = """
from torch import nn
from sam3cache.heads import Head

class Failing(Head):
    needs = ("fpn_72",)
    def __init__(self, level_shapes, *, num_classes=1):
        super().__init__()
        self.layer = nn.Conv2d(level_shapes["fpn_72"][0], num_classes, 1)
    def forward(self, batch):
        assert len(batch.content_B2) == 1 or not self.training, "one at a time"
        return self.layer(self.feature(batch, "fpn_72"))
"""


def test_what_a_head_of_ones_own_fails_by_is_one_line(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_head(tmp_path, monkeypatch, "failing_heads", FAILING_HEAD)
    config = config_for(store, tmp_path, head="failing_heads:Failing", head_options={}, epochs=1)
    expected = r"failing_heads:Failing fails in training: AssertionError: one at a time; correct"
    with pytest.raises(HeadError, match=expected) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    train(dataclasses.replace(config, overwrite=True, micro_batch=1))


TIED_HEAD = """
import torch
from torch import nn
from sam3cache.heads import Head

class Tied(Head):
    needs = ("fpn_72",)
    def __init__(self, level_shapes, *, num_classes=1):
        super().__init__()
        num_channels = level_shapes["fpn_72"][0]
        self.first = nn.Conv2d(num_channels, num_channels, 1)
        self.second = nn.Conv2d(num_channels, num_channels, 1)
        self.second.weight = self.first.weight
        self.logits = nn.Conv2d(num_channels, num_classes, 1)
    def forward(self, batch):
        x = torch.relu(self.first(self.feature(batch, "fpn_72")))
        return self.logits(torch.relu(self.second(x)))
"""


def test_layers_may_share_weights(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_head(tmp_path, monkeypatch, "tied_heads", TIED_HEAD)
    values: dict[str, Any] = {"head": "tied_heads:Tied", "head_options": {}, "epochs": 2}
    config = config_for(store, tmp_path, **values, ema=0.5)
    run = Run(config)
    for _ in run.steps():
        pass
    head, info = load_checkpoint(config.run_dir / "last", head="tied_heads:Tied")
    assert info.epoch == 2
    assert head.second.weight is head.first.weight
    state = load_file(config.run_dir / "last" / "training.safetensors")
    for name, weight in run.head.state_dict().items():
        assert torch.equal(state[f"head.{name}"], weight), name
    assert train(dataclasses.replace(config, resume=True)).epochs == 2


@pytest.mark.parametrize("own_head", [False, True], ids=["film-conv", "own head with dropout"])
def test_a_resumed_run_equals_one_without_interruption_to_the_bit(
    store: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_head: bool
) -> None:
    values: dict[str, Any] = {}
    if own_head:
        write_head(tmp_path, monkeypatch, "noisy_heads", DROPOUT_HEAD)
        values = {"head": "noisy_heads:Noisy", "head_options": {}}
        straight = train(config_for(store, tmp_path / "straight", **values)).run_dir
    config = config_for(store, tmp_path, **values)
    with pytest.raises(_StopError):
        train(config, stop_in_epoch(3))
    assert len(metrics_of(config.run_dir)) == 2
    torch.manual_seed(99)  # whatever happened in between
    resumed = train(dataclasses.replace(config, resume=True))
    assert_same_run(straight, resumed.run_dir)


def test_a_run_killed_in_the_middle_of_an_epoch_goes_on_to_the_bit(
    store: Path, tmp_path: Path
) -> None:
    # Enough epochs that the kill cannot come too late.
    straight = train(config_for(store, tmp_path / "straight", epochs=12)).run_dir
    config = config_for(store, tmp_path, epochs=12)
    options = {
        "--name": config.name,
        "--head": config.head,
        "--epochs": config.epochs,
        "--batch-size": config.batch_size,
        "--lr": config.learning_rate,
        "--loss-size": config.loss_size_px,
        "--device": config.device,
        "--head-option": "embedding_dim=16",
        "-o": tmp_path,
    }
    command = [sys.executable, "-m", "sam3cache", "train", store]
    command += [part for option in options.items() for part in option]
    # The order of additions, and with it the last bit, depends on the number of threads.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.DEVNULL)
    state = config.run_dir / "last" / "training.safetensors"
    deadline_s = time.monotonic() + 90
    while not state.exists() and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert state.exists()
    assert len(metrics_of(config.run_dir)) < 12, "it finished before it was killed"
    resumed = train(dataclasses.replace(config, resume=True))
    assert_same_run(straight, resumed.run_dir)


def test_a_crash_between_writing_and_committing_an_epoch_is_made_good(
    store: Path, straight: Path, tmp_path: Path
) -> None:
    config = config_for(store, tmp_path)
    with pytest.raises(_StopError):
        train(config, stop_in_epoch(3))
    # Epoch 3 has written its checkpoints and half its line when the power fails.
    for folder in ("best", "last"):
        (config.run_dir / folder / "model.safetensors").write_bytes(b"torn")
    with (config.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"epoch": 3, "lr"')
    resumed = train(dataclasses.replace(config, resume=True))
    assert load_checkpoint(resumed.run_dir / "last")[1].epoch == 4
    assert [line["epoch"] for line in metrics_of(resumed.run_dir)] == [1, 2, 3, 4]


class _Stop:
    """Wants a stop from the first step of an epoch on, or from its first validated batch on."""

    def __init__(self, epoch: int, *, validating: bool = False) -> None:
        self.epoch, self.validating, self.reached = epoch, validating, False

    def report(self, progress: Progress) -> None:
        is_there = progress.stage == "train" and progress.loss is not None
        is_there = is_there and (progress.num_validated is not None) == self.validating
        self.reached = self.reached or (is_there and progress.epoch == self.epoch)

    def __call__(self) -> str | None:
        return "a test" if self.reached else None


@pytest.mark.parametrize(
    ("stop", "where"),
    [
        (_Stop(1), "in epoch 1, after 3 of 8 images; go on with --resume"),
        (_Stop(1, validating=True), "in epoch 1, after 8 of 8 images"),
        (_Stop(3), "in epoch 3, after 3 of 8 images"),
    ],
    ids=["in the first epoch", "while validating", "in the third epoch"],
)
@pytest.mark.parametrize(
    "values",
    [{}, {"ema": 0.9, "warmup_epochs": 1.5, "micro_batch": 2, "augment": ("noise",)}],
    ids=["plain", "with an average"],
)
def test_a_run_stopped_within_an_epoch_goes_on_to_the_bit(
    store: Path, straight: Path, tmp_path: Path, stop: _Stop, where: str, values: dict[str, Any]
) -> None:
    stop.reached = False
    if values:
        straight = train(config_for(store, tmp_path / "straight", **values)).run_dir
    config = config_for(store, tmp_path, **values)
    with pytest.raises(StoppedError, match=where) as caught:
        train(config, stop.report, stop)
    assert "was stopped by a test" in str(caught.value)
    torch.manual_seed(99)
    resumed = train(dataclasses.replace(config, resume=True))
    assert_same_run(straight, resumed.run_dir)


def test_a_run_that_is_stopped_while_it_loads_has_changed_nothing(
    tmp_path: Path,
) -> None:
    # A store of its own, as others may be in memory already.
    root = build_store(tmp_path / "x.zarr", num_samples=9, level_shapes=SHAPES)
    config, asked = config_for(root, tmp_path), iter([None] * 5)
    with pytest.raises(StoppedError, match="before its first step; nothing is lost"):
        train(config, stop=lambda: next(asked, "a test"))
    assert not config.run_dir.exists()
    reports: list[Progress] = []
    with pytest.raises(StoppedError, match="before its first step; nothing is lost"):
        train(config, reports.append, lambda: "a test")
    assert not reports, "masks come first, and are not all read either"
    assert not config.run_dir.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM cannot be sent there")
@pytest.mark.parametrize(
    "how", ["SIGTERM", "SIGUSR1", pytest.param("SIGKILL", marks=pytest.mark.long)]
)
def test_a_run_ended_by_a_signal_within_an_epoch_goes_on_to_the_bit(
    store: Path, tmp_path: Path, how: str
) -> None:
    # One long epoch: whatever is saved, is saved within it.
    config = config_for(store, tmp_path, epochs=1, batch_size=1, save_minutes=0)
    config = dataclasses.replace(config, head_options={"widths": [256, 256]}, loss_size_px=504)
    options = ["--name", "run", "--head", "film-conv", "--head-option", "widths=[256,256]"]
    options += ["--epochs", "1", "--batch-size", "1", "--lr", "3e-3", "--loss-size", "504"]
    options += ["--device", "cpu", "-o", str(tmp_path), "--set", "save_minutes=0"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "sam3cache", "train", str(store), *options]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    state = config.run_dir / "last" / "training.safetensors"
    deadline_s = time.monotonic() + 90
    while not state.exists() and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.001)
    process.send_signal(getattr(signal, how))
    _, errors = process.communicate(timeout=60)
    if how != "SIGKILL":
        assert process.returncode == 128 + getattr(signal, how)
        assert re.search(rf"was stopped by {how} in epoch 1, after \d of 8 images", errors)
    num_seen = read_state(state)[0].num_seen
    assert 0 < num_seen < 8
    straight = train(dataclasses.replace(config, output=str(tmp_path / "straight")))
    resumed = train(dataclasses.replace(config, resume=True))
    assert_same_run(straight.run_dir, resumed.run_dir)


def test_parts_of_a_batch_add_up_to_the_batch(store: Path, straight: Path, tmp_path: Path) -> None:
    for micro_batch in (1, 2):
        config = config_for(store, tmp_path / str(micro_batch), micro_batch=micro_batch)
        result = train(config)
        assert result.micro_batch == micro_batch
        for whole, parts in zip(metrics_of(straight), metrics_of(result.run_dir), strict=True):
            assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-4)
            assert parts["val_dice"] == pytest.approx(whole["val_dice"], abs=0.01)


def test_a_batch_is_augmented_alike_in_whatever_parts(store: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"augment": ("crop", "noise", "channel-dropout"), "batch_size": 4}
    whole, *parts = (
        metrics_of(
            train(config_for(store, tmp_path / str(size), micro_batch=size, **values)).run_dir
        )
        for size in (4, 3, 1)
    )
    plain = metrics_of(train(config_for(store, tmp_path, batch_size=4)).run_dir)
    assert whole[0]["train_loss"] != pytest.approx(plain[0]["train_loss"], rel=1e-2)
    for lines in parts:
        for one, other in zip(whole, lines, strict=True):
            assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["dice-bce", "focal", "dice-focal", "cldice", "boundary"])
def test_parts_of_a_batch_add_up_to_the_batch_whatever_the_loss(
    store: Path, tmp_path: Path, name: str
) -> None:
    values: dict[str, Any] = {"loss": name, "epochs": 1, "batch_size": 8}
    whole = train(config_for(store, tmp_path / "whole", **values))
    parts = train(config_for(store, tmp_path / "parts", micro_batch=3, **values))
    # After one step: what the step was, and what it led to.
    (one,), (other,) = metrics_of(whole.run_dir), metrics_of(parts.run_dir)
    assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    weights = [load_file(run.run_dir / "last" / "model.safetensors") for run in (whole, parts)]
    for key, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][key], atol=1e-4), key


def test_the_average_of_the_weights_is_what_is_validated_and_kept(
    store: Path, straight: Path, tmp_path: Path
) -> None:
    result = train(config_for(store, tmp_path, ema=0.5))
    # It changes nothing in how the weights themselves are trained.
    assert [m["train_loss"] for m in metrics_of(result.run_dir)] == [
        m["train_loss"] for m in metrics_of(straight)
    ]
    state = load_file(result.run_dir / "last" / "training.safetensors")
    kept = load_file(result.run_dir / "last" / "model.safetensors")
    assert all(torch.equal(kept[name], state[f"extra.{name}"]) for name in kept)
    weights = load_file(straight / "last" / "training.safetensors")
    assert all(torch.equal(weights[f"head.{name}"], state[f"head.{name}"]) for name in kept)
    assert not all(torch.equal(weights[f"head.{name}"], kept[name]) for name in kept)


def test_a_step_that_a_gradient_scaler_leaves_out_is_no_part_of_the_average() -> None:
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    average, scaler = MovingAverage(layer, 0.5), torch.amp.GradScaler("cpu")
    average.follow(optimizer)
    for value, num_steps in ((math.inf, 0), (1.0, 1)):
        optimizer.zero_grad()
        scaler.scale(value * layer(torch.ones(1, 2)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert average.num_steps == num_steps


def test_a_run_whose_weights_have_diverged_saves_nothing_of_them(
    store: Path, tmp_path: Path
) -> None:
    # The loss of the first step is that of weights which nothing has happened to.
    values: dict[str, Any] = {"learning_rate": 1e37, "weight_decay": 1e3}
    config = config_for(store, tmp_path, batch_size=2, save_minutes=0, **values)
    with pytest.raises(NumericError, match=r"weights became infinite or no number in epoch 1; "):
        train(config)
    assert not (config.run_dir / "last").exists()
    # A little later: what was saved before is whole.
    config = dataclasses.replace(config, name="later", learning_rate=1e30, weight_decay=0.0)
    expected = r"the training loss became \w+ in epoch 1; start again with --overwrite and a lower"
    with pytest.raises(NumericError, match=expected):
        train(config)
    state = load_file(config.run_dir / "last" / "training.safetensors")
    assert all(value.isfinite().all() for name, value in state.items() if name.startswith("head."))


def test_a_run_without_progress_ends_when_patience_does(store: Path, tmp_path: Path) -> None:
    config = config_for(store, tmp_path, epochs=9, patience=2, learning_rate=1e-12)
    result = train(config)
    assert (result.epochs, result.best_epoch, result.stopped_early) == (3, 1, True)
    again = train(dataclasses.replace(config, resume=True))
    assert (again.epochs, again.images_per_s) == (3, None)


def test_the_learning_rate_rises_first_and_goes_by_the_batch_size_if_told_to(
    store: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"warmup_epochs": 2, "lr_scaling": "sqrt", "batch_size": 4}
    result = train(config_for(store, tmp_path, **values))
    rates = [line["lr"] for line in metrics_of(result.run_dir)]
    # 3e-3 is for a batch of 16; of 8 steps 4 rise, and each line has its epoch's second.
    assert rates[:2] == pytest.approx([1.5e-3 * 2 / 5, 1.5e-3 * 4 / 5])
    assert rates[2:] == pytest.approx(
        [1.5e-3 * 0.5 * (1 + math.cos(math.pi * done / 4)) for done in (1, 3)]
    )


@pytest.mark.parametrize("loss", [None, "dice-focal"])
def test_class_numbers_are_learned_and_judged_by_class(tmp_path: Path, loss: str | None) -> None:
    classes = ("LAD", "RCA")
    root = build_store(
        tmp_path / "x.zarr",
        num_samples=24,
        level_shapes=SHAPES,
        mask_width_px=40,
        classes=classes,
        task="multiclass",
    )
    result = train(config_for(root, tmp_path, epochs=10, loss=loss, class_weights=[1, 1.5]))
    head, info = load_checkpoint(result.best_checkpoint)
    assert (info.task, info.classes, info.num_classes) == ("multiclass", classes, 3)
    from sam3cache.loading import CachedSamples

    opened = open_store(root)
    rows = [sample.row for sample in opened.samples if sample.split == "val"]
    samples, dice = CachedSamples(opened, rows, head.needs), []
    for index in range(len(samples)):
        mask_1HW = samples.mask(index)
        assert mask_1HW is not None
        with torch.no_grad():
            logits_KHW = head(samples.batch([index]))[0]
        chosen_HW = samples.letterbox(index).logits_to_grid(logits_KHW, 48, 40).argmax(0)
        of_class = [
            dice_iou_precision_recall(chosen_HW == number, (mask_1HW[0] == number).byte()).dice
            for number in (1, 2)
        ]
        defined = [value for value in of_class if value is not None]
        dice.append(sum(defined) / len(defined))
    assert result.best_dice == pytest.approx(sum(dice) / len(dice), abs=1e-6)
    assert result.best_dice > 0.4
    assert len(set(map(str, dice))) > 1


def test_samples_are_let_go_with_the_run_and_its_head_by_the_next_collection(
    store: Path, tmp_path: Path
) -> None:
    # The first in a process leaves a circle of torch's own, from an import that it brings about.
    train(config_for(store, tmp_path, name="first", epochs=1))
    gc.collect()
    gc.disable()
    try:
        run = Run(config_for(store, tmp_path, epochs=1))
        for _ in run.steps():
            pass
        samples = [weakref.ref(run.train_samples), weakref.ref(run.val_samples)]
        weights = weakref.ref(next(run.head.parameters()))
        del run
        assert [reference() for reference in samples] == [None, None]
        # A circle through torch's own memory no collection would find.
        gc.collect()
        assert weights() is None
    finally:
        gc.enable()


def test_balanced_weights_are_found_from_the_training_masks_and_recorded(tmp_path: Path) -> None:
    root = build_store(
        tmp_path / "x.zarr",
        num_samples=16,
        level_shapes=SHAPES,
        classes=("LAD", "RCA"),
        task="multiclass",
    )
    opened = open_store(root)
    sizes_px: dict[int, list[int]] = {1: [], 2: []}
    for sample in opened.samples:
        if sample.split == "train" and opened.has_mask(sample.row):
            numbers, counts = np.unique(opened.read_mask(sample.row), return_counts=True)
            for number, count in zip(numbers, counts, strict=True):
                if number:
                    sizes_px[int(number)].append(int(count))
    means = [np.mean(sizes) for sizes in sizes_px.values()]
    assert len(set(means)) == 2, "the case is to have classes of different sizes"
    result = train(config_for(root, tmp_path, epochs=1, class_weights="balanced"))
    settings = load_checkpoint(result.best_checkpoint)[1].settings
    assert settings["class_weights"] == "balanced", "as asked, so that folds compare"
    assert settings["class_weights_used"] == pytest.approx(
        [np.median(means) / mean for mean in means]
    )


def test_as_many_go_through_the_head_at_once_as_fit(
    store: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sam3cache.training import micro

    assert read_record(straight / "last").settings["micro_batch"] == 3
    stop = _Stop(1)
    with pytest.raises(StoppedError):  # so that there is something to resume
        train(config_for(store, tmp_path), stop.report, stop)
    monkeypatch.setattr(micro, "MAX_CPU_BYTES", 1)
    result = train(config_for(store, tmp_path / "small", epochs=1))
    assert result.micro_batch == 1
    # A run keeps to what it began with.
    assert train(config_for(store, tmp_path, resume=True)).micro_batch == 3


@pytest.mark.long
def test_a_compiled_head_learns_the_same(store: Path, tmp_path: Path) -> None:
    # The smallest head, and batches of one size: compiling takes longer than all the rest.
    values: dict[str, Any] = {"head": "linear", "head_options": {}, "epochs": 2, "batch_size": 8}
    eager = train(config_for(store, tmp_path / "eager", **values))
    compiled = train(config_for(store, tmp_path / "compiled", compile=True, **values))
    for one, other in zip(metrics_of(eager.run_dir), metrics_of(compiled.run_dir), strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    assert load_checkpoint(compiled.best_checkpoint)[1].epoch == compiled.best_epoch


def test_resuming_a_finished_run_only_tells_its_result(straight: Path, store: Path) -> None:
    before = (straight / "metrics.jsonl").read_bytes()
    result = train(config_for(store, straight.parent, resume=True))
    assert result.epochs == 4
    assert result.images_per_s is None
    assert result.best_dice == max(line["val_dice"] for line in metrics_of(straight))
    assert (straight / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"head": "linear", "head_options": {}}, r"head film-conv → linear; head_options"),
        ({"batch_size": 4}, r"other settings \(batch_size 3 → 4\); repeat all options"),
        ({"epochs": 9}, r"\(epochs 4 → 9\)"),
        ({"micro_batch": 1}, r"\(micro_batch 3 → 1\)"),
    ],
)
def test_resuming_with_other_settings_names_them(
    store: Path, straight: Path, values: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        train(config_for(store, straight.parent, resume=True, **values))
    assert "\n" not in str(caught.value)


def test_resuming_on_other_features_is_refused(straight: Path, tmp_path: Path) -> None:
    other = build_store(
        tmp_path / "x.zarr", num_samples=24, level_shapes=SHAPES, mask_width_px=40, weights="other"
    )
    with pytest.raises(FingerprintError, match=r"weights_sha256 test → other"):
        train(config_for(other, straight.parent, resume=True))


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 1},
        {"splits": ("val", "train", "test")},
        {"first_angle_deg": -50},
        {"mask_mtime_ns": 5},
        {"classes": ("stenosis",)},
        {"empty_mask_rows": (0,)},
    ],
    ids=["pixels", "splits", "angles", "masks", "classes", "masks of the same files"],
)
def test_resuming_on_other_data_is_refused(
    straight: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    other = build_store(
        tmp_path / "x.zarr", num_samples=24, level_shapes=SHAPES, mask_width_px=40, **values
    )
    with pytest.raises(ConfigError, match=r"other images, angles or masks than x.zarr") as caught:
        train(config_for(other, straight.parent, resume=True))
    assert "\n" not in str(caught.value)


def test_resuming_on_a_copy_of_the_store_is_possible(straight: Path, tmp_path: Path) -> None:
    copy = build_store(
        tmp_path / "copy.zarr", num_samples=24, level_shapes=SHAPES, mask_width_px=40
    )
    assert train(config_for(copy, straight.parent, resume=True)).epochs == 4


def test_a_run_of_before_masks_were_hashed_goes_on(
    store: Path, straight: Path, tmp_path: Path
) -> None:
    config = config_for(store, tmp_path, resume=True)
    shutil.copytree(straight, config.run_dir)
    file = config.run_dir / "last" / "training.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["training"])
    assert header.pop("masks_sha256")
    save_file(load_file(file), file, {"training": json.dumps(header)})
    assert train(config).epochs == 4


def test_a_run_that_was_killed_as_it_was_replaced_begins_anew(
    store: Path, straight: Path, tmp_path: Path
) -> None:
    """What --overwrite had not deleted yet is the half of another run."""
    config = config_for(store, tmp_path, resume=True)
    shutil.copytree(straight, config.run_dir)
    shutil.rmtree(config.run_dir / "best")
    (config.run_dir / ".to-replace").touch()
    assert_same_run(straight, train(config).run_dir)
    assert not (config.run_dir / ".to-replace").exists()


def test_a_damaged_run_is_not_resumed(store: Path, tmp_path: Path) -> None:
    config = config_for(store, tmp_path)
    (config.run_dir / "last").mkdir(parents=True)
    (config.run_dir / "last" / "training.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"training.safetensors cannot be read"):
        train(dataclasses.replace(config, resume=True))


def test_a_run_whose_state_is_lost_is_not_resumed_but_kept(store: Path, tmp_path: Path) -> None:
    config = config_for(store, tmp_path, epochs=1)
    run_dir = train(config).run_dir
    (run_dir / "last" / "training.safetensors").unlink()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"training.safetensors, which is missing") as caught:
        train(dataclasses.replace(config, resume=True))
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_run_that_was_killed_before_its_first_epoch_is_resumed_from_the_start(
    store: Path, straight: Path, tmp_path: Path
) -> None:
    config = config_for(store, tmp_path)
    with pytest.raises(_StopError):
        train(config, stop_in_epoch(1))
    assert_same_run(straight, train(dataclasses.replace(config, resume=True)).run_dir)


def test_an_existing_run_is_replaced_only_when_told_to(store: Path, tmp_path: Path) -> None:
    first = config_for(store, tmp_path, epochs=2)
    train(first)
    with pytest.raises(ConfigError, match=r"holds a run already; .*--resume .* or --overwrite"):
        train(first)
    train(dataclasses.replace(first, epochs=1, overwrite=True))
    assert len(metrics_of(first.run_dir)) == 1
    assert len(list((first.run_dir / "tensorboard").iterdir())) == 1


def test_two_at_once_never_write_into_one_folder(store: Path, tmp_path: Path) -> None:
    config, refused = config_for(store, tmp_path, epochs=1), list[str]()

    def report(progress: Progress) -> None:
        begun = progress.loss is not None
        # While one loads, there is nothing to resume yet.
        for values in ({}, {"overwrite": True}, *([{"resume": True}] if begun else [])):
            with pytest.raises(ConfigError) as caught:
                train(dataclasses.replace(config, **values))
            refused.append(str(caught.value))

    result = train(config, report)
    at_work = f"{config.run_dir} is being changed by process {os.getpid()} on "
    assert refused[0].startswith(at_work)
    assert refused[1].startswith(at_work)
    assert refused[-1].startswith(at_work)
    assert refused[-1].endswith("and run again; or choose another --name")
    assert "holds a run already" in refused[-3]
    assert not any("\n" in text for text in refused)
    assert len(metrics_of(result.run_dir)) == 1
    assert train(dataclasses.replace(config, resume=True)).epochs == 1, "it has let go"


def test_masks_that_are_not_held_are_read_again(
    store: Path, straight: Path, tmp_path: Path
) -> None:
    run = Run(config_for(store, tmp_path), mask_of=HeldMasks(max_bytes=0))
    for _ in run.steps():
        pass
    assert_same_run(straight, run.config.run_dir)


def test_masks_are_held_as_far_as_there_is_room(store: Path) -> None:
    opened = open_store(store)
    size_bytes = 48 * 40
    held = HeldMasks(max_bytes=2 * size_bytes)
    masks = [held(opened, row, "mask") for row in range(4)]
    assert held.num_bytes == 2 * size_bytes
    for row, mask_MHW in enumerate(masks):
        again = held(opened, row, "mask")
        assert (again is mask_MHW) == (row < 2)
        assert np.array_equal(again, opened.read_mask(row))


def test_a_run_that_is_refused_leaves_the_old_one_alone(store: Path, tmp_path: Path) -> None:
    first = config_for(store, tmp_path, epochs=1)
    train(first)
    before = metrics_of(first.run_dir)
    with pytest.raises(HeadError):
        train(dataclasses.replace(first, head="unet", overwrite=True))
    assert metrics_of(first.run_dir) == before


def test_one_sample_a_split_and_a_batch_larger_than_that_are_enough(tmp_path: Path) -> None:
    tiny = build_store(tmp_path / "x.zarr", num_samples=2, level_shapes=SHAPES)
    result = train(
        config_for(tiny, tmp_path, epochs=2, batch_size=16, head="linear", head_options={})
    )
    assert (result.num_train, result.num_val, result.epochs) == (1, 1, 2)


@pytest.mark.parametrize(
    ("store_values", "values", "error", "expected"),
    [
        (
            {"splits": ("train",)},
            {},
            ConfigError,
            r"no sample in split 'val' \(samples: train 6\)",
        ),
        ({"splits": ("val",)}, {}, ConfigError, r"no sample in split 'train'"),
        (
            {"splits": ("train", "train", "train", "train", "train", "val")},
            {},
            ConfigError,
            r"no sample with a mask in split 'val'",
        ),
        ({}, {"label_set": "vessels"}, ConfigError, r"no label set 'vessels' \(it has mask\)"),
        ({}, {"resume": True}, ConfigError, r"there is no run to resume"),
        ({}, {"device": "cuda:9"}, ConfigError, r"cuda:9 is not there"),
        ({"seal": False}, {}, UnsealedStoreError, r"is not sealed"),
        ({}, {"learning_rate": 1e30}, NumericError, r"the training loss became .* lower --lr"),
    ],
)
def test_a_training_that_cannot_be_is_refused_in_one_line(
    tmp_path: Path,
    store_values: dict[str, Any],
    values: dict[str, Any],
    error: type[Exception],
    expected: str,
) -> None:
    root = build_store(tmp_path / "x.zarr", num_samples=6, level_shapes=SHAPES, **store_values)
    with pytest.raises(error, match=expected) as caught:
        train(config_for(root, tmp_path / "out", **values))
    assert "\n" not in str(caught.value)


def test_an_unsealed_store_is_trained_on_when_allowed(tmp_path: Path) -> None:
    root = build_store(tmp_path / "x.zarr", num_samples=6, level_shapes=SHAPES, seal=False)
    result = train(config_for(root, tmp_path, epochs=1, allow_unsealed=True))
    assert math.isfinite(result.best_dice)


@pytest.mark.parametrize("value", ["-1.0", "'fast'", "float('nan')"])
def test_a_users_head_with_an_impossible_learning_rate_is_refused_in_one_line(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    name = f"rated_heads_{abs(hash(value))}"
    source = DROPOUT_HEAD.replace("needs =", f"learning_rate = {value}\n    needs =")
    assert source != DROPOUT_HEAD
    write_head(tmp_path, monkeypatch, name, source)
    own = {"head": f"{name}:Noisy", "head_options": {}, "epochs": 1}
    with pytest.raises(HeadError, match=r"has learning_rate .*: expected a number above 0"):
        train(config_for(store, tmp_path / "out", **own, learning_rate=None))
    assert train(config_for(store, tmp_path / "out", **own)).epochs == 1
