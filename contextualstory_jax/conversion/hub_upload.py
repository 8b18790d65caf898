"""A model's repository on the Hugging Face Hub: its files, and their upload in one commit."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from contextualstory_jax.checkpoints.layout import read_model
from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.conversion.hub import ID
from contextualstory_jax.conversion.import_torch import (
    check_free,
    parameter_shapes,
    read_source,
    staged,
)
from contextualstory_jax.conversion.streaming import StoredWeights
from contextualstory_jax.utils.errors import UserError, require

Files = Mapping[str, Path | bytes]  # by their place in the repository: a file here, or its bytes

# Places that a model of either layout has. Those that a new version has no file for are deleted.
OURS = re.compile(
    r"(checkpoints|unet|unet_ema|vae|text_encoder|tokenizer|scheduler)/.*"
    r"|(model|vocabulary|config|model_index|cumulative_motion)\.json"
    r"|sample\.png|first_frame\.png|README\.md"
)
AGAIN = "the same command completes it"


class Contents(NamedTuple):
    """A model as its repository holds it."""

    files: Files
    config: ModelConfig
    parameters: Mapping[str, int]  # by part
    dtypes: tuple[str, ...]  # of the weights, the most frequent first
    step: int | None  # None: the layout does not record it
    weights: str | None  # `ema` or `raw`
    origin: str | None  # the Hub id that the weights were converted from
    released: bool  # whether in the original's layout


def check_repo(repo: str) -> None:
    """Raise `UserError` unless a name is a Hub id of a model, USER/NAME."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        valid = re.fullmatch(ID, repo) is not None
    except HFValidationError:
        valid = False
    require(
        valid,
        f"{repo!r} is no Hub id USER/NAME: letters, digits and single '-', '_', '.', at most 96",
    )


def read_contents(folder: Path, weights: str | None = None) -> Contents:
    """The files of a model that generation needs, of either layout.

    Of a training workdir, the newest checkpoint's EMA weights without optimizer state.

    Args:
        folder: a checkpoint folder, or a folder in the released layout.
        weights: `ema` or `raw`, by default `ema` where there is one; of checkpoint folders.

    Raises:
        UserError: where the folder holds no complete model.
    """
    require(folder.is_dir(), f"no folder {folder}; give a checkpoint folder or an exported one")
    if (folder / "model.json").exists():
        return _checkpoint(folder, weights)
    require(
        (folder / "unet").is_dir(),
        f"{folder} holds no model: neither model.json nor unet/ is there; give a training workdir, "
        "a converted folder or an exported one",
    )
    return _released(folder, weights)


def _checkpoint(folder: Path, weights: str | None) -> Contents:
    config = read_model(folder)
    stored = StoredWeights(folder, weights, parameter_shapes(config))
    tensors = {part: list(found.values()) for part, found in stored.params.items()}
    items = sorted({tensor.item for found in tensors.values() for tensor in found})
    meta = {name: stored.meta[name] for name in ("step", "storyflow")}
    meta["items"] = {name: stored.meta["items"][name] for name in items}
    description = json.loads((folder / "model.json").read_text())
    source = description.get("source", {}).get("origin", {})
    if "folder" in source:
        source["folder"] = Path(source["folder"]).name  # where it lay is nobody's business
    step = f"checkpoints/{meta['step']}"
    files: dict[str, Path | bytes] = {
        "model.json": _json(description),
        f"{step}/_CHECKPOINT_METADATA": folder / step / "_CHECKPOINT_METADATA",
        f"{step}/meta/metadata": json.dumps(meta).encode(),
    }
    for place in ("tokenizer", *(f"{step}/{item}" for item in items)):
        # orbax's commit_success.txt holds the folder's path, and only buckets need it.
        found = [path for path in (folder / place).rglob("*") if path.is_file()]
        files |= {
            str(path.relative_to(folder)): path
            for path in sorted(found)
            if path.name != "commit_success.txt"
        }
    if (folder / "vocabulary.json").is_file():
        files["vocabulary.json"] = folder / "vocabulary.json"
    dtypes = Counter(str(tensor.dtype) for found in tensors.values() for tensor in found)
    return Contents(
        files,
        config,
        {part: sum(math.prod(t.shape) for t in found) for part, found in tensors.items() if found},
        tuple(name for name, _ in dtypes.most_common()),
        meta["step"],
        stored.meta["weights"],
        source.get("hub"),
        released=False,
    )


def _released(folder: Path, weights: str | None) -> Contents:
    require(weights is None, f"--weights is of checkpoint folders, and {folder} is an exported one")
    read = read_source(folder)
    complete = not any(match.missing for match in read.matches.values())
    require(complete, f"{folder} holds Stable Diffusion, which generates no stories")
    require(
        "unet_ema" not in read.folders,
        f"{folder} is a training checkpoint of the original; convert it, and push the result",
    )
    indices = [path for part in read.tensors for path in folder.glob(f"{part}/*.index*.json")]
    tokenizer = [path for path in (folder / "tokenizer").iterdir() if path.is_file()]
    paths = sorted([*read.files, *indices, *tokenizer])
    files = {place: path for place, path in read.json.items() if path.is_file()}
    dtypes = Counter(
        str(tensor.dtype) for found in read.tensors.values() for tensor in found.values()
    )
    return Contents(
        files | {str(path.relative_to(folder)): path for path in paths},
        read.config,
        {
            part: sum(math.prod(leaf.shape) for leaf in leaves.values())
            for part, leaves in read.shapes.items()
        },
        tuple(name for name, _ in dtypes.most_common()),
        step=None,
        weights=None,
        origin=None,
        released=True,
    )


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def size_of(files: Files) -> int:
    """Bytes of a repository's files."""
    return sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in files.values())


def write_files(files: Files, output: Path) -> None:
    """Write a repository's files to a folder that is not there, or empty.

    Raises `UserError` where that cannot be done; the folder is then as it was.
    """
    check_free(output)
    with staged(output, size_of(files)) as folder:
        for place, file in files.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, bytes):
                (folder / place).write_bytes(file)
            else:
                shutil.copyfile(file, folder / place)


def check_token(repo: str) -> None:
    """Raise `UserError` unless the Hub knows the user's token."""
    import huggingface_hub  # takes a second to import

    require(
        huggingface_hub.get_token() is not None,
        "no token for the Hub: `hf auth login` stores one, HF_TOKEN names one",
    )
    with _refusing(repo):
        huggingface_hub.HfApi().whoami()


def upload(files: Files, repo: str, message: str, private: bool = False) -> str:
    """Put files into a repository in one commit; made where it is not there, it is public.

    What the Hub has already is not sent again. Files of an earlier version of the model are
    deleted in the same commit, others stay, and so does who may see the repository.

    Args:
        private: make a repository that only its owner sees.

    Returns:
        The URL of the repository.

    Raises:
        UserError: the Hub refuses it or cannot be reached, or the repository is there and public
            although `private`; it is then as it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    with _refusing(repo):
        try:
            info = api.model_info(repo)
            require(
                bool(info.private) or not private,
                f"{repo} is there and public; make it private in its settings, or leave out "
                "--private",
            )
            there = {file.rfilename for file in info.siblings or ()}
        except RepositoryNotFoundError:
            api.create_repo(repo, private=private, exist_ok=True)
            there = set()
        added = [CommitOperationAdd(place, file) for place, file in files.items()]
        stale = sorted(place for place in there - files.keys() if OURS.fullmatch(place))
        deleted = [CommitOperationDelete(place, is_folder=False) for place in stale]
        api.create_commit(repo, [*added, *deleted], commit_message=message)
    return f"{api.endpoint}/{repo}"


@contextlib.contextmanager
def _refusing(repo: str) -> Iterator[None]:
    """Turn what the Hub and the connection raise into one line."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the Hub, its transport or the disk
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
        status = cause.response.status_code if cause is not None else None
        if status == 401:
            message = "the Hub refuses the token; `hf auth login` stores another, or set HF_TOKEN"
        elif status == 403:
            message = f"the token may not write to {repo}; take one that may, or another USER"
        else:
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            message = f"{repo} is not uploaded ({reason}); {AGAIN}"
        raise UserError(message) from error
