"""How the weights of ``sam3-mini`` that ship with the package were made: from drawn angiograms.

SAM 3's own classes in small learn, supervised, to mark the vessels of phantoms from single tokens:
a 1 x 1 convolution with a pixel shuffle, thrown away afterwards, reads the mask of a token's own
14 x 14 pixels (halved to 7 x 7) out of its 256 channels, and another which branches cross it. What
the tokens know, they have to know themselves.

Three stages, for the sake of two CPU cores, where attention over all 5184 tokens takes most of a
step:

1. windows: the picture's nine windows of 24 x 24 tokens by themselves, so that global attention
   spans one window;
2. whole pictures, as the tower will see them;
3. the trunk frozen, the necks of the finer levels on windows alone.

The seeds of the phantoms are this program's own: no test, demo or benchmark may use them, or they
would measure the miniature on pictures that it has learned. Run it as

    python recipes/sam3_mini.py --output sam3cache/backbone

It takes under 30 minutes on two cores, most of it stages 1 and 2, and writes the weights
(safetensors, float16) and beside them a JSON file with recipe, hash and figures. Another machine
gives other last bits, hence other weights of the same quality.

Shape legend: N pictures, B batch, C channels, S side in pixels, T side of a target, K branches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from sam3cache.backbone import Tower, load_tower
from sam3cache.geometry import Letterbox
from sam3cache.images import letterbox_image, read_image, read_manifest, read_mask
from sam3cache.images.phantom import make_phantoms
from sam3cache.images.phantom.anatomy import BRANCHES
from sam3cache.metrics import dice_iou_precision_recall
from sam3cache.runtime import cpu_name, environment_fields, num_cpu_cores, write_atomic
from sam3cache.training import dice_bce_loss

SEEDS = (86_300_101, 86_300_102)
"""Of the phantoms learned from: two sets, drawn at the same time."""

HELD_OUT_SEED = 86_300_103
"""Of the phantoms that the figures are of."""

NAME = "sam3_mini"
MAX_MINUTES = 30
TOKENS, WINDOW, PATCH_PX = 72, 24, 14
FINE = 7  # a token's own mask has 7 x 7 cells of 2 px
TARGET = TOKENS * FINE


@dataclass(frozen=True)
class Recipe:
    """What decides the weights.

    Attributes:
        num_pictures: phantoms of each seed in ``SEEDS``.
        num_held_out: phantoms of ``HELD_OUT_SEED``.
        window_steps: steps of stage 1, of two pictures.
        whole_steps: steps of stage 2, of two pictures.
        neck_steps: steps of stage 3, of two windows.
        learning_rate: highest, of AdamW.
        branch_weight: of the loss on branches beside that on masks.
    """

    num_pictures: int = 320
    num_held_out: int = 48
    window_steps: int = 800
    whole_steps: int = 300
    neck_steps: int = 60
    learning_rate: float = 1e-3
    branch_weight: float = 0.3


QUICK = Recipe(num_pictures=6, num_held_out=4, window_steps=6, whole_steps=3, neck_steps=3)


@dataclass(frozen=True)
class Pictures:
    """Phantoms as the tower sees them.

    Attributes:
        square_N1SS: uint8.
        mask_N1TT: uint8, 0 / 1, T = ``TARGET``.
        branch_NKtt: bool, whether a branch crosses a token, t = ``TOKENS``.
        native_mask: by picture, uint8 (1, H, W) on the mask's own grid.
    """

    square_N1SS: Tensor
    mask_N1TT: Tensor
    branch_NKtt: Tensor
    native_mask: list[Tensor]


class Probe(nn.Module):
    """The throw-away decoder: each token speaks for its own pixels."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.mask = nn.Conv2d(num_channels, FINE**2, 1)
        self.branch = nn.Conv2d(num_channels, len(BRANCHES), 1)
        # Vessels are rare: begin with few of them.
        for layer in (self.mask, self.branch):
            nn.init.constant_(layer.bias, -3.0)

    def forward(self, feature_BCtt: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of the mask (B, 1, 7 t, 7 t) and of the branches (B, K, t, t)."""
        return F.pixel_shuffle(self.mask(feature_BCtt), FINE), self.branch(feature_BCtt)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write, and return the exit status."""
    options = parse_options(arguments)
    recipe = QUICK if options.quick else Recipe()
    started_s = time.monotonic()
    torch.manual_seed(0)
    learn, held_out = draw(recipe)
    tower = load_tower(
        "sam3-mini", weights="random", levels=("trunk_72", "fpn_72", "fpn_144", "fpn_288")
    )
    probe = train_tokens(tower, learn, recipe)
    train_finer_necks(tower, learn, recipe)
    elapsed_min = (time.monotonic() - started_s) / 60

    options.output.mkdir(parents=True, exist_ok=True)
    weights = options.output / f"{NAME}.safetensors"
    write_atomic(weights, save(packed(tower)))
    shipped = load_tower("sam3-mini", weights=weights)
    dice = [round(value, 4) for value in held_out_dice(shipped, probe, held_out)]
    mean_dice = round(sum(dice) / len(dice), 4)
    record = {
        "what": "weights of sam3-mini, trained on artificial angiograms: no patient's picture, and "
        "nothing of SAM 3's released weights, is in them",
        "made_by": "recipes/sam3_mini.py",
        "licence": "Apache-2.0",
        "recipe": vars(recipe) | {"seeds": SEEDS, "held_out_seed": HELD_OUT_SEED},
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "weights_sha256": shipped.weights_sha256,
        "figures": {
            "mean_dice": mean_dice,
            "dice": dice,
            "of": f"{len(dice)} phantoms of seed {HELD_OUT_SEED}, from fpn_72's tokens alone by "
            "the throw-away decoder, on the mask's own grid",
            "training_min": round(elapsed_min, 1),
        },
        "machine": {"cpu": cpu_name(), "num_cores": num_cpu_cores()},
        "versions": {
            name: version for name, version in environment_fields().items() if name != "platform"
        },
    }
    text = json.dumps(record, indent=2) + "\n"
    write_atomic(options.output / f"{NAME}.json", text.encode())
    size_mb = weights.stat().st_size / 1e6
    print(f"{weights}: {size_mb:.1f} MB, in {elapsed_min:.1f} min")
    print(f"Dice {mean_dice:.3f} on {len(dice)} held-out phantoms, from single tokens")
    if elapsed_min > MAX_MINUTES:
        print(f"MISSED: at most {MAX_MINUTES} minutes")
        return 1
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="where the two files go"
    )
    return parser.parse_args(arguments)


def draw(recipe: Recipe) -> tuple[Pictures, Pictures]:
    """Draw the phantoms to learn from, and those to measure on."""
    with (
        tempfile.TemporaryDirectory(prefix="sam3-mini-") as folder,
        ProcessPoolExecutor(len(SEEDS), mp_context=get_context("spawn")) as pool,
    ):
        numbers = [recipe.num_pictures] * len(SEEDS) + [recipe.num_held_out]
        sets = [Path(folder) / str(seed) for seed in (*SEEDS, HELD_OUT_SEED)]
        print(f"Drawing {sum(numbers)} phantoms", flush=True)
        manifests = list(pool.map(make_phantoms, sets, numbers, (*SEEDS, HELD_OUT_SEED)))
        return read_pictures(manifests[:-1]), read_pictures(manifests[-1:])


def read_pictures(manifests: Sequence[Path]) -> Pictures:
    """Read phantoms, as extraction reads any image."""
    squares, masks, branches, native = [], [], [], []
    samples = [sample for path in manifests for sample in read_manifest(path).samples]
    for sample in track(samples, "Reading"):
        square_1SS, letterbox = letterbox_image(read_image(sample))
        mask_HW = read_mask(sample)
        assert mask_HW is not None
        mask_1HW = torch.from_numpy(mask_HW)
        with Image.open(sample.root / sample.extra["branches"]) as file:
            branch_HW = torch.from_numpy(np.array(file))
        squares.append(square_1SS)
        masks.append(letterbox.mask_to_target(mask_1HW, TARGET))
        branches.append(branch_cells(branch_HW))
        native.append(mask_1HW)
    return Pictures(torch.stack(squares), torch.stack(masks), torch.stack(branches), native)


def branch_cells(branch_HW: Tensor) -> Tensor:
    """Return, by branch and token, whether the one crosses the other: bool (K, t, t)."""
    numbers_K11 = torch.arange(1, len(BRANCHES) + 1)[:, None, None]
    here_KHW = (branch_HW == numbers_K11).float()
    return F.adaptive_max_pool2d(here_KHW, TOKENS).bool()


def train_tokens(tower: Tower, pictures: Pictures, recipe: Recipe) -> Probe:
    """Train trunk and ``fpn_72``: first on windows by themselves, then on whole pictures."""
    tower.trunk.requires_grad_(True)
    neck = tower.necks["fpn_72"].requires_grad_(True)
    probe = Probe(tower.spec.neck_dim)
    parameters = [*tower.trunk.parameters(), *neck.parameters(), *probe.parameters()]
    schedule = Schedule(parameters, recipe.window_steps + recipe.whole_steps, recipe.learning_rate)

    def step(indices: Tensor, *, by_window: bool) -> float:
        square_B1SS = vary(pictures.square_N1SS[indices].float() / 255)
        x_BCSS = (square_B1SS * 2 - 1).expand(-1, 3, -1, -1)
        if by_window:
            with windows_alone(tower):
                feature_BCtt = join(neck(tower.trunk(split(x_BCSS, WINDOW * PATCH_PX))[-1]))
        else:
            feature_BCtt = neck(tower.trunk(x_BCSS)[-1])
        mask_logits, branch_logits = probe(feature_BCtt)
        loss = dice_bce_loss(mask_logits, pictures.mask_N1TT[indices])
        loss = loss + recipe.branch_weight * F.binary_cross_entropy_with_logits(
            branch_logits, pictures.branch_NKtt[indices].float()
        )
        return schedule.step(loss)

    order = draw_pairs(len(pictures.square_N1SS))
    smooth = None
    for number in track(range(schedule.num_steps), "Training tokens"):
        loss = step(next(order), by_window=number < recipe.window_steps)
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        if number % 50 == 49:
            print(f"step {number + 1}: loss {smooth:.3f}", flush=True)
    tower.requires_grad_(False)
    return probe


def train_finer_necks(tower: Tower, pictures: Pictures, recipe: Recipe) -> None:
    """Train ``fpn_144`` and ``fpn_288`` on windows of the finished trunk's tokens."""
    necks = {name: tower.necks[name].requires_grad_(True) for name in ("fpn_144", "fpn_288")}
    # Two cells a side of each, as many pixels of the target as a plain convolution would see.
    readers = nn.ModuleDict({name: nn.Conv2d(tower.spec.neck_dim, 4, 1) for name in necks})
    parameters = [*readers.parameters(), *(p for neck in necks.values() for p in neck.parameters())]
    schedule = Schedule(parameters, recipe.neck_steps, recipe.learning_rate)
    order = draw_pairs(len(pictures.square_N1SS))
    for _ in track(range(schedule.num_steps), "Training finer necks"):
        indices = next(order)
        token_BCtt = tower(pictures.square_N1SS[indices])["trunk_72"]
        mask_B1TT = pictures.mask_N1TT[indices]
        # The window with the most vessels: an empty one teaches little.
        window_BCww, target_B1ww = [], []
        for token_CTT, mask_1TT in zip(token_BCtt, mask_B1TT, strict=True):
            parts_91ww = split(mask_1TT[None], WINDOW * FINE)
            best = int(parts_91ww.sum(dim=(1, 2, 3)).argmax())
            window_BCww.append(split(token_CTT[None], WINDOW)[best])
            target_B1ww.append(parts_91ww[best])
        loss = torch.zeros(())
        for name, neck in necks.items():
            feature_BCww = neck(torch.stack(window_BCww))
            logits = F.pixel_shuffle(readers[name](feature_BCww), 2)
            loss = loss + dice_bce_loss(logits, torch.stack(target_B1ww))
        schedule.step(loss)
    tower.requires_grad_(False)


class Schedule:
    """AdamW whose rate rises over a twentieth of the steps and falls as a cosine."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], num_steps: int, learning_rate: float
    ) -> None:
        self.num_steps = num_steps
        self._parameters = parameters
        self._optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.02)
        self._rate = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, learning_rate, total_steps=num_steps + 1, pct_start=0.05
        )

    def step(self, loss: Tensor) -> float:
        """Follow the gradient of a loss, and return the loss."""
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._rate.step()
        return loss.item()


def draw_pairs(num_pictures: int) -> Iterator[Tensor]:
    """Give indices of two pictures at a time, in a new order each time all have been given."""
    while True:
        yield from torch.randperm(num_pictures).split(2)


def vary(square_B1SS: Tensor) -> Tensor:
    """Vary gamma, contrast and brightness of pictures in [0, 1], by picture."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(square_B1SS), 1, 1, 1)

    varied = square_B1SS ** uniform(0.7, 1.4) * uniform(0.75, 1.0) + uniform(0.0, 0.2)
    return torch.where(square_B1SS > 0, varied, 0.0).clamp(max=1.0)


def split(x_BCSS: Tensor, side: int) -> Tensor:
    """Cut squares into windows: (B, C, n s, n s) to (B n n, C, s, s)."""
    num_channels, num = x_BCSS.shape[1], x_BCSS.shape[-1] // side
    x = x_BCSS.unflatten(-1, (num, side)).unflatten(-3, (num, side))
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, num_channels, side, side)


def join(window_BCss: Tensor) -> Tensor:
    """Undo ``split`` of tokens: (B n n, C, s, s) to (B, C, n s, n s)."""
    side = window_BCss.shape[-1]
    num = TOKENS // side
    x = window_BCss.unflatten(0, (-1, num, num)).permute(0, 3, 1, 4, 2, 5)
    return x.flatten(4, 5).flatten(2, 3)


@contextmanager
def windows_alone(tower: Tower) -> Iterator[None]:
    """Let the global blocks take windows by themselves: rotations of the first window's tokens.

    Rotary encodings only tell differences of positions, which are the same in every window.
    """
    attentions = [block.attn for block in tower.trunk.blocks if block.window_size == 0]
    whole = [attention.rotation_LP2 for attention in attentions]
    for attention, rotation_LP2 in zip(attentions, whole, strict=True):
        grid = rotation_LP2.unflatten(0, (TOKENS, TOKENS))
        attention.rotation_LP2 = grid[:WINDOW, :WINDOW].flatten(0, 1)
    yield
    for attention, rotation_LP2 in zip(attentions, whole, strict=True):
        attention.rotation_LP2 = rotation_LP2


def packed(tower: Tower) -> dict[str, Tensor]:
    """Return the weights as a file of the ``sam3`` package has them, in float16."""
    convs = {"fpn_288": 0, "fpn_144": 1, "fpn_72": 2}
    state = {f"trunk.{name}": tensor for name, tensor in tower.trunk.state_dict().items()}
    for level, neck in tower.necks.items():
        state |= {f"convs.{convs[level]}.{k}": v for k, v in neck.state_dict().items()}
    return {name: tensor.half().contiguous() for name, tensor in state.items()}


@torch.no_grad()
def held_out_dice(tower: Tower, probe: Probe, pictures: Pictures) -> list[float]:
    """Return Dice of each picture, on its mask's own grid, from the tokens alone."""
    dice = []
    for index in track(range(len(pictures.native_mask)), "Measuring"):
        logits_1TT = probe(tower(pictures.square_N1SS[index : index + 1])["fpn_72"])[0][0]
        mask_1HW = pictures.native_mask[index]
        height_px, width_px = mask_1HW.shape[-2:]
        box = Letterbox.fit(height_px, width_px)
        predicted_HW = box.logits_to_grid(logits_1TT, height_px, width_px)[0] >= 0
        score = dice_iou_precision_recall(predicted_HW, mask_1HW[0]).dice
        assert score is not None
        dice.append(score)
    return dice


if __name__ == "__main__":
    raise SystemExit(main())
