"""Stores on an object store: moto's server on loopback, as a process of its own."""

import itertools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
from s3_server import running_server
from store_builder import build_store

from sam3cache.errors import (
    ConfigError,
    CorruptStoreError,
    NotAStoreError,
    StoreBusyError,
    StoreError,
)
from sam3cache.extract import ExtractConfig, extract
from sam3cache.features import (
    BlockClaims,
    ObjectPath,
    open_store,
    place_of,
    seal_store,
    store_lock,
    verify_store,
    watch_fetching,
)
from sam3cache.features import leases as leases_module
from sam3cache.features.mirror import Mirror
from sam3cache.features.places import files_below, for_places
from sam3cache.features.receipts import ShardRecord, break_seal
from sam3cache.features.summary import summarise

SHAPES = {"fpn_72": (4, 72, 72)}

_numbers = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    """The server as its own library asks it."""
    return boto3.client(
        "s3",
        endpoint_url=server.url,
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )


@pytest.fixture
def bucket(server, client, monkeypatch, tmp_path):
    """An empty bucket, and an environment in which it is found."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SAM3CACHE_CACHE", str(tmp_path / "cache"))
    name = f"features-{next(_numbers)}"
    client.create_bucket(Bucket=name)
    return name


@pytest.fixture(scope="module")
def folder_store(tmp_path_factory):
    return build_store(
        tmp_path_factory.mktemp("folder") / "x.zarr", num_samples=20, level_shapes=SHAPES
    )


@pytest.fixture
def url(bucket, client, folder_store):
    """The same store as in the folder, as `aws s3 sync` would copy it."""
    for name in files_below(folder_store, leave_out="claims"):
        if name != ".lock":
            data = (folder_store / name).read_bytes()
            client.put_object(Bucket=bucket, Key=f"a/x.zarr/{name}", Body=data)
    return f"s3://{bucket}/a/x.zarr"


def test_a_store_is_the_same_on_an_object_store_as_in_a_folder(bucket, folder_store):
    root = place_of(f"s3://{bucket}/x.zarr")
    build_store(root, num_samples=20, level_shapes=SHAPES)
    names = set(files_below(folder_store, leave_out="claims")) - {".lock"}
    assert set(root.listing()) == names
    assert all((root / name).read_bytes() == (folder_store / name).read_bytes() for name in names)
    found = verify_store(root)
    assert (found.findings, found.num_shards_read) == ((), 4)
    summary, local = summarise(root), summarise(folder_store)
    assert summary.pop("store") == str(root)
    del local["store"]
    assert summary == local


def test_what_is_read_is_what_is_in_the_folder(url, folder_store):
    near, far = open_store(folder_store), open_store(url)
    assert [sample.id for sample in far.samples] == [sample.id for sample in near.samples]
    for sample in near.samples:
        feature_CHW = near.read("fpn_72", sample.row)
        np.testing.assert_array_equal(far.read("fpn_72", sample.row), feature_CHW)
        np.testing.assert_array_equal(far.read_mask(sample.row), near.read_mask(sample.row))


def test_what_was_fetched_is_not_fetched_again(url, server):
    seen = []
    with watch_fetching(seen.append):
        open_store(url).fetch(range(20), ["fpn_72"], "mask")
    assert seen[0].num_bytes == 0
    assert seen[-1].num_bytes == seen[-1].num_bytes_total > 20 * 4 * 72 * 72 * 2
    num_before = len(server.requests())
    with watch_fetching(seen.append):
        again = open_store(url)
        again.fetch(range(20), ["fpn_72"], "mask")
        again.read("fpn_72", 19)
    since = server.requests()[num_before:]
    # Which seal the store has.
    (request,) = since
    assert request.startswith("GET ")
    assert "complete.json" in request
    assert seen[-1].num_bytes == seen[-1].num_bytes_total


def test_of_two_that_read_at_once_one_fetches(url, server):
    stores = [open_store(url) for _ in range(2)]
    num_before = len(server.requests())
    begin = threading.Barrier(2)

    def read(store):
        begin.wait()
        store.fetch(range(20), ["fpn_72"], None)

    threads = [threading.Thread(target=read, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shards = [line for line in server.requests()[num_before:] if "/levels/fpn_72/c/" in line]
    assert len(shards) == len(set(shards)) == 2


def test_a_copy_that_was_damaged_is_fetched_again(url, folder_store):
    store = open_store(url)
    store.fetch(range(20), ["fpn_72"], None)
    copy = store.folder / "levels/fpn_72/c/0/0/0/0"
    data = bytearray(copy.read_bytes())
    data[1000] ^= 1
    copy.write_bytes(data)
    expected = open_store(folder_store).read("fpn_72", 0)
    np.testing.assert_array_equal(open_store(url).read("fpn_72", 0), expected)
    (store.folder / "samples.parquet").write_bytes(b"")
    (store.folder / "complete.json").write_bytes(b"{}")
    assert len(open_store(url).samples) == 20


@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_damage_on_the_server_is_told_and_never_read(url, how):
    shard = ObjectPath(url) / "levels/fpn_72/c/1/0/0/0"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    if how == "gone":
        shard.unlink()
    else:
        shard.write_bytes(data if how == "changed" else data[:-100])
    with pytest.raises(CorruptStoreError, match="s3://"):
        open_store(url).read("fpn_72", 17)
    kinds = {"changed": "checksum", "cut": "size", "gone": "missing"}
    damage = verify_store(ObjectPath(url)).damage
    assert [(f.kind, f.path) for f in damage] == [(kinds[how], "levels/fpn_72/c/1/0/0/0")]


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "C:/x", "a\\..\\x", ""])
def test_a_store_cannot_name_files_outside_its_copy(tmp_path, name):
    mirror = Mirror(ObjectPath("s3://public/x.zarr"), tmp_path / "copy")
    with pytest.raises(CorruptStoreError, match="not one of a store; do not use it"):
        mirror.fetch(ShardRecord(name, 1, 0))
    assert list(tmp_path.iterdir()) == []


def test_an_unsealed_store_is_read_as_it_is(url, folder_store):
    root = ObjectPath(url)
    with store_lock(root):
        break_seal(root)
    store = open_store(url, allow_unsealed=True)
    expected = open_store(folder_store).read("fpn_72", 3)
    np.testing.assert_array_equal(store.read("fpn_72", 3), expected)
    with store_lock(root):
        seal_store(root)
    assert verify_store(root).findings == ()


def test_a_bucket_that_goes_away_reads_as_an_error_and_never_as_values(url, client):
    root = ObjectPath(url)
    with store_lock(root):
        break_seal(root)
    store = open_store(url, allow_unsealed=True)
    store.read("fpn_72", 0)
    for name in root.listing():
        client.delete_object(Bucket=root.bucket, Key=f"{root.key}/{name}")
    client.delete_bucket(Bucket=root.bucket)
    for row in (0, 1, 17):
        with pytest.raises(StoreError, match="there is no bucket"):
            store.read("fpn_72", row)
    with pytest.raises(StoreError, match="there is no bucket"):
        verify_store(root)


def test_a_block_is_one_processes_at_a_time(bucket):
    ours, theirs = (BlockClaims(ObjectPath(f"s3://{bucket}/x.zarr")) for _ in range(2))
    with ours.claim(3) as has_it:
        assert has_it
        assert theirs.free([2, 3]) == [2]
        with theirs.claim(3) as has_it, theirs.claim(2) as has_another:
            assert (has_it, has_another) == (False, True)
    with theirs.claim(3) as has_it:
        assert has_it


def test_a_lease_that_nobody_renews_is_taken_over(bucket, monkeypatch):
    root = ObjectPath(f"s3://{bucket}/x.zarr")
    claims = BlockClaims(root)
    (root / "claims/00000000.lock").put_if(b'{"token": "of one who was killed"}', None)
    with claims.claim(0) as has_it:
        assert not has_it
    monkeypatch.setattr(leases_module, "LEASE_S", 0.0)
    time.sleep(2.1)  # The server's clock has whole seconds.
    assert claims.free([0]) == [0]
    with claims.claim(0) as has_it:
        assert has_it


def test_whoever_has_lost_a_lease_writes_nothing_more(bucket):
    root = ObjectPath(f"s3://{bucket}/x.zarr")
    shard = root / "levels/fpn_72/c/0"
    with BlockClaims(root).claim(0) as has_it:
        assert has_it
        shard.write_bytes(b"first")
        # Another has taken over, and written the block, while this one was held up.
        lease = root / "claims/00000000.lock"
        lease.put_if(b'{"token": "of another"}', lease.stat().etag)
        shard.put_if(b"theirs", shard.stat().etag)
        with pytest.raises(StoreBusyError, match="another process's now"):
            shard.write_bytes(b"second")
    assert shard.read_bytes() == b"theirs"
    assert lease.read_bytes() == b'{"token": "of another"}'


def test_a_store_that_is_being_changed_names_who_does(bucket, monkeypatch):
    root = ObjectPath(f"s3://{bucket}/x.zarr")
    content = b'{"host": "gpu7", "pid": 41, "token": "of another"}'
    (root / ".lock").put_if(content, None)
    monkeypatch.setattr(leases_module, "_RENEW_S", -leases_module.LEASE_S)  # no time to wait
    with pytest.raises(StoreBusyError, match="process 41 on gpu7"), store_lock(root, timeout_s=0):
        pass


def test_a_bucket_that_is_not_there_is_told_before_anything_is_done(bucket, invoke):
    url = "s3://no-such-bucket/x.zarr"
    result = invoke("store", "info", url)
    assert result.exit_code == 1
    assert f"{url}: there is no bucket no-such-bucket" in result.output
    assert len(result.output.splitlines()) == 1
    with pytest.raises(StoreError, match="there is no bucket"):
        extract(ExtractConfig(Path("no-manifest.csv"), place_of(url)))
    with pytest.raises(NotAStoreError, match="does not exist"):
        open_store(f"s3://{bucket}/nothing.zarr")


def test_a_profile_says_where_and_as_whom(url, server, monkeypatch, tmp_path):
    for name in server.environment:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion = us-east-1\nendpoint_url = {server.url}\n", encoding="utf-8"
    )
    (tmp_path / "credentials").write_text(
        "[lab]\naws_access_key_id = a\naws_secret_access_key = b\n", encoding="utf-8"
    )
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert len(open_store(url).samples) == 20
    assert server.requests()[-1].endswith(" signed")
    monkeypatch.setenv("AWS_PROFILE", "no-such")
    with pytest.raises(ConfigError, match="no-such"):
        open_store(url)


def test_without_credentials_requests_are_not_signed(url, server, client, monkeypatch):
    bucket = ObjectPath(url).bucket
    everybody_reads = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": "s3:GetObject",
        "Resource": f"arn:aws:s3:::{bucket}/*",
    }
    policy = {"Version": "2012-10-17", "Statement": [everybody_reads]}
    client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert len(open_store(url).samples) == 20
    assert server.requests()[-1].endswith(" unsigned")


def test_refused_credentials_are_one_line(url, server):
    server.require_credentials(are_required=True)
    try:
        with pytest.raises(StoreError) as failure:
            open_store(url)
    finally:
        server.require_credentials(are_required=False)
    message = str(failure.value)
    assert "the server refuses (InvalidAccessKeyId" in message
    assert f"asked {server.url} with the credentials found by env" in message
    assert "\n" not in message


def test_a_server_that_does_not_answer_is_one_line_after_a_bounded_time(url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("SAM3CACHE_S3_PATIENCE_S", "0.3")
    with pytest.raises(StoreError, match=r"no answer for 0 s .*run the same command again") as told:
        open_store(url)
    assert "\n" not in str(told.value)
    monkeypatch.setenv("SAM3CACHE_S3_PATIENCE_S", "soon")
    with pytest.raises(ConfigError, match="SAM3CACHE_S3_PATIENCE_S=soon"):
        open_store(url)


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends a process there")
def test_an_interrupt_waits_for_no_server_that_is_away(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    files = [place_of("s3://away/x.zarr") / str(number) for number in range(40)]
    begun_s = time.monotonic()

    def interrupt():
        time.sleep(1.0)
        # As Ctrl-C: to the program, whose first thread it interrupts.
        os.kill(os.getpid(), signal.SIGINT)

    def ask(file):
        return file.read_bytes()

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        list(for_places(ask, files))
    # Alone it would be tried again for SAM3CACHE_S3_PATIENCE_S, minutes.
    assert time.monotonic() - begun_s < 15


@pytest.mark.parametrize("text", ["s3://", "s3://bucket", "s3://bucket/", "s3://bucket/../x"])
def test_a_url_that_names_no_store_is_refused(text):
    with pytest.raises(ConfigError, match="s3://"):
        place_of(text)


@pytest.mark.parametrize(
    "command",
    [
        ("repack", "s3://bucket/a/x.zarr"),
        ("labels", "list", "s3://bucket/a/x.zarr"),
        ("labels", "remove", "s3://bucket/a/x.zarr", "mask"),
        ("annotations", "list", "s3://bucket/a/x.zarr"),
        ("subset", "s3://bucket/a/x.zarr", "-o", "y.zarr", "--split", "train"),
        ("merge", "s3://bucket/a/x.zarr", "s3://bucket/a/z.zarr", "-o", "y.zarr"),
        ("export", "s3://bucket/a/x.zarr", "-o", "y.h5"),
        ("verify", "s3://bucket/a/x.zarr", "--repair"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_what_works_on_folders_alone_says_to_copy_the_store(invoke, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    result = invoke("store", *command)
    assert result.exit_code in (1, 2), result.output
    assert "aws s3 sync s3://bucket/a/x.zarr x.zarr" in result.output
    assert len(result.output.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_writes_a_new_store_writes_it_to_a_folder(invoke, monkeypatch, tmp_path, folder_store):
    monkeypatch.chdir(tmp_path)
    options = ("-o", "s3://bucket/y.zarr", "--split", "train")
    result = invoke("store", "subset", folder_store, *options)
    assert result.exit_code == 1
    assert "s3://bucket/y.zarr: this works on a store in a folder alone" in result.output
    assert list(tmp_path.iterdir()) == []
