import numpy as np
import pytest
import zarr

from sam3cache.errors import CorruptStoreError, MissingSampleError
from sam3cache.features import LabelSetSpec, LevelSpec
from sam3cache.features.shards import ShardReader, encode_shard

SPECS = [
    LevelSpec("fpn_72", (8, 72, 72)),
    LevelSpec("fpn_72.int8", (8, 72, 72)),
    LevelSpec("fpn_72.bf16", (8, 72, 72)),
    LevelSpec("fpn_72.r7", (8, 72, 72)),
    LevelSpec("image_1008", (1, 96, 96), "uint8"),
    LevelSpec("image_1008", (3, 96, 96), "uint8"),
    LabelSetSpec("mask", ("a", "b"), 1024, 1024),
]


def chunks_of(spec, positions):
    rng = np.random.default_rng(0)
    shape, dtype = spec.grid.inner[1:], spec.grid.dtype
    if dtype == "float16":
        return {i: rng.standard_normal(shape).astype(dtype) for i in positions}
    return {i: rng.integers(0, 120, shape).astype(dtype) for i in positions}


def describe(root, spec):
    (root / spec.grid.folder).mkdir(parents=True)
    (root / spec.grid.folder / "zarr.json").write_bytes(spec.grid.metadata(32, spec.shape))


def write(root, spec, chunks):
    describe(root, spec)
    data = encode_shard(spec.grid, chunks).data
    path = root / spec.grid.key((0, 0, 0, 0))
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path, data


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.name}{s.shape}")
def test_zarr_reads_what_we_write_and_absent_rows_as_the_fill_value(tmp_path, spec):
    chunks = chunks_of(spec, (0, 3, 15))
    write(tmp_path, spec, chunks)
    array = zarr.open_array(tmp_path / spec.grid.folder, mode="r")
    for position, values in chunks.items():
        assert np.array_equal(array[position, : values.shape[0]], values)
    absent = array[1]
    assert np.isnan(absent).all() if spec.grid.dtype == "float16" else not absent.any()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.name}{s.shape}")
def test_we_read_what_zarr_writes(tmp_path, spec):
    chunks = chunks_of(spec, range(spec.grid.num_inner))
    describe(tmp_path, spec)
    array = zarr.open_array(tmp_path / spec.grid.folder, mode="r+")
    array[0 : spec.grid.num_inner, : spec.grid.inner[1]] = np.stack(list(chunks.values()))
    path = tmp_path / spec.grid.key((0, 0, 0, 0))
    reader = ShardReader.open(path, spec.grid, path.stat().st_size)
    for position, values in chunks.items():
        out = np.empty_like(values)
        reader.read_into(position, out)
        assert np.array_equal(out, values)


def test_a_shard_that_took_the_place_of_another_is_noticed(tmp_path):
    spec = SPECS[0]
    path, _ = write(tmp_path, spec, chunks_of(spec, (0, 3)))
    other = encode_shard(spec.grid, {i: -v for i, v in chunks_of(spec, (0, 3)).items()})
    size_bytes, out = path.stat().st_size, np.empty(spec.shape, "float16")
    reader = ShardReader.open(path, spec.grid, size_bytes, other.chunk_crc32c)
    with pytest.raises(CorruptStoreError, match="chunk 3"):
        reader.read_into(3, out)
    path.write_bytes(other.data)
    ShardReader.open(path, spec.grid, size_bytes, other.chunk_crc32c).read_into(3, out)


def test_a_chunk_is_checked_when_it_is_first_read(tmp_path):
    spec = SPECS[0]
    path, data = write(tmp_path, spec, chunks_of(spec, (0, 3)))
    reader, out = ShardReader.open(path, spec.grid, len(data)), np.empty(spec.shape, "float16")
    assert not reader.verified.any()
    reader.read_into(0, out)
    assert np.flatnonzero(reader.verified).tolist() == [0]


def read_all(path, spec, expected_bytes, out):
    reader = ShardReader.open(path, spec.grid, expected_bytes)
    for position, values in out.items():
        reader.read_into(position, values)


def test_the_same_values_give_the_same_bytes():
    chunks = chunks_of(SPECS[0], (2, 5))
    assert encode_shard(SPECS[0].grid, chunks) == encode_shard(SPECS[0].grid, dict(chunks))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.name}{s.shape}")
def test_no_flipped_byte_goes_unnoticed(tmp_path, spec):
    chunks = chunks_of(spec, (0, 3))
    path, data = write(tmp_path, spec, chunks)
    rng = np.random.default_rng(1)
    out = {i: np.empty_like(values) for i, values in chunks.items()}
    for offset in rng.integers(0, len(data), 60):
        damaged = bytearray(data)
        damaged[offset] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(CorruptStoreError):
            read_all(path, spec, len(data), out)


def test_a_shard_that_is_missing_or_of_another_size_is_named(tmp_path):
    spec = SPECS[0]
    path, data = write(tmp_path, spec, chunks_of(spec, (0,)))
    path.write_bytes(data[:-1])
    with pytest.raises(CorruptStoreError, match=f"{len(data) - 1} bytes, expected {len(data)}"):
        ShardReader.open(path, spec.grid, len(data))
    path.unlink()
    with pytest.raises(CorruptStoreError, match="missing"):
        ShardReader.open(path, spec.grid, len(data))


def test_a_row_that_was_never_written_is_not_read_as_zeros(tmp_path):
    spec = SPECS[1]
    path, data = write(tmp_path, spec, chunks_of(spec, (0,)))
    reader = ShardReader.open(path, spec.grid, len(data))
    with pytest.raises(MissingSampleError, match="position 4"):
        reader.read_into(4, np.empty(spec.shape, np.uint8))


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "expected"),
    [
        ("fpn_72", (256, 72, 72), "float16", 16),
        ("image_1008", (1, 1008, 1008), "uint8", 16),
        ("image_1008", (3, 1008, 1008), "uint8", 16),
        ("trunk_72", (1024, 72, 72), "float16", 4),
        ("fpn_144", (256, 144, 144), "float16", 4),
        ("fpn_288", (256, 288, 288), "float16", 1),
    ],
)
def test_shards_of_sam3s_levels_stay_near_42_mb(name, shape, dtype, expected):
    assert LevelSpec(name, shape, dtype).samples_per_shard == expected
