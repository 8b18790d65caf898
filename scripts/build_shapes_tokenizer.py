"""Write the tokenizer of the synthetic dataset: CLIP's file format, with its own vocabulary.

Every word of the stories is one token; other English text falls back to letters, digits and marks.
As in SD-2.1's tokenizer the pad token is "!", with id 0. Run after changing a word of the stories:

    python scripts/build_shapes_tokenizer.py
"""

from __future__ import annotations

import collections
import json
import string
from collections.abc import Iterable

from contextualstory_jax.data.shapes import TOKENIZER_DIR, vocabulary

Pair = tuple[str, str]

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
WORD_END = "</w>"  # marks the last symbol of a word in CLIP's vocabulary
MAX_LENGTH = 16  # tokens, with start and end: the longest sentence has 15


def learn_merges(words: Iterable[str]) -> list[Pair]:
    """Byte-pair encoding's merges, most frequent pair first, until each word is one symbol."""
    spellings = [(*word[:-1], word[-1] + WORD_END) for word in words]
    merges = []
    while pairs := collections.Counter(p for s in spellings for p in zip(s, s[1:], strict=False)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spellings = [merge(spelling, best) for spelling in spellings]
    return merges


def merge(spelling: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    """Join each occurrence of the pair, from the left."""
    merged: list[str] = []
    joinable = False  # whether the last symbol may be the pair's first: not if it was just joined
    for symbol in spelling:
        if joinable and (merged[-1], symbol) == pair:
            merged[-1] += symbol
            joinable = False
        else:
            merged.append(symbol)
            joinable = True
    return tuple(merged)


def tokenizer_files() -> dict[str, str]:
    """The text of each file by its name."""
    alphabet = [PAD] + sorted(
        set(string.digits + string.ascii_lowercase + string.punctuation) - {PAD}
    )
    merges = learn_merges(vocabulary())
    joined = ["".join(pair) for pair in merges]
    tokens = [*alphabet, *(symbol + WORD_END for symbol in alphabet), *joined, START, END]
    special = {"bos_token": START, "eos_token": END, "pad_token": PAD, "unk_token": END}
    config = {
        **special,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": MAX_LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    return {
        "vocab.json": as_json({token: number for number, token in enumerate(tokens)}),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n",
        "tokenizer_config.json": as_json(config),
        "special_tokens_map.json": as_json(special),
    }


def as_json(value: dict) -> str:
    """Indented JSON with a final newline."""
    return json.dumps(value, indent=2) + "\n"


if __name__ == "__main__":
    TOKENIZER_DIR.mkdir(exist_ok=True)
    for name, text in tokenizer_files().items():
        (TOKENIZER_DIR / name).write_text(text)
