"""Are features from the store as good as features made on the spot? A head's logits, both ways.

A store keeps float16: a value f of the tower is kept as f + δ with |δ| ≤ 2⁻¹¹ |f|, half a unit in
the last of 11 significant bits, or |δ| ≤ 2⁻²⁵ where f is subnormal (IEEE 754-2019, §3.6 and §4.3).
To first order a logit z then moves by

    |Δz| ≤ Σᵢ |∂z/∂fᵢ| · (2⁻¹¹ |fᵢ| + 2⁻²⁵),

with equality only if every rounding pulls the same way, so that real differences are far smaller.
On the bfloat16 path the tower's own values have 8 significant bits, which float16 keeps; there 2⁻⁸
stands in place of 2⁻¹¹, as another batch size or device may round a value the other way.

A pixel whose mask differs has logits of two signs, so that neither is farther from zero than they
are from each other: where the bound holds, masks can differ only where |logit| is below it.

Shape legend: K mask planes, S side of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam3cache.errors import ImageError
from sam3cache.evaluation import serve_as_trained
from sam3cache.features import FeatureStore, StoredSample
from sam3cache.heads import Head
from sam3cache.images import pixel_hash, read_image
from sam3cache.inference.predictor import IMAGE_LEVEL, load
from sam3cache.loading import CachedSamples
from sam3cache.records import Batch, Sample

_ROUNDING = {"fp32": 2.0**-11, "bf16": 2.0**-8}
_SUBNORMAL = 2.0**-25


@dataclass(frozen=True, slots=True)
class Equivalence:
    """One image's logits from the store against those made online.

    Attributes:
        id: of the sample.
        max_abs_difference: largest difference of a logit.
        relative_error: L2 norm of the differences over that of the logits from the store.
        bound: what rounding can do to the logit that differs most, to first order.
        num_masks_differing: logits whose sign differs, of ``num_logits``.
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
    rounding = _ROUNDING["fp32" if predictor.tower is None else predictor.tower.numeric_path]
    cached = CachedSamples(
        store,
        [sample.row for sample in samples],
        tuple(predictor.info.levels),
        device=device,
        residency="stream",
    )
    return tuple(
        _compare(
            sample.id,
            predictor.head,
            cached.batch([index]),
            predictor.batch(
                _pixels_as_extracted(sample, root),
                sample.primary_angle_deg,
                sample.secondary_angle_deg,
            )[0],
            rounding,
        )
        for index, sample in enumerate(samples)
    )


def _pixels_as_extracted(sample: StoredSample, root: Path) -> NDArray[np.uint8]:
    pixels_HWC = read_image(Sample(sample.id, sample.source, root, frame=sample.frame))
    if pixel_hash(pixels_HWC) != sample.pixel_sha256:
        raise ImageError(
            f"{root / sample.source} is not the image whose features are stored (sample "
            f"{sample.id}); run the same `sam3cache extract` again"
        )
    return pixels_HWC


def _compare(id_: str, head: Head, stored: Batch, online: Batch, rounding: float) -> Equivalence:
    """Compare two batches of one image."""
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
        num_masks_differing = int(((stored_KSS >= 0) != (online_KSS >= 0)).sum())
    bound = 0.0
    if features:
        gradients = torch.autograd.grad(online_KSS.flatten()[worst], tuple(features.values()))
        bound = sum(
            float((gradient.abs() * (rounding * feature.detach().abs() + _SUBNORMAL)).sum())
            for gradient, feature in zip(gradients, features.values(), strict=True)
        )
    return Equivalence(
        id=id_,
        max_abs_difference=float(difference_KSS.max()),
        relative_error=float(difference_KSS.norm() / stored_KSS.norm()),
        bound=bound,
        num_masks_differing=num_masks_differing,
        num_logits=stored_KSS.numel(),
    )
