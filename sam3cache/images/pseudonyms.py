"""Names in place of what tells who somebody is.

Without a key, a pseudonym hides a name from readers, not from somebody with a list of names to try.
With one it does, as long as the key stays with its owner: a file that no store ever holds.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sam3cache.errors import ManifestError

KEY_FILE_VARIABLE = "SAM3CACHE_KEY_FILE"
"""Environment variable with the path of the key, for another than the user's own."""

_KEY_BYTES = 32
_PATIENCE_S = 2.0


def pseudonym(text: str, length: int = 12) -> str:
    """Return a short hash of a text: the same for the same text, and not readable back."""
    return hashlib.sha256(_as_bytes(text)).hexdigest()[:length]


def _as_bytes(text: str) -> bytes:
    """Return a text as UTF-8; names of files that are none, and halves of a character, too."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # A half that stands for no byte, as names of Windows may have.
        return text.encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Key:
    """What hashes of identities depend on.

    Attributes:
        secret: 32 bytes.
        path: where it is kept.
        is_new: whether it has just been made.
    """

    secret: bytes
    path: Path
    is_new: bool = False

    def pseudonym(self, text: str, length: int = 16) -> str:
        """Return a keyed hash (BLAKE2b, RFC 7693) of a text, as hex."""
        digest = hashlib.blake2b(_as_bytes(text), key=self.secret)
        return digest.hexdigest()[:length]

    @property
    def mark(self) -> str:
        """Tell one key from another, without telling anything of it."""
        return hashlib.blake2b(self.secret, digest_size=4, person=b"sam3cache mark").hexdigest()

    @property
    def note(self) -> str:
        """Say where a new key is, and what it is for."""
        return (
            f"names of DICOM files and patients are stored as hashes with a key of yours, made now "
            f"in {self.path}: keep it, as another gives other names, and hand it to nobody"
        )


def key_path() -> Path:
    """Return where the user's key is, or would be."""
    if given := os.environ.get(KEY_FILE_VARIABLE):
        return Path(given)
    if sys.platform == "win32":
        base = os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming"
    else:
        base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "sam3cache" / "names.key"


def load_key() -> Key:
    """Read the user's key, or make one where there is none yet.

    Raises:
        ManifestError: when it cannot be read or made.
    """
    path = key_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        secret = secrets.token_bytes(_KEY_BYTES)
        try:
            # Whoever comes first makes it; the others read it.
            with path.open("x", encoding="ascii", newline="\n") as file:
                path.chmod(0o600)
                file.write(secret.hex() + "\n")
        except FileExistsError:
            return Key(_read(path), path)
        return Key(secret, path, is_new=True)
    except OSError as error:
        raise ManifestError(
            f"key for the names of DICOM files: {path}: {error.strerror}; name another file by the "
            f"environment variable {KEY_FILE_VARIABLE}"
        ) from None


def _read(path: Path) -> bytes:
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            secret = bytes.fromhex(path.read_text(encoding="ascii"))
        except ValueError:
            secret = b""
        if len(secret) == _KEY_BYTES:
            return secret
        if time.monotonic() > deadline_s:
            raise ManifestError(
                f"key for the names of DICOM files: {path} does not hold {_KEY_BYTES} bytes as "
                "hex; restore it, or remove it to begin anew with other names"
            )
        time.sleep(0.05)  # Another process is writing it.
