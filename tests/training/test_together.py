"""Many trainings at once come out as each alone, over memory or one stream, whatever some do."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from own_heads import write_head
from PIL import Image
from safetensors.torch import load_file
from store_builder import build_store
from variant_store import (
    NUM_ROWS,
    NUM_TRAIN,
    NUM_VAL,
    VARIANT,
    Noting,
    build_variant_store,
    image_of,
)

from sam3cache.errors import (
    ConfigError,
    CorruptStoreError,
    HeadError,
    NumericError,
    StoppedError,
    StoreError,
    UnknownHeadError,
)
from sam3cache.extract.relabel import LabelsConfig, set_labels
from sam3cache.features import open_store
from sam3cache.heads.checkpoint import STATE_FILE
from sam3cache.loading import CachedSamples
from sam3cache.training import (
    TrainConfig,
    TrainResult,
    look_ahead,
    plan_runs,
    read_experiments,
    run_experiments,
    train,
    train_together,
)
from sam3cache.training.folders import claimed
from sam3cache.training.loop import Progress, Run
from sam3cache.training.pool import PoolProgress, PoolTask
from sam3cache.training.state import read_state
from sam3cache.training.summary import RunOutcome, SummaryFile, as_json
from sam3cache.training.together import SamplePool, is_device_fault

SHAPES = {"fpn_72": (8, 12, 12), "fpn_144": (4, 24, 24)}
LINEAR: dict[str, Any] = {"head": "linear", "head_options": {}}
NOTING: dict[str, Any] = {"head": "variant_store:Noting", "head_options": {}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four samples of twelve groups, eight each in train, val and test."""
    root = tmp_path_factory.mktemp("together") / "x.zarr"
    return build_store(root, num_samples=24, level_shapes=SHAPES, mask_width_px=40)


def config_for(store: Path, output: Path, **values: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "name": "run",
        "head": "film-conv",
        "head_options": {"embedding_dim": 16},
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "loss_size_px": 48,
        "device": "cpu",
    }
    return TrainConfig(store=str(store), output=str(output), **(defaults | values))


def several(store: Path, output: Path, **values: Any) -> list[TrainConfig]:
    """Runs that differ in all that runs of one stream may differ in."""
    base = config_for(store, output, order_seed=7, **values)
    return [
        replace(base, name="plain"),
        replace(base, name="averaged", ema=0.9, batch_size=3, seed=1),
        replace(base, name="linear", head="linear", head_options={}, epochs=3, batch_size=6),
        replace(base, name="halves", micro_batch=2, warmup_epochs=0.5),
        replace(base, name="augmented", augment=("noise", "channel-dropout")),
    ]


def assert_equal_runs(one: Path, other: Path) -> None:
    for file in ("best/model.safetensors", "last/model.safetensors", "last/training.safetensors"):
        first, second = load_file(one / file), load_file(other / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), file
    kept = ("epoch", "lr", "train_loss", "val_dice")
    lines = [(run / "metrics.jsonl").read_text("utf-8").splitlines() for run in (one, other)]
    first_lines, second_lines = ([json.loads(line) for line in text] for text in lines)
    assert [[m[k] for k in kept] for m in first_lines] == [
        [m[k] for k in kept] for m in second_lines
    ]


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of ``several``, each trained by itself."""
    output = tmp_path_factory.mktemp("alone")
    for config in several(store, output):
        train(config)
    return output


@pytest.mark.parametrize("residency", ["stream", "ram"])
def test_each_of_several_comes_out_as_alone_to_the_bit(
    store: Path, alone: Path, tmp_path: Path, residency: str
) -> None:
    configs = several(store, tmp_path, residency=residency)
    outcomes = dict(train_together(configs))
    assert sorted(outcomes) == list(range(len(configs)))
    for outcome in outcomes.values():
        assert isinstance(outcome, TrainResult), outcome
        assert outcome.residency == residency
    for config in configs:
        assert_equal_runs(alone / config.name, config.run_dir)


def test_seeds_share_one_copy_in_memory(store: Path, tmp_path: Path) -> None:
    base = config_for(store, tmp_path / "one", residency="ram", epochs=1)
    seeds = [run.config for run in plan_runs([base], seeds=3)]
    assert len({PoolTask(0, config, ()).key for config in seeds}) == 1
    assert len({PoolTask(0, config, ()).stream for config in seeds}) == 3
    pool = SamplePool(())
    runs = [Run(config, open_samples=pool.open, mask_of=pool.mask) for config in seeds]
    assert len({run.train_samples for run in runs}) == 1


def test_runs_of_several_orders_may_stream_side_by_side(
    store: Path, alone: Path, tmp_path: Path
) -> None:
    plain = several(store, tmp_path, residency="stream")[0]
    other = replace(plain, name="other", order_seed=8)
    outcomes = dict(train_together([plain, other]))
    assert all(isinstance(outcome, TrainResult) for outcome in outcomes.values()), outcomes
    assert_equal_runs(alone / "plain", plain.run_dir)
    single = train(replace(other, output=str(tmp_path / "alone")))
    assert_equal_runs(single.run_dir, other.run_dir)


def characters_read() -> int:
    return int(psutil.Process().io_counters().read_chars)


@pytest.mark.skipif(sys.platform != "linux", reason="counts what this process reads")
def test_a_stream_is_read_once_for_all_who_go_side_by_side(tmp_path: Path) -> None:
    # Large enough that the features are nearly all that is read.
    shapes = {"fpn_72": (64, 72, 72)}
    store = build_store(tmp_path / "x.zarr", num_samples=12, level_shapes=shapes)
    base = config_for(store, tmp_path, head="linear", head_options={}, residency="stream")
    base = replace(base, epochs=1, loss_size_px=12)
    read = characters_read()
    train(replace(base, name="alone"))
    alone_bytes = characters_read() - read
    assert alone_bytes > 12 * 64 * 72 * 72
    configs = [replace(base, name=f"run{i}", seed=i, order_seed=0) for i in range(4)]
    read = characters_read()
    assert len(list(train_together(configs))) == 4
    # Four alone would read four times as much.
    assert characters_read() - read < 1.5 * alone_bytes


def test_one_that_fails_or_has_lost_patience_does_not_hold_up_the_others(
    store: Path, alone: Path, tmp_path: Path
) -> None:
    plain, averaged, *_ = several(store, tmp_path, residency="stream")
    configs = [
        replace(plain, name="diverges", learning_rate=1e30),
        plain,
        replace(plain, name="impatient", epochs=9, patience=1, learning_rate=1e-12),
        averaged,
    ]
    outcomes = dict(train_together(configs))
    assert isinstance(outcomes[0], NumericError)
    impatient = outcomes[2]
    assert isinstance(impatient, TrainResult)
    assert (impatient.stopped_early, impatient.epochs) == (True, 2)
    for config in (plain, averaged):
        assert_equal_runs(alone / config.name, config.run_dir)


def test_those_who_were_stopped_at_different_places_go_on_together(
    store: Path, alone: Path, tmp_path: Path
) -> None:
    configs = several(store, tmp_path, residency="stream")
    for number, config in enumerate(configs):
        asked = iter([None] * (8 + number + 1))  # after each mask, and then after each step
        with pytest.raises(StoppedError, match="was stopped by a test"):
            train(config, stop=lambda asked=asked: next(asked, "a test"))
    resumed = [replace(config, resume=True) for config in configs]
    assert all(isinstance(o, TrainResult) for _, o in train_together(resumed))
    for config in configs:
        assert_equal_runs(alone / config.name, config.run_dir)


@pytest.mark.parametrize("residency", ["stream", "ram"])
def test_folds_share_their_samples_and_come_out_as_alone(
    store: Path, tmp_path: Path, residency: str
) -> None:
    base = config_for(store, tmp_path / "together", residency=residency, epochs=1)
    runs = plan_runs([base], folds=3)
    assert [run.config.name for run in runs] == ["run-fold0", "run-fold1", "run-fold2"]
    outcomes = dict(train_together([run.config for run in runs]))
    for number, run in enumerate(runs):
        outcome = outcomes[number]
        assert isinstance(outcome, TrainResult)
        single = train(replace(run.config, output=str(tmp_path / "alone")))
        assert (single.num_train, single.num_val) == (outcome.num_train, outcome.num_val)
        assert_equal_runs(single.run_dir, outcome.run_dir)
    num_val = [o.num_val for o in outcomes.values() if isinstance(o, TrainResult)]
    # The sixteen of train and val, each validated on once; none of test's eight.
    assert sum(num_val) == 16
    assert {o.num_train + o.num_val for o in outcomes.values() if isinstance(o, TrainResult)} == {
        16
    }


@pytest.mark.parametrize("residency", ["stream", "ram"])
def test_folds_with_variants_share_their_samples_and_learn_from_none_that_is_held_out(
    tmp_path: Path, residency: str
) -> None:
    store = build_variant_store(tmp_path / "x.zarr")
    base = config_for(
        store, tmp_path / "together", residency=residency, epochs=2, batch_size=3, **NOTING
    )
    configs = [run.config for run in plan_runs([base], folds=3)]
    Noting.trained.clear()
    outcomes = dict(train_together(configs))
    trained = [set(rows) for rows in Noting.trained]
    assert len(trained) == 3
    for number, config in enumerate(configs):
        outcome = outcomes[number]
        assert isinstance(outcome, TrainResult), outcome
        alone = train(replace(config, output=str(tmp_path / "alone")))
        assert trained[number] == Noting.trained[-1]
        assert_equal_runs(alone.run_dir, outcome.run_dir)

    pool = SamplePool(("fpn_72",))
    again = [replace(config, output=str(tmp_path / "again")) for config in configs]
    runs = [Run(config, open_samples=pool.open, mask_of=pool.mask) for config in again]
    assert len({run.train_samples for run in runs}) == 1, "one copy, or one stream, for all folds"
    images = set(range(NUM_TRAIN + NUM_VAL))
    for run, rows in zip(runs, trained, strict=True):
        held_out = {run.val_samples.rows[index] for index in run.val_indices}
        assert {image_of(row) for row in rows} == images - held_out
        assert any(image_of(row) != row for row in rows), "the case is to draw variants"
    for epoch in (1, 2):
        of_folds = [set(run.train_indices(epoch) or ()) for run in runs]
        num_read = len(set().union(*of_folds))
        assert num_read == NUM_TRAIN + NUM_VAL, "one variant of an image, whoever learns from it"


def test_runs_that_are_judged_alike_hold_each_mask_once(store: Path, tmp_path: Path) -> None:
    pool, handed_out = SamplePool(()), list[torch.Tensor]()

    def mask_of(*what: Any) -> torch.Tensor:
        handed_out.append(pool.mask(*what))
        return handed_out[-1]

    for seed in range(2):
        Run(config_for(store, tmp_path, name=f"run{seed}"), open_samples=pool.open, mask_of=mask_of)
    first, second = handed_out[:8], handed_out[8:]
    assert [id(mask_MHW) for mask_MHW in first] == [id(mask_MHW) for mask_MHW in second]


def test_runs_that_begin_after_a_correction_use_what_was_corrected(tmp_path: Path) -> None:
    shapes = {"fpn_72": (8, 6, 6)}
    root = build_store(tmp_path / "x.zarr", num_samples=9, level_shapes=shapes)
    pool = SamplePool(())

    def begin(name: str) -> Run:
        config = config_for(root, tmp_path, name=name)
        return Run(config, open_samples=pool.open, mask_of=pool.mask)

    before, mask_before = begin("before"), pool.mask(open_store(root), 1, "mask")
    shutil.rmtree(root)
    changed: dict[str, Any] = {"first_angle_deg": -50, "empty_mask_rows": (0, 1)}
    build_store(root, num_samples=9, level_shapes=shapes, **changed)
    store, after = open_store(root), begin("after")
    assert begin("another").train_samples is after.train_samples
    assert after.train_samples is not before.train_samples
    rows = after.train_samples.rows
    own = CachedSamples(store, rows, ("fpn_72",), target_size_px=48).batch([0, 1])
    used = after.train_samples.batch([0, 1])
    for name in ("angles_B2", "target_BKTT"):
        assert torch.equal(getattr(used, name), getattr(own, name)), name
    assert mask_before.any()
    assert not pool.mask(store, 1, "mask").any()
    # One that had begun goes on with what it began with.
    assert before.train_samples.batch([0]).target_BKTT.any()  # type: ignore[union-attr]


def test_whatever_one_fails_by_the_others_go_on(store: Path, alone: Path, tmp_path: Path) -> None:
    plain, averaged, *_ = several(store, tmp_path, residency="stream")
    configs = [replace(plain, name="asserts"), plain, averaged]

    def report(number: int, progress: Progress) -> None:
        assert number != 0 or progress.loss is None, "of no kind that we foresee"

    outcomes = dict(train_together(configs, report))
    assert isinstance(outcomes[0], AssertionError)
    for config in (plain, averaged):
        assert_equal_runs(alone / config.name, config.run_dir)


FAULTY_HEAD = """
import os
from pathlib import Path
from torch import nn
from sam3cache.heads import Head

class Faulty(Head):
    needs = ("fpn_72",)
    def __init__(self, level_shapes, *, num_classes=1, fault=False, name=""):
        super().__init__()
        self.fault, self.name = fault, name
        self.layer = nn.Conv2d(level_shapes["fpn_72"][0], num_classes, 1)
    def forward(self, batch):
        if self.training:
            with Path("processes").open("a", encoding="utf-8") as file:
                file.write(f"{self.name} {os.getpid()}\\n")
        if self.fault and self.training:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return self.layer(self.feature(batch, "fpn_72"))
"""


def test_after_a_fault_of_the_device_a_new_process_goes_on(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_head(tmp_path, monkeypatch, "faulty_heads", FAULTY_HEAD)
    base = config_for(store, tmp_path / "out", head="faulty_heads:Faulty", residency="stream")
    base = replace(base, order_seed=0, save_minutes=0)
    names = ("before", "faulty", "after")
    configs = [
        replace(base, name=name, head_options={"fault": name == "faulty", "name": name})
        for name in names
    ]
    outcomes = run_experiments(plan_runs(configs), ["cpu"])
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "done"]
    assert "RuntimeError: CUDA error: device-side assert triggered" in outcomes[1].error
    lines = (tmp_path / "processes").read_text("utf-8").split("\n")[:-1]
    processes = {name: {line.split()[1] for line in lines if name in line} for name in names}
    assert processes["before"] > processes["faulty"], "it went on in another"
    assert processes["after"].isdisjoint(processes["faulty"])
    for number in (0, 2):
        single = train(replace(configs[number], output=str(tmp_path / "alone")))
        assert_equal_runs(single.run_dir, configs[number].run_dir)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (ValueError("CUDA error: in somebody's own words"), False),
    ],
)
def test_a_fault_of_the_device_is_told_from_other_failures(
    error: Exception, expected: bool
) -> None:
    assert is_device_fault(error) is expected
    wrapped = HeadError("head x fails in training")
    wrapped.__cause__ = error
    assert is_device_fault(wrapped) is expected


@pytest.mark.gpu
def test_after_a_real_fault_of_a_gpu_a_new_process_goes_on(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FAULTY_HEAD.replace(
        'raise RuntimeError("CUDA error: device-side assert triggered")',
        "self.layer.bias[batch.angles_B2[:, 0].isfinite().long() + 7].sum().item()",
    )
    assert source != FAULTY_HEAD
    write_head(tmp_path, monkeypatch, "asserting_heads", source)
    base = config_for(store, tmp_path / "out", head="asserting_heads:Faulty", device="cuda")
    for residency in ("stream", "device"):
        own = replace(base, output=str(tmp_path / residency), residency=residency, order_seed=0)  # type: ignore[arg-type]
        configs = [
            replace(own, name=name, head_options={"fault": name == "faulty", "name": name})
            for name in ("before", "faulty", "after")
        ]
        outcomes = run_experiments(plan_runs(configs), ["cuda:0"])
        assert [outcome.status for outcome in outcomes] == ["done", "failed", "done"], outcomes
        assert "device-side assert" in outcomes[1].error


def test_damage_in_a_shared_stream_is_told_to_everyone_who_meets_it(tmp_path: Path) -> None:
    store = build_store(tmp_path / "x.zarr", num_samples=9, level_shapes={"fpn_72": (8, 12, 12)})
    shard = next((store / "levels" / "fpn_72").rglob("c/0/*/*/*"))
    content = bytearray(shard.read_bytes())
    content[100:3000] = bytes(2900)
    shard.write_bytes(content)
    configs = [
        config_for(store, tmp_path, name=name, residency="stream", epochs=1) for name in "ab"
    ]
    outcomes = [outcome for _, outcome in train_together(configs)]
    assert [type(outcome) for outcome in outcomes] == [CorruptStoreError] * 2


HEADS_TOML = """
[defaults]
epochs = 2
batch_size = 4
learning_rate = 3e-3
loss_size_px = 48

[[experiment]]
name = "conv"
head = "film-conv"
head_options = { embedding_dim = 16 }

[[experiment]]
name = "linear"
head = "linear"
epochs = 1

[[experiment]]
name = "diverges"
head = "linear"
learning_rate = 1e30
"""


def test_experiments_of_a_file_run_in_processes_and_what_fails_is_set_aside(
    store: Path, tmp_path: Path
) -> None:
    (tmp_path / "heads.toml").write_text(HEADS_TOML, encoding="utf-8")
    output = tmp_path / "checkpoints" / "heads"
    base = TrainConfig(
        store=str(store), name="heads", output=str(output), device="cpu", resume=True
    )
    experiments = read_experiments(tmp_path / "heads.toml", base)
    runs = plan_runs(experiments, seeds=2)
    # One of them has begun before, and was stopped after its first step.
    begun: list[Progress] = []
    with pytest.raises(StoppedError, match="after 4 of 8 images"):
        train(
            replace(runs[0].config, resume=False),
            begun.append,
            lambda: "the test" if begun and begun[-1].num_done == 4 and begun[-1].loss else None,
        )
    assert {report.epoch for report in begun if report.stage == "train"} == {1}
    reports: list[PoolProgress] = []
    outcomes = run_experiments(runs, ["cpu", "cpu"], reports.append)

    assert [(o.name, o.status) for o in outcomes] == [
        ("conv-seed0", "done"),
        ("conv-seed1", "done"),
        ("linear-seed0", "done"),
        ("linear-seed1", "done"),
        ("diverges-seed0", "failed"),
        ("diverges-seed1", "failed"),
    ]
    # Two steps an epoch: both losses are still finite, what the second left is not.
    assert outcomes[4].error.startswith("weights became infinite or no number in epoch 1; start")
    # What a process of its own gave is what this one gives, with as many threads.
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = replace(runs[1].config, output=str(tmp_path / "alone"), resume=False)
        single = train(alone)
    finally:
        torch.set_num_threads(torch_threads)
    assert_equal_runs(single.run_dir, output / "conv-seed1")

    summary = json.loads((output / "summary.json").read_text("utf-8"))
    assert summary == json.loads(json.dumps(as_json(outcomes)))
    conv, linear, diverges = summary["experiments"]
    dice = [o.result.best_dice for o in outcomes[:2] if o.result is not None]
    assert conv["dice_mean"] == pytest.approx(sum(dice) / 2)
    assert conv["dice_std"] == pytest.approx(abs(dice[0] - dice[1]) / 2**0.5)
    assert (linear["num_runs"], linear["num_done"]) == (2, 2)
    assert (diverges["num_done"], diverges["dice_mean"]) == (0, None)
    assert str(tmp_path) not in json.dumps(summary)

    # Of 2 + 2 + 1 + 1 + 2 + 2 epochs of eight images, those of the step before are no part.
    assert reports[-1].num_images == reports[-1].num_total == 10 * 8 - 4
    assert {device for report in reports for device in report.devices} == {"cpu:0", "cpu:1"}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"head": "film-detail", "head_options": {}}, HeadError, "second: head film-detail needs"),
        ({"head": "fil-det"}, UnknownHeadError, "second: no head is named 'fil-det'"),
        ({"head_options": {"wide": 1}}, UnknownHeadError, "second: head film-conv has no option"),
        ({"augment": ("photometric",)}, ConfigError, "second: augmentation photometric changes"),
        ({"label_set": "other"}, ConfigError, "second: .* has no label set 'other'"),
    ],
)
def test_an_experiment_that_cannot_begin_is_refused_before_any_other_does(
    store: Path, tmp_path: Path, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    first = config_for(store, tmp_path / "out", name="first")
    runs = plan_runs([first, replace(first, name="second", **values)])
    with pytest.raises(error, match=f"experiment {message}") as caught:
        run_experiments(runs, ["cpu"])
    assert type(caught.value) is error
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_is_not_trained_over(store: Path, tmp_path: Path) -> None:
    runs = plan_runs([config_for(store, tmp_path)], seeds=2)
    runs[1].config.run_dir.mkdir(parents=True)
    (runs[1].config.run_dir / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run-seed1 holds a run already; .*--resume"):
        run_experiments(runs, ["cpu"])


def run_files(folder: Path) -> dict[str, bytes]:
    """Return what runs have written, but for the logs of TensorBoard and what locks leave."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if path.is_file() and "tensorboard" not in name and path.name != ".lock"
    }


def train_two_seeds(base: TrainConfig) -> dict[str, bytes]:
    """Train two runs of an experiment; return the files of its folder."""
    for run in plan_runs([base], seeds=2):
        train(run.config)
    return run_files(Path(base.output))


@pytest.mark.parametrize("variants", ["all", "none"])
def test_runs_go_on_with_the_variants_that_they_began_with(tmp_path: Path, variants: str) -> None:
    root = build_variant_store(tmp_path / "x.zarr", num_rows=NUM_TRAIN + NUM_VAL)
    base = config_for(root, tmp_path / "out", name="floor", **NOTING)
    before = train_two_seeds(base)
    halfway = config_for(root, tmp_path, name="halfway", epochs=3, **NOTING)
    straight = train(replace(halfway, name="straight"))
    seen: list[Progress] = []
    with pytest.raises(StoppedError):
        train(halfway, seen.append, lambda: "the test" if seen and seen[-1].epoch == 2 else None)

    shutil.rmtree(root)
    build_variant_store(root)
    resumed = replace(base, resume=True, variants=variants)
    announced: list[TrainConfig] = []
    outcomes = run_experiments(plan_runs([resumed], seeds=3), ["cpu"], announce=announced.extend)
    assert [outcome.status for outcome in outcomes] == ["done"] * 3, outcomes
    assert [config.name for config in announced] == ["floor-seed2"]
    after = run_files(tmp_path / "out")
    assert {name: after[name] for name in before if name != "summary.json"} == {
        name: content for name, content in before.items() if name != "summary.json"
    }
    records = [read_state(o.result.run_dir / "last" / STATE_FILE)[0] for o in outcomes if o.result]
    assert [record.settings["variants_used"] for record in records] == [[]] * 3
    assert len({record.settings["data_sha256"] for record in records}) == 1
    again = train(replace(halfway, resume=True, variants=variants))
    assert_equal_runs(straight.run_dir, again.run_dir)
    assert look_ahead(replace(halfway, resume=True, variants=variants)).num_variants == 0

    # Another experiment of the same name elsewhere takes all there are.
    fresh = plan_runs([replace(resumed, output=str(tmp_path / "new"), variants="all")])
    assert fresh[0].config.variants == "all"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"variants": "gamma1.5"}, r"run floor-seed0: .* \(variants none → gamma1.5\); repeat all"),
        ({"epochs": 3}, r"run floor-seed0: .* \(epochs 2 → 3\)"),
        ({"learning_rate": 0.5}, r"run floor-seed0: .* \(learning_rate 0.003 → 0.5\)"),
        ({}, r"run floor-seed0: .* learned from other images, angles or masks than x.zarr"),
    ],
)
def test_what_would_mix_the_runs_of_an_experiment_leaves_all_as_it_is(
    tmp_path: Path, values: dict[str, Any], expected: str
) -> None:
    root = build_variant_store(tmp_path / "x.zarr", num_rows=NUM_TRAIN + NUM_VAL)
    base = config_for(root, tmp_path / "out", name="floor", **NOTING)
    before = train_two_seeds(base)
    shutil.rmtree(root)
    build_variant_store(root, num_rows=NUM_ROWS if values else NUM_TRAIN + NUM_VAL - 1)
    runs = plan_runs([replace(base, resume=True, **values)], seeds=3)
    announced: list[TrainConfig] = []
    with pytest.raises(ConfigError, match=expected + r".*\(no run has begun\)") as caught:
        run_experiments(runs, ["cpu"], announce=announced.extend)
    assert "\n" not in str(caught.value)
    assert not announced
    assert run_files(tmp_path / "out") == before


def test_runs_that_overwrite_go_on_with_what_is_new_alone(store: Path, tmp_path: Path) -> None:
    old = config_for(store, tmp_path / "out", name="x", epochs=1, **LINEAR)
    before = train_two_seeds(old)
    # The same settings: nothing but the mark tells the old runs from the new.
    new = plan_runs([replace(old, overwrite=True)], seeds=2)
    with pytest.raises(StoppedError, match=r"0 of 2 runs done; go on with --resume"):
        run_experiments(new, ["cpu"], stop=lambda: "the test")
    still = run_files(tmp_path / "out")
    kept = {name: still[name] for name in before if name != "summary.json"}
    assert kept == {name: content for name, content in before.items() if name != "summary.json"}
    resumed = plan_runs([replace(old, resume=True)], seeds=2)
    announced: list[TrainConfig] = []
    outcomes = run_experiments(resumed, ["cpu"], announce=announced.extend)
    assert [config.name for config in announced] == ["x-seed0", "x-seed1"], "neither is done"
    trained = [outcome.result.images_per_s is not None for outcome in outcomes if outcome.result]
    assert trained == [True, True]
    assert not list((tmp_path / "out").rglob(".to-replace"))
    after = run_files(tmp_path / "out")
    for name in ("x-seed0", "x-seed1"):
        assert after[f"{name}/metrics.jsonl"] != before[f"{name}/metrics.jsonl"], "other times"


def test_the_summary_keeps_what_is_done_and_what_others_did(store: Path, tmp_path: Path) -> None:
    base = config_for(store, tmp_path / "out", name="x", epochs=1, **LINEAR)
    first = run_experiments(plan_runs([base], seeds=2), ["cpu"])
    more = run_experiments(plan_runs([replace(base, seed=2)], seeds=2), ["cpu"])
    summary = tmp_path / "out" / "summary.json"
    everything = json.loads(json.dumps(as_json([*first, *more])))["runs"]
    assert json.loads(summary.read_text("utf-8"))["runs"] == everything

    # Told to stop before any of them has been looked at again, they are still done; of a run that
    # was deleted nothing is kept.
    shutil.rmtree(tmp_path / "out" / "x-seed3")
    with pytest.raises(StoppedError, match="with 2 of 2 runs done"):
        run_experiments(
            plan_runs([replace(base, resume=True)], seeds=2), ["cpu"], stop=lambda: "the test"
        )
    kept = json.loads(summary.read_text("utf-8"))["runs"]
    assert [run["name"] for run in kept] == ["x-seed2", "x-seed0", "x-seed1"]
    assert {run["status"] for run in kept} == {"done"}


def test_what_came_out_with_other_settings_is_no_part_of_the_mean(
    store: Path, tmp_path: Path
) -> None:
    base = config_for(store, tmp_path, name="x")
    outcome = RunOutcome("x", "x-seed0", 0, None, "done", "", train(replace(base, name="x-seed0")))
    other = replace(outcome, experiment="y", name="y")
    train(replace(base, name="y"))
    train(replace(base, name="x-seed5", learning_rate=0.1))
    SummaryFile(tmp_path).write([outcome, other])
    later = replace(outcome, name="x-seed5", seed=5)
    SummaryFile(tmp_path).write([later])
    written = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert [run["name"] for run in written["runs"]] == ["x-seed0", "y", "x-seed5"]
    assert [(one["name"], one["num_runs"]) for one in written["experiments"]] == [
        ("y", 1),
        ("x", 1),
    ]
    assert SummaryFile(tmp_path).done("x-seed0") == outcome
    assert SummaryFile(tmp_path).done("x-seed7") is None


def test_seeds_that_are_added_draw_as_those_that_are_there(tmp_path: Path) -> None:
    root = build_variant_store(tmp_path / "x.zarr")
    base = config_for(root, tmp_path / "out", name="x", **NOTING)
    train(replace(base, name="x-seed0", variants="none"))
    for resume in (True, False):
        (added,) = plan_runs([replace(base, seed=4, resume=resume)])[:1]
        assert added.config.variants == "none"
    # Whoever names them decides, and what is replaced says nothing.
    assert plan_runs([replace(base, variants=VARIANT)])[0].config.variants == VARIANT
    replaced = plan_runs([replace(base, overwrite=True)], seeds=2)
    assert [run.config.variants for run in replaced] == ["all", "all"]
    # Another experiment, whose name begins alike.
    assert plan_runs([replace(base, name="x-seed")])[0].config.variants == "all"

    train(replace(base, name="x-seed1"))
    expected = (
        r"the runs of x that are there began with several choices of stored variants "
        rf"\(x-seed0 none, x-seed1 {VARIANT}\): x-seed2 could be like one of them alone"
    )
    with pytest.raises(ConfigError, match=expected):
        plan_runs([replace(base, resume=True)], seeds=3)
    both = plan_runs([replace(base, resume=True)], seeds=2)
    assert [run.config.variants for run in both] == ["none", VARIANT]


def test_an_overwriting_that_is_refused_leaves_what_is_there(store: Path, tmp_path: Path) -> None:
    base = config_for(store, tmp_path / "out", name="x", epochs=1, **LINEAR)
    before = train_two_seeds(base)

    def refuse(configs: list[TrainConfig]) -> None:
        look_ahead(configs[0])  # as the command does, which says what there is to learn from

    again = plan_runs([replace(base, overwrite=True, variants="rot10")], seeds=2)
    with pytest.raises(ConfigError, match="has no variant 'rot10'"):
        run_experiments(again, ["cpu"], announce=refuse)
    assert run_files(tmp_path / "out") == before


def test_experiments_with_an_overlay_of_their_own_are_resumed(store: Path, tmp_path: Path) -> None:
    """Its labels are others than those of the store, of which the first experiment learns."""
    labels = tmp_path / "labels.csv"
    masks = tmp_path / "masks"
    masks.mkdir()
    lines = ["id,mask"]
    for sample in open_store(store).samples:
        mask = np.zeros((96, 96), np.uint8)
        mask[20:60, 10 : 40 + sample.row] = 255
        Image.fromarray(mask).save(masks / f"{sample.row}.png")
        lines.append(f"{sample.id},masks/{sample.row}.png")
    labels.write_text("\n".join(lines), encoding="utf-8")
    overlay = tmp_path / "overlay"
    set_labels(LabelsConfig(store, "own", labels, overlay=overlay))

    plain = config_for(store, tmp_path / "out", name="plain", epochs=1)
    beside = replace(plain, name="beside", overlay=str(overlay), label_set="own")
    for config in (plain, beside):
        train(config)
    announced: list[TrainConfig] = []
    # Nothing stands against them, and nothing is left to do.
    again = plan_runs([replace(config, resume=True) for config in (plain, beside)])
    with pytest.raises(StoppedError):
        run_experiments(again, ["cpu"], stop=lambda: "the test", announce=announced.extend)
    assert not announced


def test_a_run_that_is_at_work_is_not_to_be_replaced(store: Path, tmp_path: Path) -> None:
    base = config_for(store, tmp_path / "out", name="x", epochs=1, **LINEAR)
    runs = plan_runs([base], seeds=2)
    for run in runs:
        train(run.config)
    again = plan_runs([replace(base, overwrite=True)], seeds=2)
    with claimed(runs[1].config.run_dir):
        with pytest.raises(ConfigError, match=r"x-seed1 is being changed by process"):
            run_experiments(again, ["cpu"])
        assert not list((tmp_path / "out").rglob(".to-replace"))


@pytest.mark.parametrize("content", ["", "[1]", '{"runs": 3}', '{"runs": [{"name": "x"}]}'])
def test_a_summary_that_cannot_be_read_is_written_anew(
    store: Path, tmp_path: Path, content: str
) -> None:
    runs = plan_runs([config_for(store, tmp_path, name="x")])
    (tmp_path / "summary.json").write_text(content, encoding="utf-8")
    with pytest.raises(StoppedError):
        run_experiments(runs, ["cpu"], stop=lambda: "the test")
    written = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert [(run["name"], run["status"]) for run in written["runs"]] == [("x", "waiting")]


def test_a_folder_of_runs_is_one_programs_at_a_time(store: Path, tmp_path: Path) -> None:
    runs = plan_runs([config_for(store, tmp_path / "out", resume=True)], seeds=2)
    expected = rf"out is being changed by process {os.getpid()} on .* or choose another --name"
    with claimed(tmp_path / "out"), pytest.raises(ConfigError, match=expected):
        run_experiments(runs, ["cpu"])
    assert not (tmp_path / "out").exists(), "nothing had come into it"


def test_folds_without_anything_to_be_judged_by_are_refused_before_the_first_run(
    tmp_path: Path,
) -> None:
    # The fourth group has one image, and no mask.
    shapes = {"fpn_72": (8, 6, 6)}
    root = build_store(
        tmp_path / "x.zarr", num_samples=7, level_shapes=shapes, splits=("train", "val")
    )
    runs = plan_runs([config_for(root, tmp_path / "out")], folds=4)
    expected = (
        r"1 of 4 folds \(\d\) have no image with a mask in label set mask: of the 4 groups of "
        r"train and val 3 have one; take fewer folds"
    )
    with pytest.raises(ConfigError, match=expected) as caught:
        run_experiments(runs, ["cpu"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    for run in runs:
        with pytest.raises(ConfigError, match=expected):
            train(run.config)


def test_a_store_that_cannot_be_used_stops_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        run_experiments(plan_runs([config_for(tmp_path / "no.zarr", tmp_path)]), ["cpu"])


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM cannot be sent there")
@pytest.mark.parametrize(
    ("signalled", "name"), [("the program", "SIGTERM"), ("all processes", "SIGUSR1")]
)
def test_many_runs_that_are_told_to_stop_save_their_place_and_go_on(
    store: Path, tmp_path: Path, signalled: str, name: str
) -> None:
    options = ("--head", "film-conv", "--head-option", "embedding_dim=16", "--epochs", 20)
    options += ("--batch-size", 4, "--lr", 3e-3, "--loss-size", 48, "--seeds", 2)
    options += ("--devices", "cpu", "--name", "both", "--set", "order_seed=3")
    options += ("--residency", "stream")
    command = [sys.executable, "-m", "sam3cache", "train", store, *options, "-o", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [*map(str, command)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = tmp_path / "both" / "both-seed1" / "metrics.jsonl"
    deadline_s = time.monotonic() + 120
    while not lines.exists() and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    if signalled == "all processes":  # as SLURM does with those of a job
        os.killpg(process.pid, getattr(signal, name))
    else:
        process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name), errors
    assert f"stopped by {name} with 0 of 2 runs done; go on with --resume" in errors
    assert len(lines.read_text("utf-8").splitlines()) < 20, "it had finished before"
    summary = json.loads((tmp_path / "both" / "summary.json").read_text("utf-8"))
    assert [run["status"] for run in summary["runs"]] == ["waiting"] * 2
    for number in range(2):  # Within an epoch: where it was, not where it last was by itself.
        state = tmp_path / "both" / f"both-seed{number}" / "last" / "training.safetensors"
        assert read_state(state)[0].num_seen > 0
    base = config_for(store, tmp_path / "both", name="both", epochs=20, residency="stream")
    runs = plan_runs([replace(base, order_seed=3)], seeds=2)
    resumed = [replace(run.config, resume=True) for run in runs]
    assert all(isinstance(o, TrainResult) for _, o in train_together(resumed))
    alone = train(replace(runs[1].config, output=str(tmp_path / "alone")))
    assert_equal_runs(alone.run_dir, runs[1].config.run_dir)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", r"names no experiment: write an \[\[experiment\]\] table"),
        ("[[experiment]\n", r"heads.toml cannot be read as TOML"),
        ('[other]\nname = "x"', r"has 'other': expected \[defaults\] and \[\[experiment\]\]"),
        ('[[experiment]]\nhead = "linear"', r'experiment 1 has no name: write name = "..."'),
        (
            '[[experiment]]\nname = "x"\nepoch = 3',
            r"'epoch' is no setting of an experiment; did you mean epochs\?",
        ),
        ('[[experiment]]\nname = "x"\nstore = "y"', r"'store' is no setting"),
        ('[[experiment]]\nname = "x"\nepochs = "3"', r"epochs is '3': expected a whole number"),
        ('[[experiment]]\nname = "x"\nema = 2', r"experiment 1: ema is 2: expected 0 \(none\)"),
        ('[[experiment]]\nname = "x"\n[[experiment]]\nname = "x"', r"experiment 2 is named 'x'"),
        ('[[experiment]]\nname = "x"\naugment = "crop"', r"augment is 'crop': expected a list"),
    ],
)
def test_a_mistake_in_the_file_is_answered_by_one_line(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "heads.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=expected) as caught:
        read_experiments(path, TrainConfig(store="x.zarr", name="base"))
    assert "\n" not in str(caught.value)
