"""Weights of the metrics' networks: found in a folder or downloaded, checked and recorded.

PyTorch's file names end in the first digits of the file's SHA-256. A file of another name has an
unknown checksum: it is used, warned of, and recorded as unverified.
"""

from __future__ import annotations

import hashlib
import logging
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np

from contextualstory_jax.conversion import torch_names
from contextualstory_jax.conversion.tensor_files import read_pickle, read_safetensors
from contextualstory_jax.distributed.multihost import by_first, is_first
from contextualstory_jax.models.network import Network, Params
from contextualstory_jax.utils.atomic import atomic_path
from contextualstory_jax.utils.errors import UserError, require
from contextualstory_jax.utils.files import user_cache
from contextualstory_jax.utils.progress import bytes_bar

CHUNK = 2**20  # bytes
SUFFIXES = (".safetensors", ".pth")

logger = logging.getLogger(__name__)


class WeightsFile(NamedTuple):
    """A published file of weights."""

    name: str  # ends in `-HASH.pth`
    own_name: str  # of a file with other weights, without its suffix
    url: str

    @property
    def hash(self) -> str:
        """The first digits of its SHA-256."""
        return Path(self.name).stem.rpartition("-")[2]


class Weights:
    """The weights in a folder, and what was used of them.

    Attributes:
        sha256: checksum of each file used, by its name.
        unverified: names of those whose checksum is not that of a published file.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder or user_cache() / "weights"
        self.sha256: dict[str, str] = {}
        self.unverified: list[str] = []
        self._loaded: dict[str, Params] = {}
        self._digests: dict[str, str] = {}

    def path(self, file: WeightsFile) -> Path:
        """Where a file is: under its published name, else under its own name, else downloaded.

        Raises `UserError` where there is none and it cannot be downloaded.
        """
        names = (file.name, *(f"{file.own_name}{suffix}" for suffix in SUFFIXES))
        paths = [self.folder / name for name in names]
        found = next((path for path in paths if path.is_file()), None)
        if found is None:
            by_first(lambda: download(file, paths[0]))
        return found or paths[0]

    def load(self, file: WeightsFile, network: Network) -> Params:
        """The parameters of a network from a file, by name.

        Raises `UserError` for a wrong checksum, and for weights of another network.
        """
        if file.name not in self._loaded:
            path = self.path(file)
            digest = sha256(path)
            verified = digest.startswith(file.hash)
            require(
                verified or path.name != file.name,
                f"{path} is damaged or another file: its SHA-256 begins with {digest[:8]}, not "
                f"{file.hash}; download {file.url}, or rename it to {file.own_name}.pth",
            )
            self._loaded[file.name] = read(path, network)
            self._digests[file.name] = digest
            self.record(path.name, digest, verified)
        return self._loaded[file.name]

    def digest(self, file: WeightsFile) -> str:
        """The SHA-256 of a file that was loaded."""
        return self._digests[file.name]

    def record(self, name: str, digest: str, verified: bool) -> None:
        """Note what was used, and warn of what is unverified."""
        self.sha256[name] = digest
        if not verified and name not in self.unverified:
            self.unverified.append(name)
            if is_first():
                logger.warning("%s has an unknown checksum: recorded as unverified", name)


def read(path: Path, network: Network) -> Params:
    """A network's parameters from a file of PyTorch tensors, complete or refused.

    Raises `UserError` where the file is damaged, holds more than tensors, or those of another
    network.
    """
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    found = torch_names.match_tensors(tensors, network.shapes)
    problems = sorted(found.problems + [f"{key}: missing" for key in found.missing])
    require(
        not problems,
        f"{path} holds weights of another network: {'; '.join(problems[:2])}"
        + (f"; and {len(problems) - 2} more" if len(problems) > 2 else "")
        + "; take the file that is named after this network",
    )
    values = {key: tensor.read() for key, tensor in tensors.items()}
    converted = torch_names.convert(values, network.shapes)
    return {name: value.astype(np.float32) for name, value in converted.items()}


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal. Raises `UserError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; copy it again") from error


def download(file: WeightsFile, path: Path) -> None:
    """Fetch a file and check it; nothing is left where that fails.

    Raises `UserError` where it cannot be fetched, or its checksum is wrong.
    """
    import huggingface_hub.constants  # takes a second to import

    fix = f"put it there as {path}"
    require(
        not huggingface_hub.constants.HF_HUB_OFFLINE,
        f"no {path} and no network (HF_HUB_OFFLINE); download {file.url} and {fix}",
    )
    digest = hashlib.sha256()
    with atomic_path(path) as temporary:
        try:
            with (
                urllib.request.urlopen(file.url, timeout=20) as source,
                temporary.open("wb") as target,
                bytes_bar(int(source.headers.get("Content-Length", 0)), file.name) as bar,
            ):
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    target.write(chunk)
                    bar.update(len(chunk))
        except (OSError, ValueError) as error:  # urllib's are OSErrors
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"no {path}, and {file.url} cannot be fetched ({reason}); download it and {fix}"
            ) from error
        require(
            digest.hexdigest().startswith(file.hash),
            f"{file.url} arrived with a wrong checksum ({digest.hexdigest()[:8]}, not "
            f"{file.hash}); try again, or download it and {fix}",
        )
