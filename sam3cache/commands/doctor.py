"""``sam3cache doctor``: can this machine do the work, and if not, what to do about it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sam3cache import runtime
from sam3cache.errors import ConfigError
from sam3cache.runtime import size_text

if TYPE_CHECKING:
    import torch

    from sam3cache.backbone import NumericPath, Tower
    from sam3cache.records import Sample

# Height and width of the pictures that go through the tower: wide, tall, square, and small.
PICTURE_SIZES_PX = ((600, 800), (768, 512), (1024, 1024), (480, 640))

# What ``sam3.model_builder.build_sam3_image_model`` of sam3 0.1.4 builds besides the vision tower.
# It cannot be built here (it needs a vocabulary that the package does not ship), so its sizes are
# written down, and a test counts them.
OTHER_PARTS = {
    "text encoder": 353_724_672,
    "detector": 21_047_605,
    "geometry encoder": 8_215_808,
    "segmentation head": 2_298_881,
    "scoring": 1_182_976,
}
TOWER_PARAMETERS = 454_039_808

FREE_DISK_BYTES = 2**30
BYTES_AN_IMAGE = 256 * 72 * 72 * 2
LARGEST_BATCH = 8
MOST_IMAGES = 8

INSTALL_TORCH = (
    "install torch and torchvision together, of one build and for your CUDA, as "
    "https://pytorch.org says"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at.

    Attributes:
        section: what it belongs to.
        name: what was looked at.
        value: what was found.
        problem: what is wrong and what to do next; empty when nothing is.
    """

    section: str
    name: str
    value: str
    problem: str = ""


@click.command()
@click.option(
    "--path",
    type=click.Path(path_type=Path),
    default=Path("features"),
    show_default=True,
    help="Where features are to be stored: its disk is measured.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="What the tower runs on: auto, cpu, or a CUDA device as cuda:1.",
)
@click.option(
    "--full",
    is_flag=True,
    help="Run SAM 3's tower at its full size, too, with random weights: minutes on a CPU, 5 GB.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help=f"Folder of pictures: what each precision keeps of the features of up to {MOST_IMAGES}.",
)
@click.option("--backbone", default="sam3", show_default=True, help="For --images, as in extract.")
@click.option("--weights", help="For --images, as in extract. [default: the backbone's own]")
@click.option("--json", "as_json", is_flag=True, help="Print all findings as JSON on stdout.")
def doctor(
    path: Path,
    device: str,
    full: bool,
    images: Path | None,
    backbone: str,
    weights: str | None,
    as_json: bool,
) -> None:
    """Check this machine: versions, devices, memory, disk, and the tower.

    Ends with exit code 1 when something is broken, and says what to do about it. Needs no weights
    and no network, but for --images: what storing levels in fewer bits loses of the features that
    your weights make of your pictures.

    \b
    Example:
      sam3cache doctor
      sam3cache doctor --full --path D:/features
      sam3cache doctor --images angio/images --weights sam3.pt
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    findings: list[Finding] = []
    if weights is not None and images is None:
        raise ConfigError("--weights is for --images: name a folder of pictures, too")
    pictures = [] if images is None else _pictures_in(images)
    for finding in _look(path, device, full, pictures, backbone, weights):
        if not as_json:
            _show(finding, new_section=not findings or findings[-1].section != finding.section)
        findings.append(finding)
    problems = [finding for finding in findings if finding.problem]
    if as_json:
        click.echo(json.dumps({"ok": not problems, "findings": [*map(asdict, findings)]}, indent=2))
    elif problems:
        click.echo("\nTo mend:")
        for finding in problems:
            click.echo(f"  {finding.name}: {finding.problem}")
    else:
        click.echo("\nEverything works.")
    if problems:
        raise click.exceptions.Exit(1)


def _show(finding: Finding, new_section: bool) -> None:
    if new_section:
        click.secho(f"\n{finding.section}", bold=True)
    mark = click.style("  <- broken", fg="red") if finding.problem else ""
    click.echo(f"  {finding.name:<30}  {finding.value}{mark}")


def _look(
    path: Path,
    device: str,
    full: bool,
    pictures: list[Sample],
    backbone: str,
    weights: str | None,
) -> Iterator[Finding]:
    yield from _versions()
    yield from _disk(path)
    try:
        import torch  # noqa: F401 - whether it can be
    except (ImportError, OSError) as error:
        reason = str(error).partition("\n")[0]
        yield Finding("Versions", "torch", f"cannot be imported: {reason}", INSTALL_TORCH)
        return
    yield from _devices()
    chosen = runtime.pick_device(device)
    try:
        # First, for it refuses a broken installation of sam3 with advice.
        yield from _pictures("sam3-mini", chosen, "fp32")
        yield from _parameters()
        if full:
            yield from _pictures("sam3", chosen, "fp32" if chosen == "cpu" else "bf16")
    except ConfigError as error:
        yield Finding("Tower", "sam3", "cannot be imported", str(error))
        return
    if pictures:
        yield from _precisions(pictures, backbone, weights, chosen)


def _versions() -> Iterator[Finding]:
    fields = runtime.environment_fields()
    yield from (Finding("Versions", name, value) for name, value in fields.items())
    for package in runtime.REPORTED_PACKAGES:
        if package not in fields:
            advice = f"install it: python -m pip install {package}"
            yield Finding("Versions", package, "is not installed", advice)


def _devices() -> Iterator[Finding]:
    memory = runtime.device_memory("cpu")
    yield Finding(
        "Devices",
        "cpu",
        f"{memory.name}, {runtime.num_cpu_cores()} cores, {size_text(memory.total_bytes)} memory, "
        f"{size_text(memory.free_bytes)} free",
    )
    with warnings.catch_warnings():
        # A driver that does not fit is said once, below, with what to do.
        warnings.simplefilter("ignore", UserWarning)
        num_devices = runtime.num_cuda_devices()
    yield from (_cuda_device(f"cuda:{index}") for index in range(num_devices))
    if not num_devices:
        cards = _nvidia_cards()
        yield Finding(
            "Devices",
            "cuda",
            cards or "no NVIDIA card, or no driver for one",
            _why_no_cuda() if cards else "",
        )


def _cuda_device(device: str) -> Finding:
    import torch

    try:
        memory = runtime.device_memory(device)
        # A build without kernels for this card says so only once it computes.
        ones = torch.ones(64, 64, device=device)
        works = (ones @ ones).sum().item() == 64**3
        problem = "" if works else "it computes wrongly: check it, or leave it out with --devices"
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        return Finding("Devices", device, reason, f"the card cannot compute; {INSTALL_TORCH}")
    major, minor = torch.cuda.get_device_capability(device)
    return Finding(
        "Devices",
        device,
        f"{memory.name}, capability {major}.{minor}, {size_text(memory.total_bytes)} memory, "
        f"{size_text(memory.free_bytes)} free",
        problem,
    )


def _nvidia_cards() -> str:
    """Name the cards that the driver knows, whatever torch thinks; empty when there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        listed = subprocess.run(
            [program, "--query-gpu=name", "--format=csv,noheader"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ", ".join(listed.stdout.split("\n")).strip(", ") if listed.returncode == 0 else ""


def _why_no_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built for the CPU alone; {INSTALL_TORCH}"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every card; unset it to use them"
    return (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, which the driver "
        "does not serve; update the driver, or install torch for an older CUDA"
    )


def _disk(path: Path) -> Iterator[Finding]:
    folder = runtime.existing_folder(path)
    try:
        free_bytes = shutil.disk_usage(folder).free
        yield Finding(
            "Disk",
            "free",
            f"{size_text(free_bytes)}, {free_bytes // BYTES_AN_IMAGE:,} images of level fpn_72",
            "" if free_bytes >= FREE_DISK_BYTES else "under 1 GB: choose another --path",
        )
        if free_bytes >= FREE_DISK_BYTES:
            rates = runtime.measure_disk(folder)
            yield Finding("Disk", "write, flushed to the disk", f"{rates.write / 1e6:,.0f} MB/s")
            yield Finding("Disk", "read, while in memory", f"{rates.read / 1e6:,.0f} MB/s")
    except OSError as error:
        advice = "choose a --path that can be written to"
        yield Finding("Disk", str(folder), error.strerror or "cannot be used", advice)


def _parameters() -> Iterator[Finding]:
    """Count the tower's parameters on SAM 3's own classes, without memory for them."""
    num_trunk, num_neck, num_trainable = _count_tower()
    num_tower = num_trunk + num_neck
    num_whole = num_tower + sum(OTHER_PARTS.values())
    yield Finding("Parameters", "SAM 3, for images", f"{num_whole:,}")
    yield Finding(
        "Parameters",
        "its vision tower",
        f"{num_tower:,} ({num_tower / num_whole:.0%}): trunk {num_trunk:,}, neck {num_neck:,}",
        ""
        if num_tower == TOWER_PARAMETERS
        else f"expected {TOWER_PARAMETERS:,}: this sam3 builds another tower; install sam3 0.1.4",
    )
    for name, count in OTHER_PARTS.items():
        yield Finding("Parameters", f"  not built: {name}", f"{count:,}")
    yield Finding(
        "Parameters",
        "  why not",
        "they read prompts and find objects; features are there before any prompt",
    )
    yield Finding(
        "Parameters",
        "trainable",
        f"{num_trainable:,}",
        "" if num_trainable == 0 else "the tower is not frozen: please report this",
    )


def _count_tower() -> tuple[int, int, int]:
    """Return the parameters of the trunk, of the neck, and those that would be trained."""
    from torch import nn

    from sam3cache.backbone import BACKBONES, LEVELS, Tower
    from sam3cache.backbone.sam3_modules import build_modules

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    spec = BACKBONES["sam3"]
    trunk, convs = build_modules(spec)
    necks = {
        name: convs[level.neck_index]
        for name, level in LEVELS.items()
        if level.neck_index is not None
    }
    tower = Tower(spec, trunk, necks, levels=tuple(LEVELS), weights_sha256="", numeric_path="fp32")
    # A fourth level, of stride 28 and as large as the third, is in SAM 3 but never read.
    num_neck = count(tower.necks) + count(tower.necks["fpn_72"])
    num_trainable = sum(p.numel() for p in tower.parameters() if p.requires_grad)
    return count(tower.trunk), num_neck, num_trainable


def _pictures(backbone: str, device: str, numeric_path: NumericPath) -> Iterator[Finding]:
    """Send noise of each picture size through the whole first pass."""
    import numpy as np
    import torch

    from sam3cache.backbone import load_tower
    from sam3cache.images import letterbox_image

    section = f"Pictures through {backbone}, random weights, {numeric_path}, {device}"
    tower = load_tower(backbone, weights="random", device=device, numeric_path=numeric_path)
    expected = (1, *tower.spec.level_shape("fpn_72"))
    squares = []
    for height_px, width_px in PICTURE_SIZES_PX:
        noise = np.random.default_rng(0)
        pixels_HWC = noise.integers(0, 256, (height_px, width_px, 1), dtype=np.uint8)
        square_CHW, letterbox = letterbox_image(pixels_HWC)
        squares.append(square_CHW)
        shape, is_finite, elapsed_s = _run_tower(tower, square_CHW[None])
        yield Finding(
            section,
            f"{width_px} x {height_px}",
            f"-> {letterbox.content_width_px} x {letterbox.content_height_px} on "
            f"{letterbox.size_px} x {letterbox.size_px} -> fpn_72 "
            f"{' x '.join(map(str, shape[1:]))} in {elapsed_s:.2f} s",
            ""
            if shape == expected and is_finite
            else f"features are not finite or not {expected}: please report this",
        )
    if backbone == "sam3":
        batch_BCHW = torch.stack(squares * (LARGEST_BATCH // len(squares)))
        _, _, elapsed_s = _run_tower(tower, batch_BCHW)
        yield Finding(
            section,
            f"a batch of {LARGEST_BATCH}",
            f"{elapsed_s:.2f} s, {LARGEST_BATCH / elapsed_s:.2f} images/s, "
            f"{size_text(_peak_bytes(device))} at the peak",
        )


def _run_tower(tower: Tower, image_BCHW: torch.Tensor) -> tuple[tuple[int, ...], bool, float]:
    """Return the shape of level fpn_72, whether all of it is finite, and how long it took, in s."""
    start_s = time.perf_counter()
    feature_BCHW = tower(image_BCHW)["fpn_72"]
    # Looking at the values waits for the device, too.
    is_finite = bool(feature_BCHW.isfinite().all())
    return tuple(feature_BCHW.shape), is_finite, time.perf_counter() - start_s


def _peak_bytes(device: str) -> int:
    """Report the most memory held so far: of a CUDA device, or of this process on a CPU."""
    if device == "cpu":
        return runtime.peak_memory_bytes()
    import torch

    return torch.cuda.max_memory_reserved(device)


def _precisions(
    samples: list[Sample], backbone: str, weights: str | None, device: str
) -> Iterator[Finding]:
    """Say what each precision keeps of the features that a tower makes of some pictures."""
    from statistics import mean

    import numpy as np

    from sam3cache.backbone import LEVELS, load_tower
    from sam3cache.features.precision import FEATURE_PRECISIONS, Fidelity, fidelity
    from sam3cache.images import letterbox_image, read_image

    numeric_path: NumericPath = "fp32" if device == "cpu" else "bf16"
    tower = load_tower(
        backbone, weights=weights, levels=tuple(LEVELS), device=device, numeric_path=numeric_path
    )
    found: dict[str, list[Fidelity]] = {}
    for sample in samples:
        square_CHW, _ = letterbox_image(read_image(sample))
        for base, feature_BCHW in tower(square_CHW[None]).items():
            value_CHW = feature_BCHW[0].float().cpu().numpy()
            for precision in FEATURE_PRECISIONS:
                name = base if precision == "float16" else f"{base}.{precision}"
                found.setdefault(name, []).append(fidelity(precision, value_CHW))
    section = (
        f"What is kept of {backbone}'s features ({weights or 'its own weights'}) of "
        f"{len(samples)} pictures, {numeric_path}, {device}"
    )
    for name, kept in found.items():
        if any(one.overflows for one in kept):
            yield Finding(section, name, "overflows: values beyond float16's ±65504")
            continue
        yield Finding(
            section,
            name,
            f"relative L2 error {mean(one.relative_l2 for one in kept):.1e}, cosine at least "
            f"{np.floor(min(one.cosine_min for one in kept) * 1e6) / 1e6:.6f}, on average "
            f"{mean(one.cosine_mean for one in kept):.6f}",
        )


def _pictures_in(folder: Path) -> list[Sample]:
    from sam3cache.images.files import SUFFIXES
    from sam3cache.records import Sample

    if not folder.is_dir():
        raise ConfigError(f"--images {folder} is no folder; give one that holds pictures")
    # Laid out as for extract, masks lie beside images/.
    folder = folder / "images" if (folder / "images").is_dir() else folder
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise ConfigError(
            f"--images {folder} holds no picture ({', '.join(sorted(SUFFIXES))}); give a "
            "folder that does"
        )
    # Spread over the folder, whose neighbours are often alike.
    chosen = files[:: max(1, len(files) // MOST_IMAGES)][:MOST_IMAGES]
    return [Sample(f.stem, f.relative_to(folder).as_posix(), folder) for f in chosen]
