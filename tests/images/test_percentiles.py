"""Percentiles of cines: exact in every type, without holding the cine, and found once."""

import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sam3cache.errors import ImageError
from sam3cache.images.percentiles import exact_percentiles
from sam3cache.images.picture import find_once

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "dtype",
    ["u1", "i1", "u2", ">u2", "i2", "u4", "i4", ">i4", "u8", "i8", "f2", "f4", ">f4", "f8", ">f8"],
)
@pytest.mark.parametrize("permille", [(0, 1000), (5, 995), (500, 501)])
def test_percentiles_are_those_of_the_sorted_values(dtype, permille):
    kind = np.dtype(dtype)
    if kind.kind == "f":
        values = RNG.normal(scale=np.float64(10.0) ** RNG.integers(-4, 4, (5, 30, 41)))
    else:
        info = np.iinfo(kind)
        values = RNG.integers(info.min, info.max, (5, 30, 41), kind.newbyteorder("="), True)
    cine = values.astype(dtype)
    ordered = np.sort(cine.ravel())
    expected = [float(ordered[max(0, -(-cine.size * p // 1000) - 1)]) for p in permille]
    assert list(exact_percentiles(lambda: cine, kind, permille, "a")) == expected


@pytest.mark.parametrize("values", [[0.0, -0.0], [5e-324, -5e-324], [np.finfo(float).max] * 3])
def test_zeros_and_extremes_are_values_as_others(values):
    found = exact_percentiles(lambda: [np.array(values)], np.dtype(float), (0, 1000), "a")
    assert found == (min(values), max(values))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_told_with_the_files_name(bad):
    frames = [np.zeros(4), np.array([0, bad])]
    with pytest.raises(ImageError, match=r"a\.npy: holds values that are not finite"):
        exact_percentiles(lambda: frames, np.dtype(float), (5, 995), "a.npy")


def test_a_cine_is_never_held_as_a_whole():
    frame = RNG.normal(size=(256, 256)).astype(np.float32)
    num_frames = 160

    def frames():
        return (frame * (t + 1) for t in range(num_frames))

    tracemalloc.start()
    exact_percentiles(frames, frame.dtype, (5, 995), "a")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < num_frames * frame.nbytes / 4


def test_threads_that_ask_for_the_same_wait_for_the_first():
    num_started = []
    both = threading.Barrier(2)

    @find_once
    def find(key):
        num_started.append(key)
        time.sleep(0.05)
        return key

    def ask(key):
        both.wait(timeout=60)
        return find(key)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, ["a", "a"])) == ["a", "a"]
    assert num_started == ["a"]


def test_threads_that_ask_for_different_things_do_not_wait():
    both = threading.Barrier(2)

    @find_once
    def find(key):
        both.wait(timeout=60)
        return key

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(find, ["a", "b"])) == ["a", "b"]


def test_what_failed_is_tried_again():
    answers = iter([ValueError("damaged"), 7])

    @find_once
    def find():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(ValueError, match="damaged"):
        find()
    assert find() == 7
