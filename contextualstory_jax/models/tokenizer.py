"""Sentences to token ids, with a checkpoint's own CLIP tokenizer files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from contextualstory_jax.utils.errors import UserError


class Tokenizer:
    """A CLIP tokenizer read from a folder; pads, and truncates, to the text encoder's length.

    Raises `UserError` where the folder holds none, or a damaged one.
    """

    def __init__(self, folder: Path, length: int):
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing
        from transformers import CLIPTokenizer  # takes a second to import

        if not (folder / "tokenizer_config.json").is_file():
            raise UserError(f"no tokenizer in {folder}: tokenizer_config.json is missing")
        self.folder, self.length = folder, length
        try:
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the parser, in Rust, raises nothing narrower
            raise UserError(f"the tokenizer in {folder} is damaged; copy it again") from error

    def __call__(self, sentences: Sequence[str]) -> Int32[np.ndarray, "n l"]:
        """Token ids, padding included."""
        encoded = self._tokenizer(
            list(sentences),
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="np",
        )
        return encoded["input_ids"].astype(np.int32)

    def counts(self, sentences: Sequence[str]) -> list[int]:
        """The number of tokens of each sentence without truncation, start and end included."""
        encoded = self._tokenizer(list(sentences), verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def truncation_note(self, sentences: Iterable[str]) -> str | None:
        """A line that counts the sentences that are truncated and names the first three, if any."""
        distinct = list(dict.fromkeys(sentences))
        # Of ASCII a token is at least one character.
        long = [s for s in distinct if len(s) > self.length - 2 or not s.isascii()]
        counted = zip(long, self.counts(long) if long else (), strict=True)
        cut = [f"{s[:60]!r} ({count})" for s, count in counted if count > self.length]
        if not cut:
            return None
        return (
            f"{len(cut)} of {len(distinct)} sentences have more than {self.length} tokens and are "
            f"truncated: {', '.join(cut[:3])}" + (", ..." if len(cut) > 3 else "")
        )
