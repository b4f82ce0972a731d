"""Are features from the store as good as features made on the spot? A head's logits, both ways.

A store keeps a value f of the tower as f + δ. To first order a logit z then moves by

    |Δz| ≤ Σᵢ |∂z/∂fᵢ| · |δᵢ|,

with equality only if every rounding pulls the same way, so that real differences are far smaller.
How large |δ| can be depends on what is kept:

- float16: 2⁻¹¹ |f|, half a unit in the last of 11 significant bits, or 2⁻²⁵ where f is subnormal
  (IEEE 754-2019, §3.6 and §4.3);
- bf16: 2⁻⁸ |f|, half a unit in the last of 8;
- r7, r5, int8: a head trained on these gets online, too, what a store would keep. Then both values
  are rounded, and a difference that is next to nothing, of another batch size or device, may send
  them to two neighbours: a whole step apart. A step is at most 2⁻⁷ |f| and 2⁻⁵ |f|, in subnormals
  2⁻²¹ and 2⁻¹⁹. In int8 it is the channel's scale, max |f| / 127; that values and scale are rounded
  to float16, before and after, is at most four times float16's share.

On the bfloat16 path the tower's own values have 8 significant bits, and another batch size or
device may round one the other way: a unit in the last place, 2⁻⁷ |f|, comes on top.

Where the bound holds, a decision by the sign of a logit can differ only where that is below it: two
numbers of different signs are no farther from zero than they are from each other.

Shape legend: C channels, H height, W width, K planes of logits, S side of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam3cache.backbone import NumericPath
from sam3cache.errors import ImageError
from sam3cache.evaluation import serve_as_trained
from sam3cache.features import FeatureStore, Precision, StoredSample
from sam3cache.images import pixel_hash, read_image
from sam3cache.inference.predictor import IMAGE_LEVEL, Predictor, load, precision_of
from sam3cache.loading import CachedSamples
from sam3cache.records import Batch, Sample
from sam3cache.tasks import decide

_OF_PATH: dict[NumericPath, float] = {"fp32": 0.0, "bf16": 2.0**-7, "bf16+compile": 2.0**-7}
_OF_PRECISION: dict[Precision, tuple[float, float]] = {
    "float16": (2.0**-11, 2.0**-25),
    "bf16": (2.0**-8, 0.0),
    "r7": (2.0**-7, 2.0**-21),
    "r5": (2.0**-5, 2.0**-19),
    "int8": (2.0**-9, 2.0**-23),
}
"""What a value moves by at most: as a share of itself, and where it is subnormal."""

_STEP_SHARE = (1 + 2.0**-6) / 127
"""An int8 step as a share of a channel's largest value; two scales may differ by what rounds it."""


@dataclass(frozen=True, slots=True)
class Equivalence:
    """One image's logits from the store against those made online.

    Attributes:
        id: of the sample.
        max_abs_difference: largest difference of a logit.
        relative_error: L2 norm of the differences over that of the logits from the store.
        bound: what rounding can do to the logit that differs most, to first order.
        num_masks_differing: cells, counted by class, that are of a class for one and not for the
            other: by the sign of a logit, or of the task "multiclass" by the highest one.
        num_logits: K * S * S.
    """

    id: str
    max_abs_difference: float
    relative_error: float
    bound: float
    num_masks_differing: int
    num_logits: int

    @property
    def holds(self) -> bool:
        """Whether rounding alone explains the difference."""
        return self.max_abs_difference <= self.bound


def check_equivalence(
    store: FeatureStore,
    checkpoint: str | Path,
    samples: Sequence[StoredSample],
    root: Path,
    *,
    backbone: str | None = None,
    weights: str | Path | None = None,
    head: str | None = None,
    device: str = "cpu",
) -> tuple[Equivalence, ...]:
    """Compare a head's logits on stored features with those on features made from the images.

    Args:
        store: the feature store.
        checkpoint: as for ``load``.
        samples: of the store.
        root: folder that the samples' sources are relative to, which is the manifest's.
        backbone: as for ``load``.
        weights: as for ``load``.
        head: as for ``load``.
        device: where to run.

    Raises:
        FingerprintError: store, checkpoint and tower do not belong together.
        ImageError: an image cannot be read, or is not the one that was extracted.
    """
    predictor = load(checkpoint, backbone=backbone, weights=weights, head=head, device=device)
    serve_as_trained(store, predictor.info)
    cached = CachedSamples(
        store,
        [sample.row for sample in samples],
        tuple(predictor.info.levels),
        device=device,
        residency="stream",
    )
    found = []
    for index, sample in enumerate(samples):
        image = predictor.prepare(_pixels_as_extracted(sample, root))
        angles_deg = (sample.primary_angle_deg, sample.secondary_angle_deg)
        online = predictor.batch([image], [angles_deg])
        found.append(compare(sample.id, predictor, cached.batch([index]), online))
    return tuple(found)


def _pixels_as_extracted(sample: StoredSample, root: Path) -> NDArray[np.uint8]:
    pixels_HWC = read_image(Sample(sample.id, sample.source, root, frame=sample.frame))
    if pixel_hash(pixels_HWC) != sample.pixel_sha256:
        raise ImageError(
            f"{root / sample.source} is not the image whose features are stored (sample "
            f"{sample.id}); run the same `sam3cache extract` again"
        )
    return pixels_HWC


def compare(id_: str, predictor: Predictor, stored: Batch, online: Batch) -> Equivalence:
    """Compare what a predictor's head says of two batches of one image.

    Args:
        id_: of the sample.
        predictor: its head, and how its features were made.
        stored: with features of a store.
        online: with those made on the spot.
    """
    head, info = predictor.head, predictor.info
    features = {
        level: feature.float().requires_grad_()
        for level, feature in online.levels.items()
        if level != IMAGE_LEVEL
    }
    online_KSS: Tensor = head(replace(online, levels={**online.levels, **features}))[0]
    with torch.no_grad():
        stored_KSS: Tensor = head(stored)[0]
        difference_KSS = (stored_KSS - online_KSS).abs()
        worst = int(difference_KSS.argmax())
        differs_CSS = decide(stored_KSS, predictor.task) != decide(online_KSS, predictor.task)
    bound = 0.0
    if features:
        assert predictor.tower is not None
        path = predictor.tower.numeric_path
        gradients = torch.autograd.grad(online_KSS.flatten()[worst], tuple(features.values()))
        bound = sum(
            float((gradient.abs() * rounding(precision_of(entry), path, feature.detach())).sum())
            for gradient, feature, entry in zip(
                gradients,
                features.values(),
                (info.levels[level] for level in features),
                strict=True,
            )
        )
    return Equivalence(
        id=id_,
        max_abs_difference=float(difference_KSS.max()),
        relative_error=float(difference_KSS.norm() / stored_KSS.norm()),
        bound=bound,
        num_masks_differing=int(differs_CSS.sum()),
        num_logits=stored_KSS.numel(),
    )


def rounding(precision: Precision, numeric_path: NumericPath, feature_CHW: Tensor) -> Tensor:
    """Return how far, by rounding alone, a value of a store can be from the same made online.

    Args:
        precision: that the store keeps.
        numeric_path: of the tower.
        feature_CHW: float32, as the head gets it online; further dimensions may stand before C.

    Returns:
        |δ| of each value, float32 of that shape.
    """
    relative, subnormal = _OF_PRECISION[precision]
    limit_CHW = (relative + _OF_PATH[numeric_path]) * feature_CHW.abs() + subnormal
    if precision == "int8":
        limit_CHW = limit_CHW + _STEP_SHARE * feature_CHW.abs().amax(dim=(-2, -1), keepdim=True)
    return limit_CHW
