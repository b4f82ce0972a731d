"""Synthetic coronary angiograms: known anatomy, true cone-beam geometry, exact masks.

``anatomy`` grows a patient's coronary trees, ``projection`` places the C-arm, ``attenuation``
integrates along the rays, ``detector`` turns that into a picture, ``dataset`` writes the files.
"""

from sam3cache.images.phantom.dataset import make_phantoms

__all__ = ["make_phantoms"]
