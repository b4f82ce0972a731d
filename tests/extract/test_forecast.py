"""What an extraction would write is what it then writes."""

import csv
import io
import shutil
import time

import numpy as np
import pytest
from picture_folder import write_images
from PIL import Image
from worker_thread import one_process

from sam3cache.errors import ManifestError, NoSpaceError
from sam3cache.extract import ExtractConfig, extract
from sam3cache.extract.forecast import TABLES, forecast_level
from sam3cache.extract.plan import plan
from sam3cache.features import LevelSpec, write_level_block
from sam3cache.images import count_rows


def config_of(folder, levels="image_1008", **options):
    store = folder.parent / "x.zarr"
    return ExtractConfig(folder, store, levels=tuple(levels.split(",")), **options)


def files_below(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "rows", [range(20), range(0), [0, 5, 17, 40], [15, 16]], ids=lambda rows: f"{list(rows)[:4]}"
)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("fpn_72", (4, 8, 8)),
        ("fpn_72.bf16", (4, 8, 8)),
        ("fpn_72.int8", (4, 8, 8)),
        # Four samples a shard.
        ("fpn_144", (16, 288, 288)),
    ],
)
def test_a_raw_level_takes_exactly_what_is_foretold(tmp_path, name, shape, rows):
    spec = LevelSpec(name, shape)
    feature_CHW = np.ones(shape, np.float16)
    for block in {row // 16 for row in rows}:
        values = {row: feature_CHW for row in rows if row // 16 == block}
        write_level_block(tmp_path, spec, "", block, values)
    foretold = forecast_level(spec, rows)
    written = files_below(tmp_path / "levels") if len(rows) else []
    assert foretold.is_exact
    assert foretold.num_files == len(written)
    assert foretold.size_bytes == sum(path.stat().st_size for path in written)


def test_what_is_planned_is_what_is_written_and_planning_leaves_nothing(tmp_path):
    folder = write_images(tmp_path / "pictures", num_images=37)
    config = config_of(folder)
    before = sorted(tmp_path.rglob("*"))
    planned = plan(config)
    assert sorted(tmp_path.rglob("*")) == before
    assert (planned.num_new, planned.num_to_compute, planned.num_looked_at) == (37, 37, None)
    assert planned.time is not None
    assert 0 < planned.time.num_measured <= 37
    assert planned.time.batch_size == 1
    assert planned.time.images_per_s > 0

    announced = []
    with one_process():
        extract(config, announce=announced.append)
    store = config.output
    written = {
        "image_1008": files_below(store / "levels/image_1008/c"),
        "masks": files_below(store / "labels/mask/masks/c"),
    }
    for item in planned.items:
        if item.name != TABLES:
            sizes = [path.stat().st_size for path in written[item.name]]
            assert item.num_files == len(sizes)
            assert abs(item.size_bytes / sum(sizes) - 1) < 0.25, item
    total_bytes = sum(path.stat().st_size for path in files_below(store))
    assert abs(planned.size_bytes / total_bytes - 1) < 0.25
    assert [forecast.items for forecast in announced] == [planned.items]

    again = plan(config)
    assert (again.num_kept, again.num_to_compute, again.items) == (37, 0, ())
    assert again.time is None


def test_no_more_is_measured_than_there_is_and_the_whole_is_no_faster_than_its_tower(tmp_path):
    folder = write_images(tmp_path / "pictures", num_images=5)
    time_s = plan(config_of(folder, "fpn_72", backbone="sam3-mini")).time
    assert time_s is not None
    assert 0 < time_s.num_measured <= 5
    assert 0 < time_s.images_per_s <= time_s.tower_images_per_s


def test_only_what_is_missing_is_planned(tmp_path):
    folder = write_images(tmp_path / "pictures", num_images=20)
    with one_process():
        extract(config_of(folder))
    np.save(folder / "images/new.npy", np.zeros((40, 50), np.uint8))
    with (folder / "manifest.csv").open("a", encoding="utf-8") as file:
        file.write("new,images/new.npy,,0,0,train,p9\n")
    (folder / "images/03.png").rename(folder / "images/other.png")
    (folder / "images/04.png").write_bytes((folder / "images/07.png").read_bytes())
    path = folder / "manifest.csv"
    text = path.read_text(encoding="utf-8").replace("images/03.png", "images/other.png")
    path.write_text(text, encoding="utf-8")
    planned = plan(config_of(folder, "image_1008,fpn_72", backbone="sam3-mini"), measure=False)
    counts = (planned.num_new, planned.num_changed, planned.num_kept, planned.num_renamed)
    assert counts == (1, 1, 19, 1)
    assert planned.num_removed == 1
    # A new block takes the two; the new level takes all.
    assert {item.name: (item.num_samples, item.num_files) for item in planned.items[:2]} == {
        "image_1008": (2, 1),
        "fpn_72": (21, 3),
    }


def test_an_extraction_that_cannot_fit_is_refused_before_it_begins(tmp_path):
    folder = write_images(tmp_path / "pictures", num_images=4)
    free_bytes = shutil.disk_usage(tmp_path).free
    num_images = round(1.5 * free_bytes / LevelSpec("fpn_72", (256, 72, 72)).sample_bytes)
    config = config_of(folder, "fpn_72", backbone="sam3-mini")
    planned = plan(config, num_images=num_images)
    assert not planned.fits
    assert planned.items[0].num_samples == num_images
    assert planned.time is None
    with pytest.raises(NoSpaceError) as failure:
        planned.require_space()
    message = str(failure.value)
    assert "\n" not in message
    assert f"{config.output} would take " in message
    assert "--levels fpn_72.int8 takes " in message
    assert "--levels fpn_72 takes" not in message
    assert not config.output.exists()
    # Neither does what an extraction itself is going to write.
    forecast = plan(config, num_images=10, measure=False)
    assert forecast.num_samples == 10
    assert forecast.fits
    forecast.require_space()


def write_rows(path, num_rows, extra=""):
    header = "id,image,mask,primary_angle,split,note\n"
    lines = [f"s{i},images/{i % 4:02}.png,,{i % 90},train,\n" for i in range(1000)]
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(header)
        for start in range(0, num_rows, 1000):
            file.writelines(
                line.replace("s", f"s{start}-", 1) for line in lines[: num_rows - start]
            )
        file.write(extra)


def test_a_long_manifest_is_planned_from_some_of_its_rows_in_seconds(tmp_path):
    folder = write_images(tmp_path / "pictures", num_images=4)
    for path in (folder / "images").iterdir():
        Image.new("L", (64, 64)).save(path)
    write_rows(folder / "manifest.csv", 1_000_000)
    begun_s = time.monotonic()
    planned = plan(config_of(folder), measure=False)
    assert (planned.num_new, planned.num_looked_at) == (1_000_000, 64)
    assert planned.items[0].num_samples == 1_000_000
    assert planned.items[0].num_files == 62_500
    # Objects for a million rows would take longer than that.
    assert time.monotonic() - begun_s < 5


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [["a", "b"]],
        [["a", "b"], ["c", "d"]],
        [["a", 'says "no"'], ["c", "two\nlines"], ["e", "\n"]],
    ],
    ids=len,
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "ending"])
def test_rows_are_counted_as_the_reader_of_csv_counts_them(tmp_path, rows, ending, last):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=ending).writerows([["id", "image"], *rows])
    content = text.getvalue()
    if not last:
        content = content.removesuffix(ending)
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode())
    assert count_rows(path) == len(rows)


def test_a_manifest_that_is_not_there_is_not_counted(tmp_path):
    with pytest.raises(ManifestError, match="no such file"):
        count_rows(tmp_path / "nowhere.csv")
