"""SAM 3's vision tower, a batch at a time: how fast, how near to what the device can do, how true.

Every numeric path of ours and, side by side, the stock ``sam3`` package as its users call it
(autocast to bfloat16, complex rotations, ``forward_image`` with all levels and their position
encodings), the same with bfloat16 weights, and transformers' ``Sam3VisionModel``. All compute all
levels of the same pictures with weights of the same shapes. Each takes the batch at which it is
fastest; then they run by turns. So does a program of matrix products alone, over the linear layers'
own shapes: its rate, in the path's own arithmetic, is what the device can do.

The full size, with random weights, is measured on a GPU; elsewhere sam3-mini, unless --full is
given (8 GB, a quarter of an hour on two cores).

Exits with 1 when a bound is missed, level by level against ``sam3`` in float32:

- fp32 has a relative error of at most FP32_ERROR;
- the bf16 paths have one of at most BF16_ERROR, and 1 - cosine of at most BF16_ANGLE;

and at full size, of our fastest path (with --quick unchecked):

- on a GPU, it reaches MATRIX_SHARE of the matrix rate and GPU_RATIO times the stock package;
- on a CPU, bf16 is CPU_RATIO times as fast as the stock package in float32.
"""

from __future__ import annotations

import argparse
import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from reporting import Bound, Machine, Report, alternate, rate, significant
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sam3cache.backbone import BACKBONES, LEVELS, NumericPath, Tower, TowerSpec, load_tower
from sam3cache.backbone.tower import tf32
from sam3cache.runtime import pick_device

NECK_LEVELS = ("fpn_288", "fpn_144", "fpn_72")
ALL_LEVELS = ("trunk_72", *NECK_LEVELS)
FP32, AUTOCAST = "sam3, fp32", "sam3, autocast to bf16"

FP32_ERROR = 2e-5
BF16_ERROR = 0.02
BF16_ANGLE = 5e-4
MATRIX_SHARE = 0.6
GPU_RATIO = 3.0
CPU_RATIO = 1.8

ROUND_S = 0.5  # a contestant's turn lasts about this long, if not a single call of its does


@dataclass
class Contestant:
    """One way of running the tower.

    Attributes:
        name: its row in the table.
        run: maps uint8 (B, 3, size, size) on the device to features by level.
        dtype: of its matrix products.
        weight_bytes: what it holds between calls.
        path: ours, else None.
        batch_size: at which it is fastest.
        call_s: how long such a batch takes, roughly.
        peak_bytes: by batch size, its weights and what a call takes beside them.
        errors: by level, relative error and cosine against sam3 in float32.
    """

    name: str
    run: Callable[[Tensor], Mapping[str, Tensor]]
    dtype: torch.dtype
    weight_bytes: int
    path: NumericPath | None = None
    batch_size: int = 1
    call_s: float = 0.0
    peak_bytes: dict[int, int] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse_options(arguments)
    machine = Machine(options.device)
    spec = BACKBONES["sam3" if options.full else "sam3-mini"]
    contestants = list(enter(spec, options))
    image = torch.randint(
        0,
        256,
        (max(options.batch_sizes), 3, spec.size_px, spec.size_px),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    ).to(options.device)

    compare(contestants, image[:1])
    for contestant in contestants:
        print(f"Warming up {contestant.name}", flush=True)
        choose_batch(contestant, image, options)
    products = {
        dtype: MatrixProducts(spec, dtype, options.device, size)
        for dtype, size in {c.dtype: c.batch_size for c in contestants if c.path}.items()
    }
    print("By turns", flush=True)
    seconds = take_turns(contestants, products, image, options)
    return report(options, machine, spec, contestants, products, seconds).publish(options.json)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="sam3-mini, an image at a time")
    parser.add_argument("--full", action="store_true", help="SAM 3's own size on a CPU as well")
    parser.add_argument(
        "--compile", action="store_true", help="compiled paths on a CPU as well: slow to begin"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, or a CUDA device [auto]")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result; a folder names it itself"
    )
    options = parser.parse_args(arguments)
    options.device = pick_device(options.device)
    options.on_gpu = options.device != "cpu"
    options.full |= options.on_gpu and not options.quick
    options.compile |= options.on_gpu
    options.rounds = 2 if options.quick else (9 if options.on_gpu else 3)
    if options.quick or (options.full and not options.on_gpu):
        options.batch_sizes = (1,)
    elif options.on_gpu:
        options.batch_sizes = (1, 2, 4, 8, 16)
    else:
        # A batch is no faster there than its images one by one, but takes more memory.
        options.batch_sizes = (1, 2)
    return options


def enter(spec: TowerSpec, options: argparse.Namespace) -> Iterator[Contestant]:
    """Build every contestant, with the same weights where it can take them."""
    print(f"Building {spec.name}", flush=True)
    device = options.device
    paths: list[NumericPath] = ["fp32", "bf16", *(["bf16+compile"] if options.compile else [])]
    weights = None if spec.packaged_file else "random"
    towers = {
        path: load_tower(spec, weights=weights, levels=ALL_LEVELS, device=device, numeric_path=path)
        for path in paths
    }

    stock = build_stock(towers["fp32"])
    run = stock_runner(stock, partial(tf32, False))
    yield Contestant(FP32, run, torch.float32, num_bytes(stock))
    autocast = partial(torch.autocast, torch.device(device).type, dtype=torch.bfloat16)
    yield Contestant(AUTOCAST, stock_runner(stock, autocast), torch.bfloat16, num_bytes(stock))
    if options.compile:
        compiled = copy.deepcopy(stock)
        # As its compile=True does, but that a graph may break: at its complex rotations.
        trunk: Any = compiled.vision_backbone.trunk
        trunk.forward = torch.compile(trunk.forward)
        run = stock_runner(compiled, autocast)
        yield Contestant(f"{AUTOCAST}, compiled", run, torch.bfloat16, num_bytes(stock))
    rounded = copy.deepcopy(stock).bfloat16()
    run = stock_runner(rounded, nullcontext, torch.bfloat16)
    yield Contestant("sam3, bf16 weights", run, torch.bfloat16, num_bytes(rounded))
    theirs = build_transformers(spec, device)
    run = transformers_runner(theirs, spec)
    yield Contestant("transformers, bf16 weights", run, torch.bfloat16, num_bytes(theirs))
    if options.compile:
        run = transformers_runner(torch.compile(theirs), spec)
        name = "transformers, bf16 weights, compiled"
        yield Contestant(name, run, torch.bfloat16, num_bytes(theirs))
    for path, tower in towers.items():
        dtype = next(tower.parameters()).dtype
        yield Contestant(f"sam3cache, {path}", tower, dtype, num_bytes(tower), path)
    if options.on_gpu:
        name, tower = "sam3cache, bf16, attention by cuDNN", towers["bf16"]
        yield Contestant(name, by_cudnn(tower), torch.bfloat16, num_bytes(tower), "bf16")


def build_stock(tower: Tower) -> nn.Module:
    """Return ``sam3``'s own backbone on a tower's weights, which both hold together."""
    from sam3.model.position_encoding import PositionEmbeddingSine
    from sam3.model.vl_combiner import SAM3VLBackbone

    from sam3cache.backbone.sam3_modules import build_stock_neck

    positions = PositionEmbeddingSine(num_pos_feats=tower.spec.neck_dim, normalize=True)
    neck = build_stock_neck(tower.spec, positions, (4.0, 2.0, 1.0, 0.5))
    state = {f"trunk.{name}": value for name, value in tower.trunk.state_dict().items()}
    for level in NECK_LEVELS:
        for name, value in tower.necks[level].state_dict().items():
            state[f"convs.{LEVELS[level].neck_index}.{name}"] = value
            if level == "fpn_72":  # of the same shapes as the level that nothing reads
                state[f"convs.3.{name}"] = value
    neck.load_state_dict(state, strict=False, assign=True)
    for block in neck.trunk.blocks:
        block.attn._setup_rope_freqs()
    device = next(tower.parameters()).device
    return SAM3VLBackbone(visual=neck, text=None, scalp=1).eval().to(device).requires_grad_(False)


def stock_runner(
    backbone: Any,
    context: Callable[[], AbstractContextManager[object]],
    dtype: torch.dtype = torch.float32,
) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """Return a call of ``sam3``'s backbone as its image model makes it."""
    seen: dict[str, Tensor] = {}

    def see(module: nn.Module, inputs: object, outputs: Sequence[Tensor]) -> None:
        seen["trunk_72"] = outputs[-1]

    backbone.vision_backbone.trunk.register_forward_hook(see)

    @torch.inference_mode()
    def run(image_BCHW: Tensor) -> Mapping[str, Tensor]:
        with context():
            output = backbone.forward_image(normalize(image_BCHW).to(dtype))
        return {**dict(zip(NECK_LEVELS, output["backbone_fpn"], strict=True)), **seen}

    return run


def build_transformers(spec: TowerSpec, device: str) -> nn.Module:
    """Return transformers' own tower, with its own random weights."""
    from transformers import Sam3VisionConfig, Sam3VisionModel, Sam3ViTConfig

    config = Sam3VisionConfig(
        backbone_config=Sam3ViTConfig(
            hidden_size=spec.embed_dim,
            intermediate_size=int(spec.embed_dim * spec.mlp_ratio),
            num_hidden_layers=spec.depth,
            num_attention_heads=spec.num_heads,
            image_size=spec.size_px,
            patch_size=spec.patch_px,
            window_size=spec.window,
            global_attn_indexes=list(spec.global_blocks),
            pretrain_image_size=spec.pretrain_size_px,
        ),
        fpn_hidden_size=spec.neck_dim,
    )
    with torch.device(device):
        model = Sam3VisionModel(config)
    return model.eval().to(torch.bfloat16).requires_grad_(False)


def transformers_runner(
    model: Callable[[Tensor], Any], spec: TowerSpec
) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """Return a call of transformers' model."""

    @torch.inference_mode()
    def run(image_BCHW: Tensor) -> Mapping[str, Tensor]:
        output = model(normalize(image_BCHW).to(torch.bfloat16))
        return dict(zip(NECK_LEVELS, output.fpn_hidden_states, strict=False))

    return run


def by_cudnn(tower: Tower) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """Return a tower whose attention is cuDNN's where that can do it."""

    def run(image_BCHW: Tensor) -> Mapping[str, Tensor]:
        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        with sdpa_kernel(backends, set_priority=True):
            return tower(image_BCHW)

    return run


def normalize(image_BCHW: Tensor) -> Tensor:
    """Scale pixels as SAM 3's image processor does."""
    return image_BCHW.float().div_(255).sub_(0.5).div_(0.5)


def num_bytes(module: nn.Module) -> int:
    """Return what a module's weights take."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def compare(contestants: Sequence[Contestant], image_BCHW: Tensor) -> None:
    """Find, level by level, how far each of our paths is from ``sam3`` in float32."""
    stock = next(c for c in contestants if c.name == FP32)
    exact = dict(stock.run(image_BCHW))
    for contestant in contestants:
        if contestant.path is None and contestant.name != AUTOCAST:
            continue
        for level, value in contestant.run(image_BCHW).items():
            if level in exact:
                contestant.errors[level] = difference(value, exact[level])


def difference(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return relative L2 error and cosine of two tensors, in double precision."""
    a, b = value.double().flatten(), exact.double().flatten()
    return float((a - b).norm() / b.norm()), float(a @ b / (a.norm() * b.norm()))


def choose_batch(contestant: Contestant, image: Tensor, options: argparse.Namespace) -> None:
    """Find at which batch size a contestant is fastest, and what memory each size takes."""
    best_rate = 0.0
    for size in options.batch_sizes:
        with peak_memory(options.device) as peak:
            contestant.run(image[:size])
            wait(options.device)
        contestant.peak_bytes[size] = contestant.weight_bytes + peak[0]
        started_s = time.perf_counter()
        contestant.run(image[:size])
        wait(options.device)
        call_s = time.perf_counter() - started_s
        if size / call_s > best_rate:
            best_rate = size / call_s
            contestant.batch_size, contestant.call_s = size, call_s


@contextmanager
def peak_memory(device: str) -> Iterator[list[int]]:
    """Yield a list that holds, afterwards, the bytes that were taken at most meanwhile."""
    peak: list[int] = []
    if device != "cpu":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    sampled = [before]

    def sample() -> None:
        while not done.wait(0.005):
            sampled.append(process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
    peak.append(max(sampled) - before)


class MatrixProducts:
    """A block's linear layers, on random numbers: what the device can do in their shapes.

    Attributes:
        flop: of one call.
    """

    def __init__(self, spec: TowerSpec, dtype: torch.dtype, device: str, batch_size: int) -> None:
        num_tokens = batch_size * (spec.size_px // spec.patch_px) ** 2
        self._layers = []
        self.flop = 0
        for num_in, num_out in linear_shapes(spec):
            x, weight, bias = (
                torch.randn(shape, device=device).to(dtype)
                for shape in ((num_tokens, num_in), (num_out, num_in), (num_out,))
            )
            self._layers.append((x, weight, bias))
            self.flop += 2 * num_tokens * num_in * num_out

    @torch.inference_mode()
    def __call__(self) -> None:
        """Compute each once."""
        with tf32(False):
            for x, weight, bias in self._layers:
                F.linear(x, weight, bias)


def linear_shapes(spec: TowerSpec) -> list[tuple[int, int]]:
    """Return the channels in and out of a block's linear layers."""
    dim, hidden = spec.embed_dim, int(spec.embed_dim * spec.mlp_ratio)
    return [(dim, 3 * dim), (dim, dim), (dim, hidden), (hidden, dim)]


def tower_flop(spec: TowerSpec, levels: Sequence[str]) -> int:
    """Count the work of an image: two for each product of matrices and convolutions."""
    dim, out = spec.embed_dim, spec.neck_dim
    num_tokens = (spec.size_px // spec.patch_px) ** 2
    num_global = len(spec.global_blocks)
    attended = num_global * num_tokens + (spec.depth - num_global) * spec.window**2
    # By level, products a token: transposed convolutions of 2 x 2 each make four of one.
    neck = {
        "trunk_72": 0,
        "fpn_72": dim * out + 9 * out * out,
        "fpn_144": 4 * (dim * dim // 2 + dim // 2 * out + 9 * out * out),
        "fpn_288": 4 * dim * dim // 2 + 16 * (dim // 2 * dim // 4 + dim // 4 * out + 9 * out * out),
    }
    products = (
        3 * spec.patch_px**2 * dim
        + spec.depth * sum(num_in * num_out for num_in, num_out in linear_shapes(spec))
        + 2 * dim * attended
        + sum(neck[level] for level in levels)
    )
    return 2 * num_tokens * products


def wait(device: str) -> None:
    """Let the device finish."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def take_turns(
    contestants: Sequence[Contestant],
    products: Mapping[torch.dtype, MatrixProducts],
    image: Tensor,
    options: argparse.Namespace,
) -> dict[str, list[float]]:
    """Return seconds of a call, by contestant (matrix products by their dtype) and round."""
    calls: dict[str, Callable[[], object]] = {
        c.name: lambda c=c: c.run(image[: c.batch_size])  # type: ignore[misc]
        for c in contestants
    }
    calls |= {str(dtype): program for dtype, program in products.items()}
    repeats = dict.fromkeys(calls, 100 if options.on_gpu else 4)
    repeats |= {c.name: max(1, round(ROUND_S / c.call_s)) for c in contestants}

    def turn(name: str) -> None:
        for _ in range(repeats[name]):
            calls[name]()
        wait(options.device)

    seconds = alternate(options.rounds, {name: lambda name=name: turn(name) for name in calls})
    return {name: [s / repeats[name] for s in times] for name, times in seconds.items()}


def report(
    options: argparse.Namespace,
    machine: Machine,
    spec: TowerSpec,
    contestants: Sequence[Contestant],
    products: Mapping[torch.dtype, MatrixProducts],
    seconds: Mapping[str, Sequence[float]],
) -> Report:
    """Lay out what was found, and check the bounds."""
    flop = tower_flop(spec, NECK_LEVELS)
    images_per_s = {c.name: rate(seconds[c.name], c.batch_size) for c in contestants}
    limits = {
        dtype: program.flop / median(seconds[str(dtype)]) for dtype, program in products.items()
    }
    rows = []
    for c in contestants:
        flop_per_s = images_per_s[c.name] * flop
        errors = [error for error, _ in c.errors.values()]
        cosines = [cosine for _, cosine in c.errors.values()]
        rows.append(
            [
                c.name,
                str(c.batch_size),
                significant(images_per_s[c.name]),
                significant(flop_per_s / 1e12),
                f"{flop_per_s / limits[c.dtype]:.0%}",
                f"{images_per_s[c.name] / images_per_s[AUTOCAST]:.2f} ×",
                f"{c.peak_bytes[c.batch_size] / 1e9:.1f} GB",
                f"{max(errors):.1e}" if errors else "",
                f"{max(0.0, 1 - min(cosines)):.1e}" if errors else "",
            ]
        )
    rates = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {significant(limit / 1e12)} TFLOP/s"
        for dtype, limit in limits.items()
    )
    ours = [c for c in contestants if c.path is not None]
    notes = [
        f"{spec.name}, {flop / 1e12:.3g} TFLOP an image: all three neck levels, each contestant at "
        f"its fastest batch of {', '.join(map(str, options.batch_sizes))}, medians of "
        f"{options.rounds} turns. Of the matrix rate: of what the linear layers' products alone "
        f"reach in the same arithmetic ({rates}).",
        "Errors and cosines are of the level that is worst, the trunk's too, against `sam3` in "
        "float32, over all values of an image of noise; of our paths by level: "
        + "; ".join(f"{c.path} " + in_words(c.errors) for c in ours if c.name.endswith(str(c.path)))
        + ".",
        "Memory is the weights' and what a call takes beside them"
        + (", as seen every 5 ms" if not options.on_gpu else "")
        + "; of our paths by batch: "
        + "; ".join(
            f"{c.path} "
            + ", ".join(f"{size}: {peak / 1e9:.1f} GB" for size, peak in c.peak_bytes.items())
            for c in ours
            if c.name.endswith(str(c.path))
        )
        + ".",
    ]
    figures = {
        "images_per_s": images_per_s,
        "s_per_call": seconds,
        "batch_size": {c.name: c.batch_size for c in contestants},
        "peak_bytes": {c.name: c.peak_bytes for c in contestants},
        "errors": {c.name: c.errors for c in contestants if c.errors},
        "matrix_flop_per_s": {str(dtype): limit for dtype, limit in limits.items()},
        "flop_per_image": {level: tower_flop(spec, (level,)) for level in ALL_LEVELS},
    }
    return Report(
        program="tower",
        columns=(
            "what",
            "batch",
            "images/s",
            "TFLOP/s",
            "of the matrix rate",
            "against sam3's users",
            "peak memory",
            "relative error",
            "1 − cosine",
        ),
        rows=rows,
        notes=notes,
        bounds=[*bounds_of_errors(ours), *bounds_of_speed(options, flop, images_per_s, limits)],
        figures=figures,
        settings={
            "backbone": spec.name,
            "quick": options.quick,
            "compile": options.compile,
            "rounds": options.rounds,
            "batch_sizes": options.batch_sizes,
        },
        machine=machine.fields(),
    )


def in_words(errors: Mapping[str, tuple[float, float]]) -> str:
    """Write errors and cosines, level by level."""
    return ", ".join(
        f"{level} {error:.1e} ({max(0.0, 1 - cosine):.1e})"
        for level, (error, cosine) in errors.items()
    )


def bounds_of_errors(ours: Sequence[Contestant]) -> list[Bound]:
    """Check what our paths may differ by from ``sam3`` in float32."""
    bounds = []
    for c in ours:
        error = max(error for error, _ in c.errors.values())
        cosine = min(cosine for _, cosine in c.errors.values())
        limit = FP32_ERROR if c.path == "fp32" else BF16_ERROR
        bounds.append(Bound(f"{c.name}: relative error at most {limit}", error, error <= limit))
        if c.path != "fp32":
            claim = f"{c.name}: 1 - cosine at most {BF16_ANGLE}"
            bounds.append(Bound(claim, 1 - cosine, 1 - cosine <= BF16_ANGLE))
    return bounds


def bounds_of_speed(
    options: argparse.Namespace,
    flop: int,
    images_per_s: Mapping[str, float],
    limits: Mapping[torch.dtype, float],
) -> list[Bound]:
    """Check what is claimed at full size."""
    if not options.full or options.quick:
        return []
    if not options.on_gpu:
        ratio = images_per_s["sam3cache, bf16"] / images_per_s[FP32]
        claim = f"bf16 at least {CPU_RATIO} times as fast as sam3 in float32"
        return [Bound(claim, ratio, ratio >= CPU_RATIO)]
    # Of the paths that extraction offers: attention by cuDNN is measured, and is none.
    fastest = max(images_per_s[f"sam3cache, {path}"] for path in ("bf16", "bf16+compile"))
    share = fastest * flop / limits[torch.bfloat16]
    ratio = fastest / images_per_s[AUTOCAST]
    return [
        Bound(f"at least {MATRIX_SHARE:.0%} of the matrix rate", share, share >= MATRIX_SHARE),
        Bound(f"at least {GPU_RATIO} times sam3 as called", ratio, ratio >= GPU_RATIO),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
