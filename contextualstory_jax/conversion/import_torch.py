"""Released folders to checkpoint folders, tensor by tensor, bit by bit.

`conversion/export_torch.py` is the way back.

Only intact folders are converted: the files' headers and JSON are compared with the model they
describe first, values are checked on the way, and the result gets its name when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from contextualstory_jax.checkpoints.layout import write_model
from contextualstory_jax.config.model_config import ModelConfig
from contextualstory_jax.conversion import diffusers_format
from contextualstory_jax.conversion.diffusers_format import collected
from contextualstory_jax.conversion.streaming import stream_weights
from contextualstory_jax.conversion.tensor_files import Tensor, find_weights, open_weights
from contextualstory_jax.conversion.torch_names import ADDED, DEAD, Match, from_torch, match_tensors
from contextualstory_jax.models.story_model import StoryModel
from contextualstory_jax.utils.errors import UserError, require
from contextualstory_jax.utils.interruption import removing
from contextualstory_jax.utils.progress import bytes_bar

Dtype = Literal["keep", "float32", "bfloat16"]

FLOATS = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
LISTED = 100  # problems in one message
# The part of the model, and the checkpoint's item, that the tensors of each folder are.
PARTS = {"unet": "unet", "unet_ema": "unet", "vae": "vae", "text_encoder": "text_encoder"}
ITEMS = {"unet": "params", "unet_ema": "ema_params", "vae": "frozen", "text_encoder": "frozen"}

Items = dict[str, dict[str, dict[str, Tensor]]]  # by item, part and name


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder whose JSON and headers are right."""

    folders: dict[str, Path]  # of each part
    config: ModelConfig
    storyflow: list[float]
    shapes: dict[str, dict]  # of the model's parameters
    files: list[Path]  # of weights
    tensors: dict[str, dict[str, Tensor]]  # by folder and key
    matches: dict[str, Match]  # by folder
    json: dict[str, Path]  # by its place in the released layout


def import_released(
    source: Path, output: Path, dtype: Dtype = "keep", origin: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Convert a released folder, a training checkpoint of the original, or Stable Diffusion 2.1.

    Args:
        output: a folder that is not there or empty.
        dtype: that of all weights, or `keep`.
        origin: what the summary calls the source.

    Returns:
        The summary, which also is in the checkpoint's model.json.

    Raises:
        UserError: with all problems in one message; `output` is then as it was.
    """
    check_free(output)
    read = read_source(source)
    not_finite: list[str] = []
    items = checkpoint_items(read, dtype, not_finite)
    absent = [key for match in read.matches.values() for key in match.missing]
    meta = {"step": 0, "storyflow": read.storyflow, "absent": absent}
    summary = {"origin": dict(origin or {"folder": str(source)}), **summarise(items, len(absent))}
    size = sum(t.nbytes for tree in items.values() for part in tree.values() for t in part.values())
    with staged(output, size) as folder, ThreadPoolExecutor(1) as hashing:
        # Beside the tensors' own reading, so that what the system still holds is not read again.
        digests = {file: hashing.submit(sha256, file) for file in read.files}
        with bytes_bar(size, output.name) as bar:
            stream_weights(folder, items, meta, bar.update)
        refuse(source, not_finite)
        copy_json(read.json, folder / "released")
        summary["sha256"] = {
            f"{file.parent.name}/{file.name}": digest.result() for file, digest in digests.items()
        }
        write_model(folder, read.config, read.folders["tokenizer"], source=summary)
    return summary


def read_source(source: Path) -> Source:
    """Read JSON and headers, and compare them. Raises `UserError` with all problems."""
    problems: list[str] = []
    folders: dict[str, Path] = {}
    kind: diffusers_format.Kind = "contextualstory"
    files: list[Path] = []
    tensors: dict[str, dict[str, Tensor]] = {}
    with collected(problems):
        kind = diffusers_format.read_kind(source)
    with collected(problems):
        folders = diffusers_format.find_parts(source, kind)
    for part in [part for part in PARTS if part in folders]:
        with collected(problems):
            paths, shard_of = find_weights(folders[part], diffusers_format.WEIGHTS[part])
            tensors[part] = open_weights(paths, shard_of)
            files += paths
    config, storyflow, shapes, matches = ModelConfig(), [], {}, {}
    if folders:
        with collected(problems):
            table = tensors.get("unet", {}).get("text_adapter.pos_embed")
            rows = table.shape[2] if table is not None and len(table.shape) == 4 else None
            config = diffusers_format.read_config(folders, kind, rows)
            shapes = parameter_shapes(config)
            for part, found in tensors.items():
                matches[part] = match_tensors(found, shapes[PARTS[part]])
                problems += misfits(part, found, matches[part], kind)
            storyflow = diffusers_format.read_storyflow(
                source / diffusers_format.STORYFLOW, config.unet, kind
            )
    if problems:  # values too, so that one run names all
        problems += [
            f"{part}: {key}: not finite"
            for part, found in tensors.items()
            for key, tensor in found.items()
            if not finite(tensor.read())
        ]
    refuse(source, problems)
    documents = {name: source / name for name in diffusers_format.JSON_FILES}
    for name in documents:
        part = Path(name).parent.name
        if part in folders:  # perhaps of another folder
            documents[name] = folders[part] / Path(name).name
    return Source(folders, config, storyflow, shapes, files, tensors, matches, documents)


@functools.lru_cache
def parameter_shapes(config: ModelConfig) -> dict[str, dict]:
    """Shape and dtype of every parameter, by part; kept, because making a model takes a second."""
    return StoryModel(config).shapes


def misfits(
    part: str, tensors: Mapping[str, Tensor], match: Match, kind: diffusers_format.Kind
) -> list[str]:
    """Problems with the names, shapes and dtypes of a part's tensors."""
    problems = list(match.problems)
    for key in match.keys.values():
        if tensors[key].dtype not in FLOATS.values():
            problems.append(f"{key}: {tensors[key].dtype}, expected one of {', '.join(FLOATS)}")
    for key in match.missing:
        if kind == "contextualstory" or not re.fullmatch(ADDED, key):
            problems.append(f"{key}: missing")
    return [f"{part}: {problem}" for problem in problems]


def checkpoint_items(source: Source, dtype: Dtype, not_finite: list[str]) -> Items:
    """The items of the checkpoint to be; tensors whose values turn out wrong go to `not_finite`."""
    items: Items = defaultdict(dict)
    for part, match in source.matches.items():
        found, shapes = source.tensors[part], source.shapes[PARTS[part]]
        leaves = items[ITEMS[part]].setdefault(PARTS[part], {})
        for name, key in match.keys.items():
            leaves[name] = converted(
                found[key],
                shapes[name].shape,
                dtype,
                functools.partial(from_torch, name, ndim=len(shapes[name].shape)),
                functools.partial(not_finite.append, f"{part}: {key}: not finite"),
            )
        for key, given in match.dead.items():
            items["dead"].setdefault(part, {})[key] = converted(
                found[given],
                found[given].shape,
                dtype,
                lambda values: values,
                functools.partial(not_finite.append, f"{part}: {given}: not finite"),
            )
    return dict(items)


def converted(
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: Dtype,
    layout: Callable[[np.ndarray], np.ndarray],
    not_finite: Callable[[], None],
) -> Tensor:
    """The tensor in another layout, of `shape`, and another dtype if it holds floats.

    Args:
        not_finite: called when values are read that are not.
    """
    target = target_dtype(tensor.dtype, dtype)
    read = functools.partial(read_converted, tensor, target, layout, not_finite)
    return Tensor(shape, target, read, tensor.place)


def read_converted(
    tensor: Tensor,
    dtype: np.dtype,
    layout: Callable[[np.ndarray], np.ndarray],
    not_finite: Callable[[], None],
) -> np.ndarray:
    """Read a tensor, look at its values, and convert them."""
    values = tensor.read()
    if not finite(values):
        not_finite()
    return layout(values).astype(dtype, copy=False)


def target_dtype(stored: np.dtype, wanted: Dtype) -> np.dtype:
    """The dtype to write a tensor in: the one asked for, if it holds floats."""
    return stored if wanted == "keep" or stored not in FLOATS.values() else FLOATS[wanted]


def finite(values: np.ndarray) -> bool:
    """Whether no value is infinite or no number."""
    if values.dtype == FLOATS["bfloat16"]:  # whose own test is slow; all exponent bits are set
        return not np.any((values.view(np.uint16) & 0x7F80) == 0x7F80)
    return bool(np.isfinite(values).all())


def refuse(source: Path, problems: Sequence[str]) -> None:
    """Raise `UserError` with all problems, if there are any."""
    rest = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    require(not problems, f"{source} cannot be converted: {'; '.join(problems[:LISTED])}{rest}")


def summarise(items: Items, absent: int) -> dict[str, Any]:
    """The contents of a checkpoint, as JSON: by item and part, and dead tensors by reason."""
    reasons = Counter(
        reason
        for leaves in items.get("dead", {}).values()
        for key in leaves
        for pattern, reason in DEAD
        if re.fullmatch(pattern, key)
    )
    parts = {
        f"{item}.{part}": count((t.shape, t.dtype) for t in leaves.values())
        for item, tree in items.items()
        if item != "dead"
        for part, leaves in tree.items()
    }
    return {"parts": parts, "dead": dict(reasons), "absent": absent}


def count(tensors: Iterable[tuple[tuple[int, ...], np.dtype]]) -> dict[str, Any]:
    """How many tensors there are, of each dtype, and values in them."""
    known = list(tensors)
    return {
        "tensors": len(known),
        "parameters": sum(math.prod(shape) for shape, _ in known),
        "dtypes": dict(Counter(str(dtype) for _, dtype in known)),
    }


def describe(summary: Mapping[str, Any]) -> str:
    """A summary as lines to read."""
    lines = [", ".join(f"{what} {name}" for what, name in summary["origin"].items())]
    for part, holds in summary["parts"].items():
        dtypes = ", ".join(f"{number} {dtype}" for dtype, number in holds["dtypes"].items())
        lines.append(f"{part}: {holds['parameters']:,} parameters, tensors: {dtypes}")
    for reason, number in summary.get("dead", {}).items():
        lines.append(f"dead: {number} tensors, {reason}")
    if summary.get("absent"):
        lines.append(f"absent: {summary['absent']} tensors, which training initialises")
    lines += [f"sha256 {digest}  {file}" for file, digest in summary.get("sha256", {}).items()]
    return "\n".join(lines)


def sha256(file: Path) -> str:
    """The digest of a file, as `sha256sum` and the Hub give it."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def copy_json(files: Mapping[str, Path], target: Path) -> None:
    """Copy JSON files to their places in the released layout, as far as they are there."""
    for name, path in files.items():
        if path.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)


def check_free(output: Path) -> None:
    """Raise `UserError` unless `output` is not there, or an empty folder."""
    require(
        not output.exists() or (output.is_dir() and not any(output.iterdir())),
        f"{output} is there and not empty; name another folder",
    )


@contextlib.contextmanager
def staged(output: Path, size: int) -> Iterator[Path]:
    """A folder beside `output` that becomes it in the end, or vanishes where anything fails.

    Args:
        size: bytes that it will hold.

    Raises:
        UserError: where the disk has no room for them.
    """
    partial = output.absolute().with_name(f".{output.absolute().name}.partial")
    try:
        if partial.exists():  # of a conversion that was killed
            shutil.rmtree(partial)
        with removing(partial):
            partial.mkdir(parents=True)
            free = shutil.disk_usage(partial).free
            require(
                size < free,
                f"{output} needs {size / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB left; "
                "make room, or choose another disk",
            )
            yield partial
            partial.replace(output)
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror}; choose another folder or disk"
        ) from error
