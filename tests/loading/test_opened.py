"""A store in Python: arrays that read when they are indexed, a dataset, batches, docs/python.md."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from store_builder import build_store

import sam3cache
from sam3cache.errors import (
    ConfigError,
    CorruptStoreError,
    MissingSampleError,
    NotAStoreError,
    UnsealedStoreError,
)
from sam3cache.features import open_store
from sam3cache.loading import CachedSamples
from sam3cache.loading.opened import OpenedStore

DOCUMENT = Path(__file__).parents[2] / "docs" / "python.md"
SHAPES = {"fpn_72": (4, 9, 9), "fpn_72.int8": (4, 9, 9), "image_1008": (1, 21, 21)}
NUM_SAMPLES = 19


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_store(
        tmp_path_factory.mktemp("opened") / "x.zarr", num_samples=NUM_SAMPLES, level_shapes=SHAPES
    )


@pytest.fixture(scope="module")
def store(root: Path) -> OpenedStore:
    return sam3cache.open(root)


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "torch, numpy, zarr, pyarrow, click"
    program = (
        "import sys, sam3cache; assert sam3cache.Sam3CacheError.exit_code == 1; "
        f"print([name for name in '{heavy}'.split(', ') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_every_public_name_is_there() -> None:
    assert all(getattr(sam3cache, name) is not None for name in sam3cache.__all__)
    assert set(sam3cache.__all__) <= set(dir(sam3cache))
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        sam3cache.opne  # noqa: B018


def test_the_store_tells_what_it_has(store: OpenedStore) -> None:
    assert len(store) == NUM_SAMPLES == len(store.samples)
    assert set(store.levels) == set(SHAPES)
    assert list(store.labels) == ["mask"]
    assert store.rows("val") == [s.row for s in store.samples if s.split == "val"]
    assert store.rows() == list(range(NUM_SAMPLES))
    assert "19 samples; levels fpn_72" in repr(store)


def test_a_level_is_an_array_by_row(store: OpenedStore, root: Path) -> None:
    features, level = open_store(root), store.levels["fpn_72"]
    assert (level.shape, level.dtype, len(level)) == ((19, 4, 9, 9), np.float16, 19)
    assert np.array_equal(level[3], features.read("fpn_72", 3))
    assert np.array_equal(level[np.int64(3)], features.read("fpn_72", 3))
    assert np.array_equal(level[2:9:3], np.stack([level[2], level[5], level[8]]))
    assert np.array_equal(level[[8, 2]], np.stack([level[8], level[2]]))
    assert np.array_equal(level[np.array([8, 2])], level[[8, 2]])
    assert level[[]].shape == (0, 4, 9, 9)
    assert level[:].shape == level.shape
    packed = store.levels["fpn_72.int8"]
    assert packed.dtype == packed[0].dtype == np.float16
    assert np.array_equal(packed[0], features.read("fpn_72.int8", 0))
    assert store.levels["image_1008"][:2].dtype == np.uint8


@pytest.mark.parametrize("rows", [19, -1, [0, 19], [0.5], [[0, 1]], ["s0"]])
def test_rows_that_hold_no_sample_raise(store: OpenedStore, rows: object) -> None:
    with pytest.raises(MissingSampleError):
        store.levels["fpn_72"][rows]


def test_a_level_cannot_be_iterated_into_its_vacant_rows(store: OpenedStore) -> None:
    with pytest.raises(TypeError, match="not iterable"):
        iter(store.levels["fpn_72"])


def test_a_label_set_gives_masks_on_their_own_grid(store: OpenedStore) -> None:
    labels = store.labels["mask"]
    mask_KHW = labels[0]
    assert mask_KHW is not None
    assert (mask_KHW.shape, mask_KHW.dtype, labels.classes) == ((1, 48, 48), np.uint8, ("vessel",))
    assert labels[18] is None
    assert (0 in labels, 18 in labels) == (True, False)
    with pytest.raises(MissingSampleError):
        labels[19]


def test_damage_is_not_read(root: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(root, tmp_path / "x.zarr"))
    shard = damaged / "levels/fpn_72/c/0/0/0/0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptStoreError):
        sam3cache.open(damaged).levels["fpn_72"][0]


def test_what_is_no_store_or_not_sealed_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError):
        sam3cache.open(tmp_path)
    root = build_store(tmp_path / "x.zarr", num_samples=4, level_shapes=SHAPES, seal=False)
    with pytest.raises(UnsealedStoreError):
        sam3cache.open(root)
    assert len(sam3cache.open(root, allow_unsealed=True)) == 4


def test_an_item_of_a_dataset_is_what_a_batch_has_of_it(store: OpenedStore, root: Path) -> None:
    dataset = store.dataset(["fpn_72", "image_1008"], "val", target_size_px=20)
    cached = CachedSamples(
        open_store(root), store.rows("val"), ["fpn_72", "image_1008"], target_size_px=20
    )
    assert len(dataset) == len(cached) == 6
    for i, item in enumerate(dataset[i] for i in range(len(dataset))):
        batch = cached.batch([i])
        assert (item["row"], item["id"]) == (batch.rows[0], cached.samples[i].id)
        for level, feature_CHW in item["levels"].items():
            assert torch.equal(feature_CHW, batch.levels[level][0])
        assert torch.equal(item["angles_deg"], batch.angles_B2[0])
        assert torch.equal(item["content_px"], batch.content_B2[0])
        assert torch.equal(item["target"], batch.target_BKTT[0])
    with pytest.raises(IndexError):
        dataset[6]
    # Not of levels twice: by their plain names, in the most exact precision.
    assert list(store.dataset()[0]["levels"]) == ["fpn_72", "image_1008"]
    assert "target" not in store.dataset()[0]
    assert len(store.dataset(target_size_px=20)) == NUM_SAMPLES - 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "start", ["spawn", pytest.param("fork", marks=pytest.mark.skipif(os.name == "nt", reason="no"))]
)
def test_worker_processes_read_what_this_one_reads(store: OpenedStore, start: str) -> None:
    dataset = store.dataset(["fpn_72"], "train", target_size_px=20)
    dataset[0]  # Opens files here, which a forked worker must not share.
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=3, num_workers=2, multiprocessing_context=start
    )
    batches = list(loader)
    rows = [int(row) for batch in batches for row in batch["row"]]
    assert rows == [sample.row for sample in dataset.samples]
    together = torch.cat([batch["levels"]["fpn_72"] for batch in batches])
    assert torch.equal(together, torch.from_numpy(store.levels["fpn_72"][rows]))
    assert batches[0]["target"].shape == (3, 1, 20, 20)


def test_a_dataset_is_not_read_on_from_a_store_that_has_changed(root: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(root, tmp_path / "x.zarr"))
    pickled = pickle.dumps(sam3cache.open(copied).dataset())
    assert pickle.loads(pickled)[0]["id"] == "s0"
    shutil.rmtree(copied)
    build_store(copied, num_samples=NUM_SAMPLES, level_shapes=SHAPES, seed=1)
    with pytest.raises(MissingSampleError, match="has changed since this dataset was made"):
        pickle.loads(pickled)[0]


def test_every_iteration_of_batches_is_another_epoch(store: OpenedStore) -> None:
    batches = store.batches("train", batch_size=3, levels=["fpn_72"], target_size_px=20, seed=5)
    first, second = ([row for batch in batches for row in batch.rows] for _ in range(2))
    assert sorted(first) == sorted(second) == store.rows("train")[: len(first)]
    assert first != second
    assert [row for batch in batches.epoch(0) for row in batch.rows] == first
    same = store.batches("train", batch_size=3, levels=["fpn_72"], target_size_px=20, seed=5)
    assert [row for batch in same for row in batch.rows] == first
    assert len(batches) == len(list(batches.epoch(0))) == 2
    plain = store.batches("train", batch_size=3, levels=["fpn_72"], shuffle=False)
    assert [row for batch in plain for row in batch.rows] == store.rows("train")


def test_what_cannot_be_had_is_refused(store: OpenedStore) -> None:
    with pytest.raises(ConfigError, match="split 'trian': expected one of train, val, test"):
        store.batches("trian")
    with pytest.raises(ConfigError, match="batch size 0"):
        store.batches(batch_size=0)
    with pytest.raises(MissingSampleError, match="no level fpn_144"):
        store.dataset(["fpn_144"])
    with pytest.raises(MissingSampleError, match="no label set other"):
        store.dataset(target_size_px=20, label_set="other")
    for made in (store.dataset, store.batches):
        with pytest.raises(ConfigError, match="label set 'mask' without targets: give their side"):
            made(label_set="mask")


def test_the_loop_in_the_documentation_runs_and_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_store(
        tmp_path / "features/angio.zarr", num_samples=18, level_shapes={"fpn_72": (8, 18, 18)}
    )
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(example, str(DOCUMENT), "exec"), {})
    losses = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
