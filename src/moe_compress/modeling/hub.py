"""Models on the hub: downloaded to its cache, whole or as far as their headers tell."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_compress.errors import UserError, first_line
from moe_compress.modeling.checkpoint import INDEX_FILE, not_read_here, weight_files

# The card of a compressed model tells the license, whose text comes along.
_BESIDE_WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "README.md", "LICENSE*", "NOTICE*"]


def download(repository: str, revision: str | None, *, weights: bool = True) -> Path:
    """Download a hub repository to the cache of the hub, or what lies beside its weights; returns the directory.

    Raises:
        UserError: no such repository, none with safetensors, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with _told_in_one_line(repository, revision):
        path = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=_BESIDE_WEIGHTS + ["*.safetensors"] * weights,
                # Originals in the publisher's own format, which would double the download.
                ignore_patterns=["original/*", "consolidated*", "metal/*"],
            )
        )
    if weights and not (path / INDEX_FILE).exists() and not any(path.glob("*.safetensors")):
        raise UserError(_no_safetensors(repository))
    return path


def download_headers(repository: str, revision: str | None, directory: Path) -> Path:
    """Download a hub repository with sparse files in place of its weights, which have their headers and sizes alone.

    Args:
        repository: its id.
        revision: branch, tag or commit.
        directory: where to put it.

    Returns:
        `directory`, or the directory in the cache of the hub if the weights are there already.

    Raises:
        UserError: no such repository, none with safetensors, or the hub cannot be reached.
    """
    from huggingface_hub import get_safetensors_metadata

    cached = download(repository, revision, weights=False)
    try:
        weight_files(cached)
        return cached
    except UserError:  # not all are there
        shutil.copytree(cached, directory, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    with _told_in_one_line(repository, revision):
        metadata = get_safetensors_metadata(repository, revision=revision)
    for name, file in metadata.files_metadata.items():
        tensors = {
            tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for tensor, info in file.tensors.items()
        }
        header = json.dumps(tensors).encode()
        with (directory / name).open("wb") as stream:
            stream.write(struct.pack("<Q", len(header)) + header)
            stream.truncate(stream.tell() + max((info.data_offsets[1] for info in file.tensors.values()), default=0))
    return directory


@contextmanager
def _told_in_one_line(repository: str, revision: str | None) -> Iterator[None]:
    """A block that asks the hub for a repository, whose errors become a UserError of one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"{repository} is gated: accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repository} has no revision {revision!r} on the hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{repository} is neither a local directory nor a model on the hub; check its name") from error
    except NotASafetensorsRepoError as error:
        raise UserError(_no_safetensors(repository)) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{repository} is not a local directory, and the hub cannot be reached to download it; check the name, the "
            "network, or HF_HUB_OFFLINE"
        ) from error
    except Exception as error:  # of the HTTP library, which is another one in each version of the hub's client
        raise UserError(f"{repository} cannot be read from the hub: {first_line(error)}") from error


def _no_safetensors(repository: str) -> str:
    return (
        f"no safetensors weights of {repository} are on the hub (or in its cache, where HF_HUB_OFFLINE is set); "
        f"pickled ones {not_read_here(repository, 'DIRECTORY')}"
    )
