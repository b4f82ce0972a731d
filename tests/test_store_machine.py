"""A store, and the pictures that it is made of, led through changes and kills in any order.

What must be in the store is kept beside it in a dict. A kill is a disk on which, from one operation
on, everything fails: what lies on it is then what a kill leaves (real processes are really killed
in tests/extract and benchmarks/crash.py).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from failing_disk import FailingDisk
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from PIL import Image
from worker_thread import one_process

from sam3cache.errors import UnsealedStoreError
from sam3cache.extract import ExtractConfig, extract
from sam3cache.extract.relabel import LabelsConfig, remove_labels, set_labels
from sam3cache.features import interrupted_change, is_sealed, open_store, verify_store
from sam3cache.features.repacking import repack

LEVEL = "image_1008"
ANCHOR = "anchor"
"""A sample that never changes: a manifest without anything that the store knows is refused."""


@dataclass(frozen=True)
class Content:
    """What a sample is: its picture's shade, and which pixel its mask marks; None without one."""

    shade: int
    mask: int | None


def picture_of(content: Content) -> np.ndarray:
    """A picture of the tower's own size, which the store holds as it is: (1008, 1008) uint8."""
    picture = np.full((1008, 1008), content.shade, np.uint8)
    picture[:10, :10] = 255 - content.shade
    return picture


def mask_of(number: int) -> np.ndarray:
    mask = np.zeros((8, 8), np.uint8)
    mask[number // 8, number % 8] = 1
    return mask


class StoreMachine(RuleBasedStateMachine):
    """Pictures in a folder, a store of them, and what must be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="sam3cache-machine-"))
        self.store = self.folder / "x.zarr"
        for name in ("images", "masks", "others"):
            (self.folder / name).mkdir()
        self.clock_ns = 10**18
        self.num_files = 0
        # What the manifest asks for, and the file of each picture.
        self.wanted: dict[str, Content] = {}
        self.files: dict[str, str] = {}
        # What the store holds when it is sealed; two candidates after a kill.
        self.stored: list[dict[str, Content]] = []
        # Masks of the second label set, of pictures that have not changed since it was set; None
        # where there is none, or a kill left that open.
        self.second: dict[str, int] | None = None

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # Pictures

    def save(self, path: Path, array: np.ndarray) -> None:
        Image.fromarray(array).save(path, compress_level=1)
        # Changes faster than the clock of the file system ticks are nobody's.
        self.clock_ns += 10**9
        os.utime(path, ns=(self.clock_ns, self.clock_ns))

    def put(self, name: str, content: Content) -> None:
        old = self.wanted.get(name)
        if name not in self.files:
            self.files[name] = f"{self.num_files}.png"
            self.num_files += 1
        if old is None or old.shade != content.shade:
            self.save(self.folder / "images" / self.files[name], picture_of(content))
        if content.mask is not None and (old is None or old.mask != content.mask):
            self.save(self.folder / "masks" / f"{name}.png", 255 * mask_of(content.mask))
        self.wanted[name] = content

    def write_manifest(self) -> Path:
        lines = ["id,image,mask,split,group"]
        for name, content in self.wanted.items():
            mask = "" if content.mask is None else f"masks/{name}.png"
            lines.append(f"{name},images/{self.files[name]},{mask},train,{name}")
        path = self.folder / "manifest.csv"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def forget_labels(self, *names: str) -> None:
        for name in names:
            if self.second is not None:
                self.second.pop(name, None)

    def others(self) -> list[str]:
        return [name for name in self.wanted if name != ANCHOR]

    @initialize()
    def begin(self) -> None:
        self.put(ANCHOR, Content(7, 0))

    @rule(shade=st.integers(0, 120), mask=st.none() | st.integers(0, 63))
    def add_a_picture(self, shade: int, mask: int | None) -> None:
        self.put(f"s{self.num_files}", Content(shade, mask))

    @precondition(lambda self: self.others())
    @rule(data=st.data(), shade=st.integers(0, 120))
    def change_a_picture(self, data: st.DataObject, shade: int) -> None:
        name = data.draw(st.sampled_from(self.others()))
        self.put(name, replace(self.wanted[name], shade=shade))
        self.forget_labels(name)

    @rule(data=st.data(), mask=st.none() | st.integers(0, 63))
    def change_a_mask(self, data: st.DataObject, mask: int | None) -> None:
        name = data.draw(st.sampled_from(sorted(self.wanted)))
        if name == ANCHOR and mask is None:
            return  # A manifest without any mask would say nothing of masks.
        self.put(name, replace(self.wanted[name], mask=mask))

    @precondition(lambda self: self.others())
    @rule(data=st.data())
    def remove_a_picture(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.others()))
        del self.wanted[name]
        self.forget_labels(name)
        (self.folder / "images" / self.files.pop(name)).unlink()

    @precondition(lambda self: self.others())
    @rule(data=st.data())
    def rename_a_picture(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.others()))
        images = self.folder / "images"
        old = images / self.files[name]
        self.files[name] = f"{self.num_files}.png"
        self.num_files += 1
        old.replace(images / self.files[name])

    @precondition(lambda self: len(self.others()) > 1)
    @rule(data=st.data())
    def swap_two_pictures(self, data: st.DataObject) -> None:
        one, two = data.draw(st.permutations(self.others()))[:2]
        paths = [self.folder / "images" / self.files[name] for name in (one, two)]
        parked = self.folder / "parked"
        paths[0].replace(parked)
        paths[1].replace(paths[0])
        parked.replace(paths[1])
        shades = self.wanted[one].shade, self.wanted[two].shade
        self.wanted[two] = replace(self.wanted[two], shade=shades[0])
        self.wanted[one] = replace(self.wanted[one], shade=shades[1])
        self.forget_labels(one, two)

    # The store

    @contextmanager
    def killed(self, fail_at: int) -> Iterator[None]:
        with FailingDisk(self.store, fail_at, lasting=fail_at > 0):
            try:
                yield
            except OSError:
                assert fail_at

    def run(self) -> None:
        config = ExtractConfig(
            self.write_manifest(), self.store, levels=(LEVEL,), backbone="sam3-mini"
        )
        try:
            assert extract(config).sealed
        except UnsealedStoreError:
            assert interrupted_change(self.store) == "`store labels set second`"
            remove_labels(self.store, "second")
            assert extract(config).sealed

    @rule()
    def extract(self) -> None:
        with self.killed(0):
            self.run()
        assert is_sealed(self.store)
        self.stored = [dict(self.wanted)]

    @rule(fail_at=st.integers(1, 120))
    def kill_an_extraction(self, fail_at: int) -> None:
        with self.killed(fail_at):
            self.run()
        self.stored = [*self.stored, dict(self.wanted)]

    def is_settled(self) -> bool:
        return len(self.stored) == 1 and is_sealed(self.store)

    @precondition(is_settled)
    @rule(fail_at=st.just(0) | st.integers(1, 80))
    def repack(self, fail_at: int) -> None:
        with self.killed(fail_at):
            repack(self.store)

    @precondition(is_settled)
    @rule(mask=st.integers(0, 63), fail_at=st.just(0) | st.integers(1, 80))
    def set_labels(self, mask: int, fail_at: int) -> None:
        marked = {name: (mask + i) % 64 for i, name in enumerate(sorted(self.stored[0]))}
        lines = ["id,mask"]
        for name, number in marked.items():
            self.save(self.folder / "others" / f"{name}.png", 255 * mask_of(number))
            lines.append(f"{name},others/{name}.png")
        manifest = self.folder / "labels.csv"
        manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.second = None
        with self.killed(fail_at):
            set_labels(LabelsConfig(self.store, "second", manifest))
            self.second = marked

    @precondition(lambda self: is_sealed(self.store))
    @rule()
    def verify(self) -> None:
        assert verify_store(self.store).damage == ()

    @invariant()
    def a_sealed_store_holds_what_it_must(self) -> None:
        if not is_sealed(self.store):
            return
        store = open_store(self.store)
        ids = {sample.id for sample in store.samples}
        fitting = [stored for stored in self.stored if self.fits(store, stored)]
        assert fitting, (ids, self.stored)
        self.stored = fitting[-1:]
        for sample in store.samples if self.second is not None else ():
            if sample.id in self.second:
                mask = store.read_mask(sample.row, "second")
                assert np.array_equal(mask, mask_of(self.second[sample.id])[None])

    def fits(self, store: Any, stored: Mapping[str, Content]) -> bool:
        """Whether a store holds these samples, with their pictures and masks."""
        if {sample.id for sample in store.samples} != stored.keys():
            return False
        for sample in store.samples:
            content = stored[sample.id]
            mask = store.read_mask(sample.row) if "mask" in store.label_sets else None
            right = None if content.mask is None else mask_of(content.mask)[None]
            if not np.array_equal(store.read(LEVEL, sample.row)[0], picture_of(content)):
                return False
            if (mask is None) != (right is None) or not np.array_equal(mask, right):
                return False
        return True


def test_whatever_happens_a_sealed_store_holds_what_it_must():
    from hypothesis.stateful import run_state_machine_as_test

    with one_process():
        run_state_machine_as_test(
            StoreMachine,
            settings=settings(
                max_examples=int(os.environ.get("MACHINE_EXAMPLES", "16")),
                stateful_step_count=14,
                deadline=None,
                derandomize="MACHINE_EXAMPLES" not in os.environ,
                suppress_health_check=list(HealthCheck),
            ),
        )
