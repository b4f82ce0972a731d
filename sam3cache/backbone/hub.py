"""Finding a tower's weights: a path, this package, the Hugging Face hub, or a seed."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from sam3cache.backbone.spec import TowerSpec
from sam3cache.backbone.weights import SeededWeights, Weights, read_checkpoint
from sam3cache.errors import WeightsError

_FILE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}


def find_weights(spec: TowerSpec, weights: str | Path | None) -> Weights:
    """Return the weights that a user means; see ``load_tower``.

    Raises:
        WeightsError: there are none, or they are not of this backbone.
    """
    if weights == "random" or (weights is None and not (spec.packaged_file or spec.hub_repo)):
        return SeededWeights(spec)
    if weights is None and spec.packaged_file:
        return read_checkpoint(Path(__file__).with_name(spec.packaged_file), spec)
    if weights is None:
        return read_checkpoint(_download(spec, str(spec.hub_repo)), spec)
    path = Path(weights)
    is_repo = (
        isinstance(weights, str)
        and re.fullmatch(r"[\w.-]+/[\w.-]+", weights)
        and path.suffix not in _FILE_SUFFIXES
        and not path.exists()
    )
    return read_checkpoint(_download(spec, str(weights)) if is_repo else path, spec)


def _download(spec: TowerSpec, repo: str) -> Path:
    """Return the hub's file for a backbone; once it is in the local cache, without the network.

    Asking the hub each time whether the file has changed would fail on compute nodes without a
    network, and could give the workers of one extraction different weights.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if spec.hub_file is None:
        raise WeightsError(
            f"{repo}: {spec.name} has no file on the hub; leave the weights out, or name a file"
        )
    advice = (
        f"accept the licence at https://huggingface.co/{repo} and run `hf auth login`, "
        "or name a downloaded file with --weights PATH (--backbone sam3-mini needs no weights)"
    )
    with suppress(LocalEntryNotFoundError):
        return Path(hf_hub_download(repo, spec.hub_file, local_files_only=True))
    try:
        return Path(hf_hub_download(repo, spec.hub_file))
    except GatedRepoError:
        problem = "access is gated and this account has none"
    except RepositoryNotFoundError:
        problem = "neither a file here nor a repository that this account can see"
    except LocalEntryNotFoundError:
        problem = "not in the local cache, and the hub cannot be reached"
    except EntryNotFoundError:
        problem = f"the repository holds no {spec.hub_file}"
    # The hub's client, its HTTP library and its transfer library each have their own failures.
    except (OSError, HTTPError, RuntimeError) as error:
        problem = f"the download failed ({str(error).partition(chr(10))[0]})"
    raise WeightsError(f"{repo}/{spec.hub_file}: {problem}; {advice}")
