"""A patient grown from a seed: a heart, its coronary trees, the catheters and the thorax.

The ventricles are half an ellipsoid: its rim is the atrioventricular (AV) groove, its pole the
apex. A place on it is a longitude (0 on the anterior interventricular groove, positive towards the
left ventricle, ±π on the posterior groove) and a latitude (0 on the AV groove, π/2 at the apex).
Vessels walk over that surface by heading: 0 towards the apex, +π/2 towards growing longitude.

Diameters are those of Dodge et al., Circulation 1992;86:232-246, for men without disease and with
right dominance; what a branch takes from its parent follows Murray, PNAS 1926;12:207-214.

All positions are in the patient frame of ``projection``, mm. Shape legend: N points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sam3cache.images.phantom.projection import Array

Side = Literal["left", "right"]

BRANCHES = (
    "LM", "LAD", "LCx", "D1", "D2", "D3", "OM1", "OM2", "OM3", "S1", "S2", "S3", "S4",
    "RCA", "RV1", "RV2", "RV3", "PDA", "PLV",
)  # fmt: skip
"""Branch names; a branch's label is its place here plus one, and 0 is background."""

STEP_MM = 1.0
TIP_DIAMETER_MM = 0.7
MIN_SIDE_MM = 1.4
MAX_SIDE_MM = 2.2
WOBBLE_RAD = 0.035
STENOSIS_PROBABILITY = 0.3


@dataclass(frozen=True, slots=True)
class Branch:
    """A vessel as a chain of points one ``STEP_MM`` apart, from its origin to its tip.

    Attributes:
        name: one of ``BRANCHES``.
        trunk: the vessel it is a part of or, for a side branch, its own name. Lumens of one trunk
            are one lumen; contrast in different trunks adds up along a ray.
        points_N3: centre line, mm.
        healthy_radius_N: lumen radius before disease, mm.
        radius_N: lumen radius, mm.
        parent: name of the vessel it leaves, or "" at the ostium.
        junction: index of the parent's point that it leaves from.
        buried_mm: length of its beginning that lies inside the parent's lumen.
    """

    name: str
    trunk: str
    points_N3: Array
    healthy_radius_N: Array
    radius_N: Array
    parent: str = ""
    junction: int = 0
    buried_mm: float = 0.0

    @property
    def label(self) -> int:
        """Value of this branch in a label map."""
        return BRANCHES.index(self.name) + 1

    @property
    def length_mm(self) -> float:
        """Length of the centre line."""
        return float(_lengths(self.points_N3)[-1])


@dataclass(frozen=True, slots=True)
class Heart:
    """Half an ellipsoid and its directions, which are unit vectors (3,).

    Attributes:
        base_mm: centre of the AV groove's plane.
        apex: from the base to the apex.
        groove: across the axis, to the anterior interventricular groove.
        lateral: across the axis, to the free wall of the left ventricle.
        radius_mm: of the AV groove.
        length_mm: from the base to the apex.
    """

    base_mm: Array
    apex: Array
    groove: Array
    lateral: Array
    radius_mm: float
    length_mm: float

    def surface(self, longitude_N: Array, latitude_N: Array) -> Array:
        """Points (N, 3), mm, of the epicardium. The right ventricle bulges past the ellipsoid."""
        bulge_N = 1.0 + 0.14 * np.minimum(np.sin(longitude_N), 0.0) ** 2
        across_N = self.radius_mm * np.cos(latitude_N) * bulge_N
        return (
            self.base_mm
            + np.outer(self.length_mm * np.sin(latitude_N), self.apex)
            + np.outer(across_N * np.cos(longitude_N), self.groove)
            + np.outer(across_N * np.sin(longitude_N), self.lateral)
        )

    def locate(self, point: Array) -> tuple[float, float]:
        """Longitude and latitude, radians, below which a point (3,) lies."""
        offset = point - self.base_mm
        longitude = np.arctan2(offset @ self.lateral, offset @ self.groove)
        latitude = np.arcsin(np.clip(offset @ self.apex / self.length_mm, -1.0, 1.0))
        return float(longitude), float(latitude)


@dataclass(frozen=True, slots=True)
class Thorax:
    """What else the rays cross; ``level_mm`` is the height of a part along z.

    Attributes:
        torso_mm: semi-axes of the trunk's ellipsoid, (3,).
        lung_mm: semi-axes of each lung, (3,).
        dome_mm: semi-axes of each dome of the diaphragm, (3,).
        dome_level_mm: top of the right and the left dome.
        vertebra_mm: semi-axes across of a vertebral body (x, y).
        vertebra_pitch_mm: from one vertebra to the next.
        vertebra_level_mm: lower edge of the lowest vertebra.
        ribs: centre lines (N, 3), mm, points about 5 mm apart.
        rib_radius_mm: of every rib.
    """

    torso_mm: Array
    lung_mm: Array
    dome_mm: Array
    dome_level_mm: tuple[float, float]
    vertebra_mm: tuple[float, float]
    vertebra_pitch_mm: float
    vertebra_level_mm: float
    ribs: tuple[Array, ...]
    rib_radius_mm: float


@dataclass(frozen=True, slots=True)
class Patient:
    """One anatomy, seen from several sides.

    Attributes:
        heart: surface that the vessels run on.
        trees: branches of the left and of the right coronary system; parents come first.
        catheters: centre line (N, 3), mm, of the catheter in each ostium, from the tip upwards.
        catheter_radius_mm: of both.
        thorax: the background.
    """

    heart: Heart
    trees: dict[Side, tuple[Branch, ...]]
    catheters: dict[Side, Array]
    catheter_radius_mm: float
    thorax: Thorax


def grow_patient(rng: np.random.Generator) -> Patient:
    """Draw one patient. The draws come in a fixed order, so a seed is an anatomy."""
    heart = _grow_heart(rng)
    root = heart.base_mm + 0.42 * heart.radius_mm * heart.groove - 9.0 * heart.apex
    ostia: dict[Side, Array] = {
        "left": root + 12.0 * _unit(0.75 * heart.groove + 0.65 * heart.lateral),
        "right": root + 12.0 * _unit(0.80 * heart.groove - 0.60 * heart.lateral),
    }
    return Patient(
        heart=heart,
        trees={
            "left": _grow_left(heart, ostia["left"], rng),
            "right": _grow_right(heart, ostia["right"], rng),
        },
        catheters={side: _lay_catheter(root, ostium, rng) for side, ostium in ostia.items()},
        catheter_radius_mm=rng.uniform(0.85, 1.0),
        thorax=_grow_thorax(rng),
    )


def _grow_heart(rng: np.random.Generator) -> Heart:
    apex = _unit(np.array([0.58, -0.45, -0.68]) + rng.normal(0.0, 0.04, 3))
    roll = rng.normal(0.0, np.deg2rad(5.0))
    # Seen along LAO 45 the septum stands upright: the anterior groove lies on the head's side.
    upward = _unit(np.array([0.0, 0.0, 1.0]) - apex[2] * apex)
    leftward = np.cross(upward, apex)
    groove = np.cos(roll) * upward + np.sin(roll) * leftward
    length_mm = rng.uniform(75.0, 95.0)
    return Heart(
        base_mm=-0.42 * length_mm * apex + rng.normal(0.0, 4.0, 3),
        apex=apex,
        groove=groove,
        lateral=np.cross(groove, apex),
        radius_mm=rng.uniform(36.0, 44.0),
        length_mm=length_mm,
    )


def _grow_left(heart: Heart, ostium: Array, rng: np.random.Generator) -> tuple[Branch, ...]:
    lad_mm, lcx_mm = _normal(rng, 3.7, 0.4), _normal(rng, 3.4, 0.5)
    fork = heart.surface(np.array([rng.uniform(0.15, 0.35)]), np.array([rng.uniform(-0.06, 0.0)]))
    points = _bend(ostium, fork[0], heart.lateral + heart.groove, heart.groove + heart.lateral)
    main_mm = np.full(len(points), np.cbrt(lad_mm**3 + lcx_mm**3))
    main = _vessel("LM", "LAD", points, main_mm, rng)

    lad = _walk(heart, fork[0], (0.2, -0.12), 10.0, _size_mm(heart, 100.0, 130.0, rng), rng)
    num_diagonals, num_septals = int(rng.integers(2, 4)), int(rng.integers(2, 5))
    diagonals = _spread("D", num_diagonals, 0.14, 0.60, rng)
    septals = _spread("S", num_septals, 0.10, 0.62, rng)
    lad_tree = _trunk(heart, "LAD", main, lad, lad_mm, _normal(rng, 1.9, 0.4), rng,
                      sides=diagonals | septals)  # fmt: skip

    lcx = _walk(heart, fork[0], (1.15, 1.5), 20.0, _size_mm(heart, 80.0, 100.0, rng), rng)
    marginals = _spread("OM", int(rng.integers(1, 4)), 0.2, 0.85, rng)
    lcx_tree = _trunk(heart, "LCx", main, lcx, lcx_mm, _normal(rng, 1.3, 0.2), rng, sides=marginals)
    return (main, *lad_tree, *lcx_tree)


def _grow_right(heart: Heart, ostium: Array, rng: np.random.Generator) -> tuple[Branch, ...]:
    start = heart.surface(np.array([rng.uniform(-0.85, -0.7)]), np.array([rng.uniform(0.0, 0.06)]))
    length_mm = _size_mm(heart, 120.0, 140.0, rng)
    near = _bend(ostium, start[0], heart.groove - 0.8 * heart.lateral, -heart.lateral)
    far = _walk(heart, start[0], (-1.4, -1.62), 30.0, length_mm, rng)
    points = _resample(np.concatenate([near, far[1:]]), length_mm)
    sides = _spread("RV", int(rng.integers(2, 4)), 0.15, 0.65, rng) | {"PDA": 1.0, "PLV": 1.0}
    return tuple(_trunk(heart, "RCA", None, points, _normal(rng, 3.9, 0.6), 0.0, rng, sides=sides))


# How a side branch leaves and then runs: headings at its origin and far on, radians, relative to
# the apex (signs as for LAD, LCx and RCA above); the distance over which it turns; its length.
_COURSES: dict[str, tuple[tuple[float, float], float, tuple[float, float]]] = {
    "D": ((0.95, 0.25), 15.0, (40.0, 70.0)),
    "OM": ((0.75, 0.0), 15.0, (40.0, 70.0)),
    "RV": ((-0.8, 0.15), 20.0, (30.0, 55.0)),
    "PDA": ((-1.0, 0.0), 8.0, (50.0, 75.0)),
    "PLV": ((-1.6, -0.2), 25.0, (40.0, 65.0)),
}


def _trunk(
    heart: Heart,
    name: str,
    parent: Branch | None,
    points_N3: Array,
    start_mm: float,
    tip_mm: float,
    rng: np.random.Generator,
    *,
    sides: dict[str, float],
) -> list[Branch]:
    """A main vessel and its side branches.

    At a fork the cubes of the radii add up: r₀³ = r₁³ + r₂³ (Murray 1926). Between forks the cube
    declines evenly, for the twigs that are too small to be drawn.

    Args:
        heart: surface to run on.
        name: of the main vessel.
        parent: vessel it leaves, None at the ostium.
        points_N3: centre line.
        start_mm: diameter at the origin.
        tip_mm: diameter at the end; lowered where the side branches leave less than that.
        rng: source of the side branches.
        sides: by name, where along the vessel each side branch leaves, 0 to 1.
    """
    diameters_mm = _share(rng.uniform(MIN_SIDE_MM, MAX_SIDE_MM, len(sides)), start_mm, tip_mm)
    ends_here = sum(d**3 for d, at in zip(diameters_mm, sides.values(), strict=True) if at == 1.0)
    tip_cube = ends_here or min(tip_mm**3, 0.95 * start_mm**3 - float(np.sum(diameters_mm**3)))

    last = len(points_N3) - 1
    junctions = [round(at * last) for at in sides.values()]
    cube_N = np.full(len(points_N3), start_mm**3)
    for diameter_mm, junction in zip(diameters_mm, junctions, strict=True):
        if junction < last:
            cube_N[junction:] -= diameter_mm**3
    cube_N -= (cube_N[-1] - tip_cube) * np.linspace(0.0, 1.0, len(points_N3))
    trunk = _vessel(name, name, points_N3, np.cbrt(cube_N), rng, parent)

    branches = [trunk]
    for side, diameter_mm, junction in zip(sides, diameters_mm, junctions, strict=True):
        origin = points_N3[junction]
        if side.startswith("S"):
            points = _dive(heart, origin, rng.uniform(20.0, 40.0), rng)
        else:
            heading, turn_mm, length_mm = _COURSES[side.rstrip("123")]
            points = _walk(heart, origin, heading, turn_mm, rng.uniform(*length_mm), rng)
        taper_mm = np.linspace(diameter_mm, TIP_DIAMETER_MM, len(points))
        lumen = name if side == "PLV" else side
        branches.append(_vessel(side, lumen, points, taper_mm, rng, trunk, junction))
    return branches


def _vessel(
    name: str,
    trunk: str,
    points_N3: Array,
    diameter_mm_N: Array,
    rng: np.random.Generator,
    parent: Branch | None = None,
    junction: int = -1,
) -> Branch:
    """A branch, some of them narrowed by one smooth stenosis."""
    healthy_N = diameter_mm_N / 2
    radius_N = healthy_N
    place, width_mm, severity = rng.uniform((0.15, 2.0, 0.3), (0.8, 5.0, 0.8))
    if rng.random() < STENOSIS_PROBABILITY:
        at_mm_N = _lengths(points_N3)
        offset_N = (at_mm_N - place * at_mm_N[-1]) / width_mm
        radius_N = healthy_N * (1.0 - severity * np.exp(-0.5 * offset_N**2))
    if parent is None:
        return Branch(name, trunk, points_N3, healthy_N, radius_N)
    junction %= len(parent.points_N3)
    continues = trunk == parent.trunk
    buried_mm = 0.0 if continues else 0.9 * float(parent.healthy_radius_N[junction])
    return Branch(name, trunk, points_N3, healthy_N, radius_N, parent.name, junction, buried_mm)


def _share(diameters_mm: Array, start_mm: float, tip_mm: float) -> Array:
    """Side diameters, lowered to what Murray's law leaves for them but not out of their range."""
    wanted, available = float(np.sum(diameters_mm**3)), 0.95 * start_mm**3 - tip_mm**3
    fit = min(1.0, (available / wanted) ** (1 / 3))
    fitting_mm: Array = np.maximum(diameters_mm * fit, MIN_SIDE_MM)
    return fitting_mm


def _walk(
    heart: Heart,
    origin: Array,
    heading_rad: tuple[float, float],
    turn_mm: float,
    length_mm: float,
    rng: np.random.Generator,
) -> Array:
    """A course over the heart, turning from one heading to another and swaying about it."""
    longitude, latitude = heart.locate(origin)
    drift = rng.normal(0.0, 0.08)
    num_steps = int(1.15 * length_mm / STEP_MM) + 2
    course_N2 = np.empty((num_steps, 2))
    for step in range(num_steps):
        course_N2[step] = longitude, latitude
        fade = math.exp(-step * STEP_MM / turn_mm)
        heading = fade * heading_rad[0] + (1.0 - fade) * (heading_rad[1] + drift)
        cos_lat, sin_lat = math.cos(latitude), math.sin(latitude)
        per_latitude_mm = math.hypot(heart.length_mm * cos_lat, heart.radius_mm * sin_lat)
        # Near the apex a step sideways would spin round the pole; keep the circle from vanishing.
        per_longitude_mm = heart.radius_mm * max(abs(cos_lat), 0.2)
        latitude += STEP_MM * math.cos(heading) / per_latitude_mm
        longitude += STEP_MM * math.sin(heading) / per_longitude_mm
    points_N3 = heart.surface(course_N2[:, 0], course_N2[:, 1])

    at_mm_N = STEP_MM * np.arange(num_steps, dtype=np.float64)
    ahead_N3 = np.gradient(points_N3, axis=0)
    across_N3 = np.cross(ahead_N3, points_N3 - heart.base_mm)
    across_N3 /= np.linalg.norm(across_N3, axis=1, keepdims=True)
    points_N3 += across_N3 * (heart.radius_mm * _sway(at_mm_N, rng))[:, None]
    # The parent sways too, so its lumen is off the bare surface: leave from there, then settle.
    points_N3 += (origin - points_N3[0]) * np.exp(-at_mm_N / 8.0)[:, None]
    return _resample(points_N3, length_mm)


def _dive(heart: Heart, origin: Array, length_mm: float, rng: np.random.Generator) -> Array:
    """A septal branch: from the groove into the septum, bending towards the apex."""
    longitude, _ = heart.locate(origin)
    inward = -np.cos(longitude) * heart.groove - np.sin(longitude) * heart.lateral
    side = np.cross(inward, heart.apex)
    num_steps = int(1.1 * length_mm / STEP_MM) + 2
    at_mm_N = STEP_MM * np.arange(num_steps, dtype=np.float64)
    bend_N = 0.5 + rng.uniform(0.0, 0.3) + 0.5 * at_mm_N / length_mm
    steps_N3 = np.outer(np.cos(bend_N), inward) + np.outer(np.sin(bend_N), heart.apex)
    points_N3 = origin + STEP_MM * (np.cumsum(steps_N3, axis=0) - steps_N3[0])
    points_N3 += np.outer(0.5 * heart.radius_mm * _sway(at_mm_N, rng), side)
    return _resample(points_N3, length_mm)


def _sway(at_mm_N: Array, rng: np.random.Generator) -> Array:
    """Two sines, in radians of the heart's circle, that start from nothing."""
    period_mm = rng.uniform((45.0, 18.0), (80.0, 32.0))
    phase = rng.uniform(0.0, 2 * np.pi, 2)
    waves_N2 = np.sin(2 * np.pi * at_mm_N[:, None] / period_mm + phase)
    wave_N: Array = WOBBLE_RAD * (0.75 * waves_N2[:, 0] + 0.25 * waves_N2[:, 1])
    return wave_N * (1.0 - np.exp(-at_mm_N / 12.0))


def _lay_catheter(root: Array, ostium: Array, rng: np.random.Generator) -> Array:
    """From the ostium across the aortic root to the far wall, up, over the arch and down."""
    out = _unit(ostium - root)
    sway_mm = rng.normal(0.0, 3.0, (3, 3))
    return _spline(
        np.array(
            [
                ostium + 2.0 * out,
                ostium - 7.0 * out + (0.0, 0.0, 1.0),
                root - 9.0 * out + (-2.0, -2.0, 20.0),
                root - 8.0 * out + (-3.0, -5.0, 45.0) + sway_mm[0],
                root + (16.0, 20.0, 85.0) + sway_mm[1],
                root + (38.0, 50.0, 55.0) + sway_mm[2],
                (22.0, 66.0, 20.0),
                (18.0, 70.0, -80.0),
                (14.0, 72.0, -180.0),
            ]
        ),
        spacing_mm=1.5,
    )


def _grow_thorax(rng: np.random.Generator) -> Thorax:
    size = rng.normal(1.0, 0.05)
    pitch_mm = rng.uniform(24.0, 27.0)
    lowest_mm = -6 * pitch_mm + rng.uniform(-12.0, 12.0)
    angle_N = np.linspace(0.08, 2.6, 70)
    ribs = []
    for level_mm in lowest_mm + pitch_mm * (np.arange(12) + 0.8):
        for side in (-1.0, 1.0):
            drop_mm = rng.normal(62.0, 7.0)
            x_N = side * size * (8.0 + 122.0 * np.sin(angle_N))
            y_N = 5.0 + 97.0 * np.cos(angle_N)
            z_N = level_mm - drop_mm * (1.0 - np.cos(angle_N)) / 1.8 + 6.0 * np.sin(2 * angle_N)
            ribs.append(_resample(np.stack([x_N, y_N, z_N], axis=1), spacing_mm=5.0))
    left_mm = rng.uniform(-62.0, -45.0)
    return Thorax(
        torso_mm=size * np.array([165.0, 115.0, 420.0]),
        lung_mm=size * np.array([60.0, 85.0, 135.0]),
        dome_mm=size * np.array([78.0, 90.0, 90.0]),
        dome_level_mm=(left_mm + rng.uniform(6.0, 14.0), left_mm),
        vertebra_mm=(rng.uniform(14.0, 17.0), rng.uniform(13.0, 16.0)),
        vertebra_pitch_mm=pitch_mm,
        vertebra_level_mm=lowest_mm,
        ribs=tuple(ribs),
        rib_radius_mm=rng.uniform(3.5, 5.0),
    )


def _unit(vector: Array) -> Array:
    return vector / np.linalg.norm(vector)


def _normal(rng: np.random.Generator, mean: float, deviation: float) -> float:
    """A normal draw held to 1.5 deviations, so that no parent is too thin for its branches."""
    return mean + deviation * float(np.clip(rng.normal(), -1.5, 1.5))


def _size_mm(
    heart: Heart, shortest_mm: float, longest_mm: float, rng: np.random.Generator
) -> float:
    """A length in a range: mostly the heart's size, partly chance."""
    size = (heart.radius_mm - 36.0) / 16.0 + (heart.length_mm - 75.0) / 40.0
    return shortest_mm + (longest_mm - shortest_mm) * (0.7 * size + 0.3 * rng.random())


def _spread(
    prefix: str, count: int, first: float, last: float, rng: np.random.Generator
) -> dict[str, float]:
    """Names prefix1, prefix2, … and places in order, one in each equal part of [first, last]."""
    part = (last - first) / count
    return {f"{prefix}{i + 1}": first + part * (i + rng.uniform(0.2, 0.8)) for i in range(count)}


def _lengths(points_N3: Array) -> Array:
    """Distance along a chain of points, (N,), mm, from 0."""
    steps = np.linalg.norm(np.diff(points_N3, axis=0), axis=1)
    return np.concatenate([[0.0], np.cumsum(steps)])


def _resample(
    points_N3: Array, length_mm: float | None = None, spacing_mm: float = STEP_MM
) -> Array:
    """The chain at even spacing, cut at a length."""
    at_mm_N = _lengths(points_N3)
    end_mm = at_mm_N[-1] if length_mm is None else min(length_mm, at_mm_N[-1])
    even = np.linspace(0.0, end_mm, max(round(end_mm / spacing_mm), 1) + 1)
    return np.stack([np.interp(even, at_mm_N, points_N3[:, axis]) for axis in range(3)], axis=1)


def _bend(start: Array, end: Array, leaving: Array, arriving: Array) -> Array:
    """A cubic Hermite curve between two points with given directions."""
    reach_mm = float(np.linalg.norm(end - start))
    t = np.linspace(0.0, 1.0, 50)[:, None]
    curve = (
        (2 * t**3 - 3 * t**2 + 1) * start
        + (t**3 - 2 * t**2 + t) * reach_mm * _unit(leaving)
        + (3 * t**2 - 2 * t**3) * end
        + (t**3 - t**2) * reach_mm * _unit(arriving)
    )
    return _resample(curve)


def _spline(knots_N3: Array, spacing_mm: float) -> Array:
    """A Catmull-Rom curve through the knots."""
    tangents = np.gradient(knots_N3, axis=0)
    t = np.linspace(0.0, 1.0, 40, endpoint=False)[:, None]
    pieces = [
        (2 * t**3 - 3 * t**2 + 1) * knots_N3[i]
        + (t**3 - 2 * t**2 + t) * tangents[i]
        + (3 * t**2 - 2 * t**3) * knots_N3[i + 1]
        + (t**3 - t**2) * tangents[i + 1]
        for i in range(len(knots_N3) - 1)
    ]
    return _resample(np.concatenate([*pieces, knots_N3[-1:]]), spacing_mm=spacing_mm)
