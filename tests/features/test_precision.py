"""Levels of every precision: what they keep, and that every Zarr library reads them equal."""

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from store_builder import build_store

from sam3cache.errors import ConfigError, MissingSampleError, NumericError
from sam3cache.features import Encoded, LevelSpec, open_store, write_level_block
from sam3cache.features.precision import decode, encode, split_name, value_dtype

SHAPE = (8, 12, 12)
LEVELS = ("fpn_72", "fpn_72.bf16", "fpn_72.r7", "fpn_72.r5", "fpn_72.int8", "image_1008")


def values(scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(0).standard_normal(SHAPE)).astype(np.float32)


@pytest.mark.parametrize(
    ("precision", "largest_relative_error"),
    [("float16", 2**-11), ("bf16", 2**-8), ("r7", 2**-8 + 2**-11), ("r5", 2**-6 + 2**-11)],
)
def test_a_float_keeps_the_bits_that_its_precision_has(
    precision: str, largest_relative_error: float
) -> None:
    exact = values()
    exact = exact[np.abs(exact) > 1e-3].reshape(-1, 1, 1)  # none of them subnormal
    kept = decode(precision, encode(precision, exact)).astype(np.float32)
    error = np.abs(kept - exact) / np.abs(exact)
    assert error.max() <= largest_relative_error
    assert error.max() > largest_relative_error / 4


def test_int8_errs_by_half_a_step_of_its_channel() -> None:
    exact = values() * np.logspace(-3, 3, SHAPE[0], dtype=np.float32)[:, None, None]
    exact[2] = 0
    encoded = encode("int8", exact)
    step = np.abs(exact).max(axis=(1, 2), keepdims=True) / 127
    half_of_float16 = np.abs(exact) * 2**-10
    difference = np.abs(decode("int8", encoded).astype(np.float32) - exact)
    assert (difference <= step / 2 + half_of_float16 + 2**-24).all()
    assert encoded.data_CHW.dtype == np.int8
    assert np.abs(encoded.data_CHW).max(axis=(1, 2)).tolist() == [127, 127, 0, *[127] * 5]


def test_bf16_rounds_as_torch_does() -> None:
    exact = np.concatenate([values(1e30), values(1e-30), values(1), np.zeros(SHAPE, np.float32)])
    ours = encode("bf16", exact).data_CHW
    theirs = torch.from_numpy(exact).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(ours, theirs)
    assert np.array_equal(
        decode("bf16", Encoded(ours)),
        torch.from_numpy(theirs.copy()).view(torch.bfloat16).float().numpy(),
    )


@pytest.mark.parametrize("precision", ["r7", "r5"])
def test_rounding_is_to_even_and_never_to_infinity(precision: str) -> None:
    bits = 7 if precision == "r7" else 5
    one_and_a_half_steps = np.array([1 + 2.0 ** -(bits + 1), 1 + 3 * 2.0 ** -(bits + 1)])
    largest = np.array([65504.0, -65504.0])
    kept = encode(precision, np.concatenate([one_and_a_half_steps, largest])[:, None, None])
    assert kept.data_CHW.ravel()[:2].tolist() == [1.0, 1 + 2 * 2.0**-bits]
    assert np.isfinite(kept.data_CHW).all()


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("fpn_72", ("fpn_72", "float16")),
        ("fpn_72.int8", ("fpn_72", "int8")),
        ("trunk_72.bf16", ("trunk_72", "bf16")),
        ("image_1008", ("image_1008", "uint8")),
    ],
)
def test_a_name_tells_the_precision(level: str, expected: tuple[str, str]) -> None:
    assert split_name(level) == expected


@pytest.mark.parametrize("level", ["fpn_72.int4", "fpn_72.", "image_1008.int8", "fpn_72.int8.r7"])
def test_a_precision_that_is_none_is_refused_with_those_there_are(level: str) -> None:
    with pytest.raises(ConfigError, match="is no precision that it can have; expected"):
        LevelSpec(level, SHAPE)


def test_a_dtype_that_is_not_the_names_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected int8"):
        LevelSpec("fpn_72.int8", SHAPE, "float16")


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, of which the second holds two samples."""
    shapes = dict.fromkeys(LEVELS, SHAPE) | {"image_1008": (1, 40, 40)}
    return build_store(
        tmp_path_factory.mktemp("precisions") / "x.zarr", num_samples=18, level_shapes=shapes
    )


def arrays_on_disk(path: Path) -> list[str]:
    return sorted(p.parent.name for p in (path / "levels").glob("*/zarr.json"))


def through_zarrs(path: Path) -> np.ndarray:
    import zarrs  # noqa: F401 - registers its pipeline

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return np.asarray(zarr.open_array(path, mode="r")[:])


def through_zarr_python(path: Path) -> np.ndarray:
    return np.asarray(zarr.open_array(path, mode="r")[:])


def through_tensorstore(path: Path) -> np.ndarray:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return np.asarray(tensorstore.open(spec, read=True, open=True).result().read().result())


@pytest.mark.parametrize("read", [through_zarr_python, through_zarrs, through_tensorstore])
def test_other_libraries_read_every_array_as_we_do(store_path: Path, read: object) -> None:
    store = open_store(store_path)
    assert arrays_on_disk(store_path) == sorted([*LEVELS, "fpn_72.int8.scale"])
    for name in LEVELS:
        theirs = read(store_path / "levels" / name)
        ours = [store.read_stored(name, row) for row in range(18)]
        assert theirs.dtype == ours[0].data_CHW.dtype
        assert np.array_equal(theirs[:18], np.stack([e.data_CHW for e in ours]))
        if name == "fpn_72.int8":
            scales = read(store_path / "levels" / "fpn_72.int8.scale")
            assert np.array_equal(scales[:18], np.stack([e.scale_C for e in ours]))
    masks = read(store_path / "labels" / "mask" / "masks")
    assert np.array_equal(masks[3][:, :48, :48], store.read_mask(3))


def test_a_level_says_in_its_own_metadata_what_its_numbers_are(store_path: Path) -> None:
    array = zarr.open_array(store_path / "levels" / "fpn_72.int8", mode="r")
    scale = zarr.open_array(store_path / array.attrs["sam3cache"]["scale"], mode="r")
    ours = open_store(store_path).read("fpn_72.int8", 5)
    assert np.array_equal((array[5] * scale[5][:, None, None]).astype(np.float16), ours)
    bits = zarr.open_array(store_path / "levels" / "fpn_72.bf16", mode="r")
    assert "float32" in bits.attrs["sam3cache"]["value"]


def test_what_is_read_is_what_the_precision_keeps(store_path: Path) -> None:
    store = open_store(store_path)
    for name in LEVELS[1:5]:
        spec = store.levels[name]
        read = store.read(name, 17)
        assert read.dtype == value_dtype(spec.precision)
        assert np.array_equal(read, decode(spec.precision, store.read_stored(name, 17)))
        into = np.empty_like(read)
        store.read_into(name, 17, into)
        assert np.array_equal(into, read)
        assert np.abs(read.astype(np.float32)).mean() > 0.1


def test_the_most_exact_precision_serves_the_levels_name_unless_told(tmp_path: Path) -> None:
    shapes = {"fpn_72.int8": SHAPE, "fpn_72.r7": SHAPE, "trunk_72.bf16": SHAPE}
    store = open_store(build_store(tmp_path / "x.zarr", level_shapes=shapes))
    assert store.served_levels["fpn_72"].name == "fpn_72.r7"
    assert store.served_levels["trunk_72"].name == "trunk_72.bf16"
    store.serve("int8")
    assert store.served_levels["fpn_72"].name == "fpn_72.int8"
    assert np.array_equal(store.read("fpn_72", 0), store.read("fpn_72.int8", 0))
    store.serve_digests({"fpn_72": store.fingerprint("fpn_72.r7").digest})
    assert store.served_levels["fpn_72"].name == "fpn_72.r7"
    with pytest.raises(MissingSampleError, match="no level in precision r5"):
        store.serve("r5")


@pytest.mark.parametrize(
    ("level", "value", "advice"),
    [
        ("fpn_72", 7e4, "fpn_72.bf16"),
        ("fpn_72.int8", 7e4, "fpn_72.bf16"),
        ("fpn_72", np.nan, "--numeric-path fp32"),
        ("fpn_72.bf16", np.inf, "--numeric-path fp32"),
    ],
)
def test_values_that_a_precision_cannot_hold_are_refused_with_what_to_do(
    tmp_path: Path, level: str, value: float, advice: str
) -> None:
    feature = values()
    feature[1, 2, 3] = value
    with pytest.raises(NumericError, match=advice):
        write_level_block(tmp_path, LevelSpec(level, SHAPE), "digest", 0, {0: feature})
    assert list(tmp_path.iterdir()) == []


def test_bf16_holds_what_overflows_float16(tmp_path: Path) -> None:
    receipt = write_level_block(
        tmp_path, LevelSpec("trunk_72.bf16", SHAPE), "digest", 0, {0: values(1e5)}
    )
    assert receipt.rows == (0,)
