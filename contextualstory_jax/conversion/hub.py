"""A model's folder: on this machine, or fetched from the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from contextualstory_jax.utils.errors import UserError, require

PARTS = ("unet", "vae", "text_encoder")
ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # OWNER/NAME
FILES = ["*.json", "tokenizer/*", "*/*.safetensors", "checkpoints/*"]  # the last of `push`
# Fetched where a repository has no safetensors of full precision.
OTHERS = ["*/*.fp16.safetensors", "*/*.bin"]


def check_id(source: str) -> None:
    """Raise `UserError` unless a name could be a Hub id."""
    require(re.fullmatch(ID, source) is not None, f"no folder {source}, and no Hub id OWNER/NAME")


def find_commit(source: str, revision: str | None = None) -> str | None:
    """The commit that a Hub id's revision names; None where the Hub cannot be asked."""
    import huggingface_hub  # takes a second to import

    try:
        return huggingface_hub.HfApi().model_info(source, revision=revision, timeout=10).sha
    except Exception:  # of the Hub or its transport; `locate` says the reason
        return None


def locate(source: str, revision: str | None = None) -> tuple[Path, dict[str, str]]:
    """The folder of a model, and what to call it: a local folder, or a Hub id's snapshot.

    Raises `UserError` where there is neither, or the Hub cannot be reached.
    """
    folder = Path(source)
    if folder.exists():
        require(folder.is_dir(), f"{source} is a file; give the folder that it is in")
        require(revision is None, f"--revision is of Hub ids, and {source} is a folder here")
        return folder, {"folder": source}
    check_id(source)
    import huggingface_hub

    try:
        fetched = huggingface_hub.snapshot_download(
            source, revision=revision, allow_patterns=FILES, ignore_patterns=OTHERS
        )
        snapshot = Path(fetched)
        pushed = (snapshot / "model.json").is_file()  # a checkpoint folder
        if not pushed and not all(any(snapshot.glob(f"{p}/*.safetensors")) for p in PARTS):
            huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=OTHERS)
    except Exception as error:  # of the Hub, its transport or the disk
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"no folder {source}, and from the Hub it cannot be had ({reason}); "
            "check the name, the revision and the network"
        ) from error
    return snapshot, {"hub": source, "revision": revision or "main", "snapshot": snapshot.name}
