import json

import pytest
from picture_folder import write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("plan") / "pictures", num_images=20)


def test_the_plan_is_a_table_for_people(folder, invoke):
    store = folder.parent / "x.zarr"
    done = invoke("plan", folder, "-o", store, "--no-time", "--levels", "fpn_72")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == f"{store}: 20 samples; 20 new."
    assert lines[1].split() == ["samples", "files", "size"]
    assert lines[2].split() == ["fpn_72", "20", "2", "53.1", "MB"]
    assert lines[3].split()[:4] == ["masks", "20", "2", "about"]
    assert lines[5].strip().startswith("in all")
    assert lines[5].endswith(" free")
    assert not store.exists()


def test_the_plan_is_json_for_programs(folder, invoke):
    store = folder.parent / "x.zarr"
    done = invoke("plan", folder, "-o", store, "--no-time", "--json", "--num-images", "1000")
    assert done.exit_code == 0, done.output
    planned = json.loads(done.stdout)
    assert planned["store"] == store.as_posix()
    assert (planned["num_samples"], planned["num_looked_at"]) == (1000, 20)
    assert [item["name"] for item in planned["items"][:2]] == ["fpn_72", "image_1008"]
    assert planned["size_bytes"] == sum(item["size_bytes"] for item in planned["items"])
    assert planned["time"] is None


def test_weights_that_are_not_there_cost_the_time_alone(folder, invoke):
    done = invoke("plan", folder, "-o", folder.parent / "x.zarr", "--weights", "nowhere.pt")
    assert done.exit_code == 0, done.output
    assert "fpn_72" in done.stdout
    assert "Time: not measured: nowhere.pt: no such file" in done.stdout


def test_no_manifest_is_needed_to_plan_for_a_number_of_images(tmp_path, invoke):
    store = tmp_path / "x.zarr"
    done = invoke("plan", "--num-images", "1000", "-o", store, "--no-time", "--levels", "fpn_72")
    assert done.exit_code == 0, done.output
    assert f"{store}: 1,000 samples; 1,000 new." in done.stdout


@pytest.mark.parametrize(
    ("options", "exit_code", "named"),
    [
        (("--num-images", "100000000"), 1, "TB"),
        (("--levels", "fpn_73"), 2, "fpn_73"),
        (("--backbone", "sam4"), 2, "sam4"),
        (("--num-images", "0"), 2, "0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder, invoke, options, exit_code, named):
    done = invoke("plan", folder, "-o", folder.parent / "x.zarr", "--no-time", *options)
    assert done.exit_code == exit_code
    assert named in done.stderr.splitlines()[-1]
    if exit_code == 1:
        last = done.stderr.splitlines()[-1]
        assert last.startswith("sam3cache: error: ")
        assert "would take" in last
        assert "or give -o a folder on another disk" in last


def test_without_manifest_and_number_there_is_nothing_to_plan(invoke):
    done = invoke("plan")
    assert done.exit_code == 2
    assert "no MANIFEST given" in done.stderr
