"""Whatever is done to a file's bytes, a reader gives pixels or says in one line what is wrong.

``benchmarks/fuzz.py`` does the same for as long as one likes.
"""

import itertools

import pytest
from damage import FILES, damaged, read_all

from sam3cache.images.pseudonyms import KEY_FILE_VARIABLE

NUM_DAMAGED = 8
"""Of each kind of file, so that all of it takes seconds."""


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, monkeypatch, capfd, kind):
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / "names.key"))
    path = FILES[kind](tmp_path)
    data = path.read_bytes()
    assert read_all(path) == ""
    for bytes_ in itertools.islice(damaged(data, seed=7), NUM_DAMAGED):
        path.write_bytes(bytes_)
        problem = read_all(path)
        assert "\n" not in problem
        assert len(problem) < 600
    assert capfd.readouterr() == ("", "")
