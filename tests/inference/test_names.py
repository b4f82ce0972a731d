"""Names of files: readable, each once, none outside its folder, on any system."""

from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam3cache.inference.names import MAX_PART_CHARS, folder_names, output_names
from sam3cache.records import Sample


def names_of(*ids: str) -> list[str]:
    return output_names([Sample(id_, f"{n}.png", Path("r")) for n, id_ in enumerate(ids)])


@pytest.mark.parametrize(
    ("id_", "name"),
    [
        ("s00", "s00"),
        ("patient 7/run_1#12@LAD", "patient 7/run_1#12@LAD"),
        ("Gefäß", "Gefäß"),
        ("../../etc/passwd", "etc/passwd"),
        ("/etc/passwd", "etc/passwd"),
        ("C:\\data\\a", "C_/data/a"),
        ("..", "_"),
        ("", "_"),
        ("a/./b", "a/b"),
        ("a:b?c", "a_b_c"),
        ("con", "_con"),
        ("lpt1.x/nul", "_lpt1.x/_nul"),
        ("trailing. ", "trailing"),
        (".hidden", "hidden"),
        ("line\nbreak\0", "line_break_"),
        ("a.png/b", "a.png_/b"),
    ],
)
def test_an_id_becomes_a_name_that_every_system_can_have(id_: str, name: str) -> None:
    assert names_of(id_) == [name]


def test_names_that_would_be_one_on_some_system_are_told_apart_whatever_their_order() -> None:
    names = names_of("a:b", "a_b", "A_b", "c")
    assert [name[:4] for name in names[:3]] == ["a_b-", "a_b-", "A_b-"]
    assert len({name.casefold() for name in names}) == 4
    assert names[3] == "c"
    samples = [Sample(id_, f"{n}.png", Path("r")) for n, id_ in enumerate(("a:b", "a_b"))]
    assert output_names(samples[::-1]) == output_names(samples)[::-1]


def test_one_id_of_two_manifests_gives_two_names() -> None:
    names = output_names([Sample("s", "s.png", Path("x")), Sample("s", "s.png", Path("y"))])
    assert len(set(names)) == 2


def test_a_long_id_is_cut_and_still_told_from_its_like() -> None:
    names = names_of("x" * 300 + "1", "x" * 300 + "2")
    assert len(set(names)) == 2
    assert all(len(name) <= MAX_PART_CHARS for name in names)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=6))
def test_whatever_the_ids_no_name_escapes_or_is_there_twice(ids: list[str]) -> None:
    names = names_of(*ids)
    files = [f"{name}.png".casefold() for name in names]
    assert len(set(files)) == len(ids)
    for name in names:
        for flavour in (PurePosixPath, PureWindowsPath):
            path = flavour("out") / f"{name}.png"
            assert path.parts[0] == "out"
            assert ".." not in path.parts
            assert len(path.parts) >= 2
        assert not set('<>:"|?*\\\0\n') & set(name)
    # No file lies where another needs a folder.
    folders = {parent.as_posix() for file in files for parent in PurePosixPath(file).parents}
    assert folders.isdisjoint(files)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), max_size=5))
def test_every_class_has_a_folder_of_its_own(classes: list[str]) -> None:
    folders = folder_names(classes)
    assert len({folder.casefold() for folder in folders}) == len(classes)
    assert all("/" not in folder and folder.strip(". ") for folder in folders)
