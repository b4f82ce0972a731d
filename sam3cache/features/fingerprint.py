"""What a level's values depend on, and how two of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from sam3cache.errors import FingerprintError
from sam3cache.features.files import sha256_of_json

FieldValue = str | int | float


@dataclass(frozen=True)
class Fingerprint:
    """All that a level's values depend on, as named fields.

    Attributes:
        fields: flat; strings, integers and finite floats.
    """

    fields: Mapping[str, FieldValue]

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the fields as canonical JSON."""
        return sha256_of_json(dict(self.fields))

    def differences(self, other: Fingerprint) -> list[str]:
        """Return one line for each field whose value here differs from ``other``'s."""
        names = sorted({*self.fields, *other.fields})
        return [
            f"{name}: {self.fields.get(name, '(absent)')} → {other.fields.get(name, '(absent)')}"
            for name in names
            if self.fields.get(name) != other.fields.get(name)
        ]

    def require(self, other: Fingerprint, *, level: str, remedy: str) -> None:
        """Raise unless ``other`` is the same fingerprint.

        Raises:
            FingerprintError: naming the level, every field that differs, and the remedy.
        """
        if self.digest != other.digest:
            changes = "; ".join(self.differences(other))
            raise FingerprintError(f"level {level} was made differently: {changes}. {remedy}")
