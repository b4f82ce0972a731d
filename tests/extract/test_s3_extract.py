"""Extraction onto an object store whose server is killed, and training from it."""

import threading
import time

import boto3
import pytest
from picture_folder import write_images
from s3_server import running_server
from worker_thread import one_process

from sam3cache.extract import ExtractConfig, extract
from sam3cache.features import BlockClaims, ObjectPath, open_store, verify_store
from sam3cache.features import locks as locks_module
from sam3cache.features.places import files_below

PATIENCE_S = 120


@pytest.fixture(scope="module", autouse=True)
def workers_are_threads():
    with one_process():
        yield


@pytest.fixture
def server(tmp_path, monkeypatch):
    with running_server(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SAM3CACHE_CACHE", str(tmp_path / "cache"))
        boto3.client("s3").create_bucket(Bucket="features")
        yield server


def run(pictures, output):
    levels = ("image_1008",)
    return extract(ExtractConfig(pictures, output, levels=levels, backbone="sam3-mini"))


def contents(root):
    """What has to be the same, byte for byte."""
    names = files_below(root, leave_out="claims")
    return {n: (root / n).read_bytes() for n in names if n.startswith(("levels/", "labels/"))}


@pytest.mark.timeout(2 * PATIENCE_S)
def test_a_server_that_is_killed_twice_leaves_the_store_that_a_folder_has(server, tmp_path):
    pictures = write_images(tmp_path / "pictures", num_images=40)
    store = ObjectPath("s3://features/x.zarr")
    num_kills = 0

    def kill_and_restart():
        nonlocal num_kills
        for num_receipts in (1, 4):
            deadline_s = time.monotonic() + PATIENCE_S
            while sum("PUT /features/x.zarr/receipts/" in r for r in server.requests()) < (
                num_receipts
            ):
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
            server.kill()
            num_kills += 1
            time.sleep(0.2)
            server.start()

    killer = threading.Thread(target=kill_and_restart)
    killer.start()
    result = run(pictures, store)
    killer.join()
    assert num_kills == 2
    assert (result.sealed, result.num_computed) == (True, 40)
    assert run(pictures, tmp_path / "x.zarr").sealed
    assert contents(store) == contents(tmp_path / "x.zarr")
    assert verify_store(store).findings == ()
    # Nothing is held any more, and the same again finds nothing to do.
    assert list((store / "claims").glob("*")) == []
    again = run(pictures, store)
    assert (again.sealed, again.num_computed, again.num_kept) == (True, 0, 40)


def test_the_road_goes_by_way_of_a_bucket(server, tmp_path, monkeypatch, invoke):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "pictures", num_images=8)
    url = "s3://features/y.zarr"
    mini = ("--backbone", "sam3-mini", "--levels", "image_1008")
    planned = invoke("plan", "pictures", "-o", url, "--no-time", *mini)
    assert planned.exit_code == 0, planned.output
    assert "free" not in planned.output
    done = invoke("extract", "pictures", "-o", url, *mini)
    assert done.exit_code == 0, done.output
    assert f"{url}: 8 samples, sealed" in done.output
    info = invoke("store", "info", url)
    assert f"{url}: format version" in info.output
    assert "8 samples" in info.output
    verified = invoke("store", "verify", url)
    assert verified.exit_code == 0, verified.output
    (tmp_path / "own.py").write_text(HEAD, encoding="utf-8")
    options = ("--head", "own:Stem", "--epochs", "1", "--loss-size", "64", "--name", "first")
    trained = invoke("train", url, *options, "--device", "cpu")
    assert trained.exit_code == 0, trained.output
    assert f"of {url} into {tmp_path / 'cache'}" in trained.output
    assert f"Next: sam3cache eval {url} checkpoints/first" in trained.output
    measured = invoke(
        *("eval", url, "checkpoints/first", "--head", "own:Stem", "--device", "cpu"),
        *("--no-page", "--no-angles-check", "--no-features-check"),
    )
    assert measured.exit_code == 0, measured.output
    assert not (tmp_path / "s3:").exists()


HEAD = """
import torch
from sam3cache import Head


class Stem(Head):
    needs = ("image_1008",)

    def __init__(self, level_shapes, *, num_classes=1):
        super().__init__()
        self.layer = torch.nn.Conv2d(level_shapes["image_1008"][0], num_classes, 1)

    def forward(self, batch):
        picture_BCHW = batch.levels["image_1008"].float() / 255
        return self.layer(torch.nn.functional.avg_pool2d(picture_BCHW, 16))
"""


def test_a_block_that_another_machine_holds_is_left_to_it(server, tmp_path, monkeypatch):
    monkeypatch.setattr(locks_module, "LEASE_S", 4.0)  # an extraction looks again after a second
    pictures = write_images(tmp_path / "pictures", num_images=20)
    store = ObjectPath("s3://features/z.zarr")
    begun, finish = threading.Event(), threading.Event()

    def hold():
        with BlockClaims(store).claim(1) as has_it:
            assert has_it
            begun.set()
            finish.wait(PATIENCE_S)

    holder = threading.Thread(target=hold)
    holder.start()
    begun.wait(PATIENCE_S)
    threading.Timer(3.0, finish.set).start()
    result = run(pictures, store)
    holder.join()
    assert (result.sealed, result.num_computed) == (True, 20)
    assert len(open_store(store).samples) == 20
