"""Variants as the command line tells of them: planned, stored, counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from picture_folder import write_images
from worker_thread import one_process

from sam3cache.commands.extract import make_config


def test_variants_are_planned_stored_and_counted_apart(
    tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    folder, store = write_images(tmp_path / "pictures", 6), tmp_path / "x.zarr"
    where = (folder, "-o", store, "--backbone", "sam3-mini", "--levels", "image_1008")
    views = ("--variants", "hflip, rot10")
    planned = invoke("plan", *where, *views, "--no-time")
    assert planned.exit_code == 0, planned.output
    assert f"{store}: 6 samples and 8 variants; 6 new." in planned.stdout
    assert "Of this for variants (hflip, rot10): 8 rows, about " in planned.stdout
    with one_process():
        done = invoke("extract", *where, *views)
    assert done.exit_code == 0, done.output
    assert "14 images to compute (8 of them variants)" in done.stderr
    assert f"{store}: 6 samples and 8 variants, sealed; 14 computed" in done.stdout
    assert "6 have a mask, 6 both view angles." in done.stdout
    told = invoke("store", "info", store)
    assert "Variants of training samples: hflip 4, rot10 4" in told.stdout
    part = ("store", "subset", store, "-o", tmp_path / "part.zarr", "--split", "train")
    assert "part.zarr: 4 samples and 8 variants, sealed; copied in" in invoke(*part).stdout
    assert "4 samples and 8 variants, sealed; all of them there already" in invoke(*part).stdout
    again = invoke("extract", *where, "--variants", "none", "--json")
    result = json.loads(again.stdout)
    assert (result["num_samples"], result["num_variants"], result["num_removed"]) == (6, 0, 8)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, None),
        ("none", ()),
        ("", ()),
        ("hflip,rot-10.0,gamma", ("hflip", "rot-10", "gamma1.5")),
    ],
)
def test_names_are_read_from_the_option(text: str | None, names: tuple[str, ...] | None) -> None:
    config = make_config(
        Path("a.csv"),
        output=None,
        columns=None,
        levels="fpn_72",
        backbone="sam3-mini",
        weights=None,
        devices="cpu",
        batch_size=None,
        numeric_path="auto",
        resize="letterbox",
        variants=text,
    )
    assert config.variants == names


@pytest.mark.parametrize(
    ("command", "names", "expected"),
    [
        ("extract", "hflip,spin", "variant 'spin' is unknown; expected some of hflip, vflip"),
        ("plan", "rot0", "and not 0, which changes nothing"),
        ("extract", "hflip,hflip", "hflip is named twice"),
        ("extract", "none,hflip", "variant 'none' is unknown"),
    ],
)
def test_a_name_that_is_none_is_one_clear_line(
    tmp_path: Path, invoke: Callable[..., Any], command: str, names: str, expected: str
) -> None:
    folder = write_images(tmp_path / "pictures", 1)
    done = invoke(command, folder, "-o", tmp_path / "x.zarr", "--variants", names)
    assert done.exit_code == 2
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "x.zarr").exists()
