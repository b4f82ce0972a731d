"""A small store made through the public writing functions, for tests that need one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from sam3cache.features import (
    AnnotationRow,
    Fingerprint,
    LabelRow,
    LabelSetSpec,
    LevelSpec,
    SampleRow,
    describe_store,
    seal_store,
    store_lock,
    write_label_block,
    write_level_block,
    write_sample_facts,
)
from sam3cache.tasks import Task


def build_store(
    root: Path,
    *,
    num_samples: int = 6,
    level_shapes: dict[str, tuple[int, int, int]] | None = None,
    height_px: int = 96,
    width_px: int = 96,
    mask_height_px: int = 48,
    mask_width_px: int = 48,
    empty_mask_rows: tuple[int, ...] = (),
    splits: tuple[str, ...] = ("train", "val", "test"),
    seed: int = 0,
    seal: bool = True,
    weights: str = "test",
    first_angle_deg: int = -60,
    mask_mtime_ns: int = 0,
    classes: tuple[str, ...] = ("vessel",),
    task: Task = "multilabel",
    wide_rows: tuple[int, ...] = (),
) -> Path:
    """Write a store whose features hint at its masks, so that heads can learn something.

    Each mask is a rectangle that depends on the sample; channel 0 of every feature level is that
    rectangle, the others are noise. Sample i is in split ``splits[i % len(splits)]``, group
    ``g{i//2}``; the last sample has no angles and no mask when ``num_samples > 4``. Of the task
    "multiclass" a rectangle is of class ``1 + i % len(classes)``, which channel 0 tells as well,
    and the lower, the higher its number. Images in ``wide_rows`` are twice as wide.
    """
    rng = np.random.default_rng(seed)
    shapes = level_shapes or {"fpn_72": (256, 72, 72)}
    levels = {
        name: (
            LevelSpec(name, shape),
            Fingerprint(
                {"level": name, "weights_sha256": weights, "preprocessing.resize_mode": "letterbox"}
            ),
        )
        for name, shape in shapes.items()
    }
    label_set = LabelSetSpec("mask", classes, mask_height_px, mask_width_px, task)
    samples, notes = [], []
    for i in range(num_samples):
        bare = num_samples > 4 and i == num_samples - 1
        samples.append(
            SampleRow(
                i,
                f"s{i}",
                f"images/{i}.png",
                None,
                height_px,
                width_px * (1 + (i in wide_rows)),
                1,
                10,
                20,
                hashlib.sha256(f"{seed} {i}".encode()).hexdigest(),
                status="pending",
            )
        )
        notes.append(
            AnnotationRow(
                i,
                f"s{i}",
                splits[i % len(splits)],
                f"g{i // 2}",
                None if bare else float(first_angle_deg + 17 * i % 120),
                None if bare else float(-30 + 11 * i % 60),
                {"vessel": "LAD" if i % 2 else "RCA"},
            )
        )
    with store_lock(root):
        describe_store(
            root,
            settings={"backbone": "test", "batch_size": 1},
            levels=levels,
            label_sets={"mask": label_set},
            samples=samples,
            annotations=notes,
        )
    for block in range((num_samples + 15) // 16):
        rows = samples[block * 16 : block * 16 + 16]
        masks: dict[int, np.ndarray | None] = {}
        for row in rows:
            mask = np.zeros(label_set.shape, dtype=np.uint8)
            top, left = rng.integers(0, mask_height_px // 2), rng.integers(0, mask_width_px // 2)
            if row.row not in empty_mask_rows:
                number = 1 + row.row % len(classes) if task == "multiclass" else 1
                height = mask_height_px // (2 + number)
                mask[0, top : top + height, left : left + mask_width_px // 3] = number
            masks[row.row] = mask
        for spec, fingerprint in levels.values():
            values = {}
            for row in rows:
                _, h, w = spec.shape
                noise = rng.standard_normal(spec.shape)
                mask = masks[row.row]
                assert mask is not None
                scale = max(height_px, width_px)
                ys = (np.arange(h) + 0.5) / h * scale / height_px * mask_height_px
                xs = (np.arange(w) + 0.5) / w * scale / width_px * mask_width_px
                inside = (ys < mask_height_px)[:, None] & (xs < mask_width_px)[None]
                hint = mask[0][
                    np.minimum(ys.astype(int), mask_height_px - 1)[:, None],
                    np.minimum(xs.astype(int), mask_width_px - 1)[None],
                ]
                if spec.dtype == "uint8":
                    picture = 60 + 120 * hint * inside + 10 * noise[:1]
                    values[row.row] = (
                        np.repeat(picture, spec.shape[0], 0).clip(0, 255).astype("uint8")
                    )
                else:
                    noise[0] += 4.0 * hint * inside
                    values[row.row] = noise.astype(np.float32)
            write_level_block(root, spec, fingerprint.digest, block, values)
        if num_samples > 4 and rows[-1].row == num_samples - 1:
            masks[num_samples - 1] = None
        sources = {
            row.row: LabelRow(row.row, source=f"masks/{row.row}.png", mtime_ns=mask_mtime_ns)
            for row in rows
        }
        write_label_block(root, label_set, block, masks, sources)
        facts = [
            SampleRow(**{**{n: getattr(r, n) for n in SampleRow.__slots__}, "status": "ok"})
            for r in rows
        ]
        write_sample_facts(root, block, facts)
    if seal:
        with store_lock(root):
            seal_store(root)
    return root
