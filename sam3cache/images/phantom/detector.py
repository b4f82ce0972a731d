"""From line integrals to the grey picture of an X-ray system.

Lengths in pixels are meant for a picture of 512 × 512 and scale with its size.

Shape legend: H image height, W image width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sam3cache.images.phantom.projection import Array

DESIGN_SIZE_PX = 512


def draw_collimator(size_px: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Where the field is open, (H, W): a circle cut by a rectangle."""
    radius_px = size_px * rng.uniform(0.50, 0.62)
    left, right, top, bottom = size_px * rng.uniform(0.0, 0.05, 4)
    place = np.arange(size_px, dtype=np.float64)
    x_1W, y_H1 = place[None, :], place[:, None]
    circle_HW = np.hypot(x_1W - size_px / 2, y_H1 - size_px / 2) <= radius_px
    inside_1W = (x_1W >= left) & (x_1W < size_px - right)
    inside_H1 = (y_H1 >= top) & (y_H1 < size_px - bottom)
    open_HW: NDArray[np.bool_] = circle_HW & inside_1W & inside_H1
    return open_HW


def draw_texture(size_px: int, rng: np.random.Generator) -> Array:
    """Attenuation (H, W), unitless, of soft tissue that is not modelled: smooth noise."""
    scale = size_px / DESIGN_SIZE_PX
    texture_HW = np.zeros((size_px, size_px))
    for sigma_px, amplitude in ((28.0, 0.05), (9.0, 0.02), (3.5, 0.007)):
        noise_HW = blur(rng.standard_normal((size_px, size_px)), sigma_px * scale)
        texture_HW += amplitude * noise_HW / noise_HW.std()
    return texture_HW


def expose(
    attenuation_HW: Array, open_HW: NDArray[np.bool_], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Expose the detector and process the picture as such a system does.

    In order: blur of focal spot and motion, scatter, photon noise, electronic noise, logarithm,
    unsharp background subtraction, window, gamma, collimator.

    Args:
        attenuation_HW: line integral of the attenuation, unitless.
        open_HW: False behind the collimator's blades.
        rng: source of what differs between exposures, and of the noise.

    Returns:
        Grey values (H, W); vessels are dark, the collimated area is 0.
    """
    scale = attenuation_HW.shape[0] / DESIGN_SIZE_PX
    blur_px, scatter, photons, gamma = rng.uniform((0.5, 0.5, 1500, 0.8), (0.9, 1.2, 8000, 1.3))
    primary_HW = blur(np.exp(-attenuation_HW), blur_px * scale)
    beam_HW = primary_HW + scatter * blur(primary_HW, 40.0 * scale)
    beam_HW /= beam_HW[open_HW].mean()
    # A narrow blur by its spectrum rings below zero where hardly a photon comes through.
    counts_HW = rng.poisson(photons * np.maximum(beam_HW, 0.0)) / photons
    counts_HW += 0.004 * rng.standard_normal(counts_HW.shape)
    log_HW = np.log(np.maximum(counts_HW, 1e-3))
    log_HW -= 0.65 * blur(log_HW, 36.0 * scale)
    low, high = np.percentile(log_HW[open_HW], (0.5, 99.5))
    grey_HW = np.clip((log_HW - low) / (high - low), 0.0, 1.0) ** gamma
    return np.where(open_HW, np.rint(255 * grey_HW), 0).astype(np.uint8)


def blur(image_HW: Array, sigma_px: float) -> Array:
    """Gaussian blur of a mirrored image, by its spectrum: same result on any number of threads."""
    height, width = image_HW.shape
    margin = min(int(np.ceil(3 * sigma_px)), height, width)
    padded = np.pad(image_HW, margin, mode="symmetric")
    down = np.fft.fftfreq(padded.shape[0])[:, None]
    across = np.fft.rfftfreq(padded.shape[1])[None, :]
    falloff = -2 * (np.pi * sigma_px) ** 2
    spectrum = np.fft.rfft2(padded) * (np.exp(falloff * down**2) * np.exp(falloff * across**2))
    blurred: Array = np.fft.irfft2(spectrum, s=padded.shape)
    return blurred[margin : margin + height, margin : margin + width]
