"""Whatever is done to a file's bytes, a reader gives pixels or says in one line what is wrong.

``benchmarks/fuzz.py`` does the same for as long as one likes.
"""

import itertools
import struct
import time

import pytest
import tifffile
from damage import FILES, damaged, forget_peak, peak_bytes, read_all

from sam3cache.images import read_manifest
from sam3cache.images.pseudonyms import KEY_FILE_VARIABLE

NUM_DAMAGED = 16
"""Of each kind of file, so that all of it takes seconds."""

MAX_S = 10.0
MAX_GROWN_BYTES = 300_000_000
"""Bounds of what 3 kB of damage may cost, far above what reading them takes."""


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, monkeypatch, capfd, kind):
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / "names.key"))
    path = FILES[kind](tmp_path)
    data = path.read_bytes()
    assert read_all(path) == ""
    forget_peak()
    before_bytes = peak_bytes()
    for bytes_ in itertools.islice(damaged(data, seed=7), NUM_DAMAGED):
        path.write_bytes(bytes_)
        begun_s = time.monotonic()
        problem = read_all(path)
        assert time.monotonic() - begun_s < MAX_S
        assert "\n" not in problem
        assert len(problem) < 600
    assert peak_bytes() - before_bytes < MAX_GROWN_BYTES
    assert capfd.readouterr() == ("", "")


def test_a_tiff_whose_last_page_leads_back_to_its_first_is_refused(tmp_path):
    path = FILES["a.tif"](tmp_path)
    with tifffile.TiffFile(path) as tiff:
        first, last = tiff.pages[0].offset, tiff.pages[-1].offset
    data = bytearray(path.read_bytes())
    (num_tags,) = struct.unpack_from("<H", data, last)
    struct.pack_into("<I", data, last + 2 + 12 * num_tags, first)
    path.write_bytes(data)
    assert read_all(path) == "a.tif: damaged (pages without end); restore the file"


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ('"a\nb.npy",0', "the image has a line break"),
        ('x.npy,"0\n1"', "the frame has a line break"),
        (".,0", "the image '.' is no file's name"),
        ("/,0", "the image '/' is no file's name"),
    ],
)
def test_a_cell_that_can_be_no_name_is_set_aside_in_one_line(tmp_path, cells, expected):
    path = tmp_path / "a.csv"
    path.write_text(f"image,frame\nx.npy,0\n{cells}\n", encoding="utf-8")
    (aside,) = read_manifest(path).set_aside
    assert expected in aside.reason
    assert "\n" not in aside.reason + aside.id + aside.source
