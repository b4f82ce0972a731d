"""Every deliberate failure of sam3cache, as one tree.

    Sam3CacheError
    ├── ConfigError          an option or combination of options that cannot be used
    ├── ManifestError        the manifest, folder or column map as a whole is unusable
    │   └── NoManifestError      there is none at this path
    ├── ImageError           one image or mask cannot be read; its sample is set aside
    ├── WeightsError         a checkpoint of SAM 3 is absent, gated, or not what it claims
    ├── InputSizeError       pixels that are not of the tower's own size
    ├── NumericError         features that are not finite, or overflow the stored precision
    ├── WorkerError          an extraction worker died and could not be replaced
    ├── StoreError           a feature store cannot be used
    │   ├── NotAStoreError       the path holds no feature store
    │   ├── UnsealedStoreError   extraction has not finished
    │   ├── CorruptStoreError    bytes on disk differ from what the receipts record
    │   ├── MissingSampleError   a row that the store does not hold
    │   ├── StoreBusyError       another process holds the store's lock
    │   ├── NoSpaceError         what is to be written does not fit on the disk
    │   └── FingerprintError     features made differently from what is asked for
    ├── HeadError            a head needs what the store lacks, or fails
    │   └── UnknownHeadError     no head has this name, or takes these options
    ├── CheckpointError      a head's checkpoint cannot be read or does not fit
    └── StoppedError         a training was told to stop, and has saved where it was

A message gives the value met, what was expected, and what to do next. The command line prints it
as one line and exits with ``exit_code``; a traceback is a bug.
"""

from __future__ import annotations


class Sam3CacheError(Exception):
    """Root of all deliberate failures; ``exit_code`` is what the command line exits with."""

    exit_code = 1


class ConfigError(Sam3CacheError, ValueError):
    """An option, or a combination of options, that cannot be used."""

    exit_code = 2


class ManifestError(Sam3CacheError, ValueError):
    """The manifest, image folder or column map as a whole is unusable."""


class NoManifestError(ManifestError, ConfigError):
    """A path that was given as a manifest or a folder of images has nothing."""


class ImageError(Sam3CacheError, ValueError):
    """One image or mask cannot be read; extraction sets its sample aside and goes on."""


class QuotingError(ImageError):
    """An image or mask that cannot be read, told in words that may quote a name inside its file.

    Attributes:
        plain: the same without any.
    """

    def __init__(self, text: str, plain: str = "") -> None:
        super().__init__(text)
        self.plain = plain


class WeightsError(Sam3CacheError, RuntimeError):
    """A checkpoint of SAM 3 is absent, gated, or not what it claims to be."""


class InputSizeError(Sam3CacheError, ValueError):
    """Pixels that are not of the tower's own size, layout or type."""


class NumericError(Sam3CacheError, ArithmeticError):
    """Features that are not finite, or that overflow the stored precision."""


class WorkerError(Sam3CacheError, RuntimeError):
    """An extraction worker died and could not be replaced."""


class StoreError(Sam3CacheError, RuntimeError):
    """A feature store cannot be used as asked."""


class NotAStoreError(StoreError, FileNotFoundError):
    """The path holds no feature store."""

    def __str__(self) -> str:
        """Return the message alone (OSError would format errno pairs)."""
        return str(self.args[0]) if self.args else ""


class UnsealedStoreError(StoreError):
    """Extraction into the store has not finished."""


class CorruptStoreError(StoreError):
    """Bytes on disk differ from what the store's receipts record."""


class MissingSampleError(StoreError, LookupError):
    """A row, level or label set was named that the store does not hold."""

    exit_code = 2


class StoreBusyError(StoreError):
    """Another process holds the store's lock."""


class NoSpaceError(StoreError):
    """What is to be written does not fit on the disk; nothing has been written yet."""


class FingerprintError(StoreError):
    """Stored features were made differently from what is asked for."""


class HeadError(Sam3CacheError, ValueError):
    """A head is unknown, needs something that the store lacks, or fails."""


class UnknownHeadError(HeadError, ConfigError):
    """No head has the name that was given, or it does not take the options that were."""


class CheckpointError(Sam3CacheError, ValueError):
    """A head's checkpoint cannot be read, or does not fit the store."""


class StoppedError(Sam3CacheError, RuntimeError):
    """A training or an extraction was told to stop, and has kept what it can go on from."""

    exit_code = 130
