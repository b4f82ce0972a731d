"""The coronary trees: courses, lengths, calibres and forks, over many patients."""

import numpy as np
import pytest

from sam3cache.images.phantom.anatomy import BRANCHES, Branch, Patient, grow_patient
from sam3cache.images.phantom.projection import View

NUM_PATIENTS = 30


@pytest.fixture(scope="module")
def patients() -> list[Patient]:
    return [grow_patient(np.random.default_rng(seed)) for seed in range(NUM_PATIENTS)]


def branches_of(patient: Patient) -> dict[str, Branch]:
    return {branch.name: branch for tree in patient.trees.values() for branch in tree}


def test_a_seed_is_an_anatomy():
    one, same, other = (grow_patient(np.random.default_rng(seed)) for seed in (7, 7, 8))
    for name, branch in branches_of(one).items():
        np.testing.assert_array_equal(branch.points_N3, branches_of(same)[name].points_N3)
        np.testing.assert_array_equal(branch.radius_N, branches_of(same)[name].radius_N)
    lad_N3 = branches_of(one)["LAD"].points_N3
    assert not np.array_equal(lad_N3[:90], branches_of(other)["LAD"].points_N3[:90])


@pytest.mark.parametrize(
    ("name", "shortest_mm", "longest_mm"),
    [("RCA", 120, 140), ("LAD", 100, 130), ("LCx", 80, 100), ("LM", 4, 25)],
)
def test_main_vessels_have_their_length(
    patients: list[Patient], name: str, shortest_mm: float, longest_mm: float
):
    lengths_mm = [branches_of(patient)[name].length_mm for patient in patients]
    # Chords of a curve are a little shorter than the curve.
    assert min(lengths_mm) >= shortest_mm * 0.99
    assert max(lengths_mm) <= longest_mm


@pytest.mark.parametrize(
    ("name", "end", "mean_mm", "deviation_mm"),
    [
        ("LM", 0, 4.5, 0.5),
        ("LAD", 0, 3.7, 0.4),
        ("RCA", 0, 3.9, 0.6),
        ("LCx", 0, 3.4, 0.5),
        ("LAD", -1, 1.9, 0.4),
    ],
)
def test_main_vessels_have_the_calibre_of_dodge(
    patients: list[Patient], name: str, end: int, mean_mm: float, deviation_mm: float
):
    diameters_mm = np.array([2 * branches_of(p)[name].healthy_radius_N[end] for p in patients])
    assert np.all(np.abs(diameters_mm - mean_mm) <= 2 * deviation_mm)
    assert abs(diameters_mm.mean() - mean_mm) <= 0.5 * deviation_mm


def test_side_branches_start_between_1_4_and_2_2_mm_and_end_at_0_7(patients: list[Patient]):
    for patient in patients:
        for name, branch in branches_of(patient).items():
            if name not in ("LM", "LAD", "LCx", "RCA"):
                assert 1.4 <= 2 * branch.healthy_radius_N[0] <= 2.2
                assert 2 * branch.healthy_radius_N[-1] == pytest.approx(0.7)


def test_no_vessel_widens_on_its_way(patients: list[Patient]):
    for patient in patients:
        for branch in branches_of(patient).values():
            assert np.all(np.diff(branch.healthy_radius_N) <= 1e-12)


def test_forks_obey_murray(patients: list[Patient]):
    for patient in patients:
        branches = branches_of(patient)
        for name in ("LM", "LAD", "LCx", "RCA"):
            cube_N = branches[name].healthy_radius_N ** 3
            last = len(cube_N) - 1
            at_the_end = 0.0
            for side in branches.values():
                if side.parent == name and side.junction == last:
                    at_the_end += side.healthy_radius_N[0] ** 3
                elif side.parent == name:
                    cube_N[side.junction :] += side.healthy_radius_N[0] ** 3
            # Forks given back, what is left is the even loss to twigs, and never a gain.
            np.testing.assert_allclose(np.diff(cube_N, n=2), 0, atol=1e-12)
            assert cube_N[-1] <= cube_N[0] + 1e-12
            if at_the_end:
                assert branches[name].healthy_radius_N[-1] ** 3 == pytest.approx(at_the_end)


def test_branches_leave_from_their_parent_and_have_no_gaps(patients: list[Patient]):
    for patient in patients:
        branches = branches_of(patient)
        for branch in branches.values():
            steps_mm = np.linalg.norm(np.diff(branch.points_N3, axis=0), axis=1)
            assert steps_mm.max() < 1.05
            assert len(branch.radius_N) == len(branch.points_N3)
            if branch.parent:
                origin = branches[branch.parent].points_N3[branch.junction]
                np.testing.assert_allclose(branch.points_N3[0], origin, atol=1e-9)


@pytest.mark.parametrize(
    ("prefix", "fewest", "most"),
    [("D", 2, 3), ("OM", 1, 3), ("S", 2, 4), ("RV", 2, 3), ("PDA", 1, 1), ("PLV", 1, 1)],
)
def test_side_branches_come_in_their_numbers(
    patients: list[Patient], prefix: str, fewest: int, most: int
):
    counts = {
        sum(name.rstrip("1234") == prefix for name in branches_of(patient)) for patient in patients
    }
    assert counts == set(range(fewest, most + 1))


def test_every_branch_has_a_name_and_a_label_of_its_own(patients: list[Patient]):
    for patient in patients:
        names = [branch.name for tree in patient.trees.values() for branch in tree]
        assert len(names) == len(set(names))
        assert all(BRANCHES[branches_of(patient)[name].label - 1] == name for name in names)


def test_about_three_branches_in_ten_are_narrowed_by_30_to_80_percent(patients: list[Patient]):
    narrowing = [
        float(np.max(1 - branch.radius_N / branch.healthy_radius_N))
        for patient in patients
        for branch in branches_of(patient).values()
    ]
    diseased = [share for share in narrowing if share > 0]
    assert 0.22 < len(diseased) / len(narrowing) < 0.38
    assert min(diseased) > 0.25
    assert max(diseased) <= 0.8


def longitudes(patient: Patient, name: str) -> list[float]:
    return [patient.heart.locate(point)[0] for point in branches_of(patient)[name].points_N3]


def test_the_lad_runs_down_the_anterior_groove(patients: list[Patient]):
    for patient in patients:
        lad = branches_of(patient)["LAD"]
        middle = slice(len(lad.points_N3) // 4, 2 * len(lad.points_N3) // 3)
        assert np.max(np.abs(longitudes(patient, "LAD")[middle])) < np.deg2rad(35)
        down = lad.points_N3 @ patient.heart.apex
        assert down[-10] - down[0] > 0.8 * patient.heart.length_mm


def test_lcx_and_rca_sweep_the_av_groove_in_opposite_ways(patients: list[Patient]):
    for patient in patients:
        for name, sign in (("LCx", 1), ("RCA", -1)):
            sweep = sign * np.unwrap(longitudes(patient, name))
            assert sweep[-1] - sweep[0] > np.deg2rad(90)
            latitudes = [
                patient.heart.locate(point)[1] for point in branches_of(patient)[name].points_N3
            ]
            assert np.max(np.abs(latitudes)) < np.deg2rad(35)


def test_the_pda_follows_the_posterior_groove(patients: list[Patient]):
    for patient in patients:
        far = np.abs(longitudes(patient, "PDA")[15:40])
        assert np.all(far > np.deg2rad(120))


def columns_and_rows(patient: Patient, name: str, primary: float, secondary: float):
    view = View(primary, secondary, 765.0, 1100.0, 0.34, 512)
    right_mm_N, up_mm_N, _ = view.project(branches_of(patient)[name].points_N3)
    return view.to_pixels(right_mm_N, up_mm_N)


def test_views_show_what_an_operator_expects(patients: list[Patient]):
    for patient in patients:
        lad_col, lad_row = columns_and_rows(patient, "LAD", 45, 0)
        lcx_col, _ = columns_and_rows(patient, "LCx", 45, 0)
        rca_col, rca_row = columns_and_rows(patient, "RCA", 45, 0)
        # LAO: the RCA is a C open to the right, the LAD comes down in the middle, the LCx is right.
        assert rca_col.min() + 40 < min(rca_col[0], rca_col[-1])
        assert rca_row[-1] > rca_row[0] + 60
        assert rca_col.min() < lad_col.mean() < lcx_col.max()
        assert lad_row[-15] > lad_row[0] + 60
        # RAO: the LAD runs to the right, away from the LCx.
        lad_col, _ = columns_and_rows(patient, "LAD", -30, 0)
        lcx_col, _ = columns_and_rows(patient, "LCx", -30, 0)
        assert lad_col.max() > lad_col[0] + 60
        assert lcx_col[-1] < lcx_col[0]


def test_the_catheter_ends_in_the_ostium(patients: list[Patient]):
    for patient in patients:
        for side, tree in patient.trees.items():
            tip_mm = np.linalg.norm(patient.catheters[side][0] - tree[0].points_N3[0])
            assert tip_mm < 3.0
        assert 0.85 <= patient.catheter_radius_mm <= 1.0
