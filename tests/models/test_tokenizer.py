"""Sentences to ids against CLIP's own procedure, spelled out, and what the folder must hold."""

from __future__ import annotations

import functools
import json
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import regex

from contextualstory_jax.data.shapes import TOKENIZER_DIR
from contextualstory_jax.models.tokenizer import Tokenizer
from contextualstory_jax.utils.errors import UserError

LENGTH = 16
FRAGMENTS = (
    *("mia", "jumps up high", "Otto", "dragon's", "we'll", "o'clock", "café", "東京", "x"),
    *("42", "3.14", ",", "...", "?!", "!", "!!", '"', "(all of them)", "&", "-", "ß"),
    *(" ", "  ", "\t", "\n", "\u00a0", "e\u0301", "<|endoftext|>", "<|startoftext|>"),
)


MERGES = (TOKENIZER_DIR / "merges.txt").read_text().splitlines()[1:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The embedded stories' tokenizer with the whole of CLIP's alphabet, as SD-2.1's has it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for path in TOKENIZER_DIR.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer(folder, LENGTH)


@functools.cache
def byte_symbols() -> dict[int, str]:
    """A visible character for every byte: itself where it is one, else one from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


@functools.cache
def vocabulary() -> dict[str, int]:
    """Ids in CLIP's order: bytes, bytes that end a word, what is merged, start and end."""
    symbols = list(byte_symbols().values())
    joined = [line.replace(" ", "") for line in MERGES]
    words = [*symbols, *(f"{s}</w>" for s in symbols), *joined, "<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}


def merged(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: the pair learnt first is joined first, until none is known."""
    symbols = byte_symbols()
    pieces = [symbols[byte] for byte in word.encode()]
    pieces[-1] += "</w>"
    while pairs := [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        i = 0
        while i < len(pieces) - 1:
            if (pieces[i], pieces[i + 1]) == best:
                pieces[i : i + 2] = ["".join(best)]
            i += 1
    return pieces


def clip_ids(sentence: str) -> list[int]:
    """What CLIP makes of a sentence when "!" is a special token, as in SD-2.1's files."""
    ids = vocabulary()
    ranks = {tuple(line.split()): rank for rank, line in enumerate(MERGES)}
    body = []
    for part in re.split(r"(!|<\|startoftext\|>|<\|endoftext\|>)", sentence):
        if part in ("!", "<|startoftext|>", "<|endoftext|>"):
            body.append(ids[part])
            continue
        text = " ".join(unicodedata.normalize("NFC", part).split()).lower()
        words = regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", text)
        body += [ids[piece] for word in words for piece in merged(word, ranks)]
    whole = [ids["<|startoftext|>"], *body[: LENGTH - 2], ids["<|endoftext|>"]]
    return whole + [0] * (LENGTH - len(whole))


def test_ids_are_clip_s(tokenizer):
    rng = random.Random(0)
    sentences = [
        rng.choice(["", " "]).join(rng.choices(FRAGMENTS, k=rng.randrange(12))) for _ in range(500)
    ]

    ids = tokenizer(sentences)

    for sentence, row in zip(sentences, ids, strict=True):
        assert row.tolist() == clip_ids(sentence), repr(sentence)


def test_an_empty_sentence_is_start_and_end_and_padding(tokenizer):
    start, end = tokenizer([""])[0, :2]

    np.testing.assert_array_equal(tokenizer([""]), [[start, end] + [0] * (LENGTH - 2)])
    assert start != end


def test_a_sentence_too_long_is_cut_and_ends_with_the_end_token(tokenizer):
    end = tokenizer([""])[0, 1]

    long = tokenizer(["mia jumps " * LENGTH])[0]

    assert long[-1] == end
    assert (long[1:-1] != end).all() and (long != 0).all()


def test_sentences_are_counted_before_they_are_truncated(tokenizer):
    assert tokenizer.counts(["", "mia", "mia jumps " * LENGTH]) == [2, 3, 2 * LENGTH + 2]
    fits, long = "mia " * (LENGTH - 2), "mia " * (LENGTH - 1)

    note = tokenizer.truncation_note([fits, long, long, "otto " + long])

    assert tokenizer.truncation_note([fits, "mia"]) is None
    assert tokenizer.truncation_note([]) is None
    assert note is not None and note.startswith(
        f"2 of 3 sentences have more than {LENGTH} tokens and are truncated: '"
    )
    assert f"({LENGTH + 1})" in note and "\n" not in note


def test_a_literal_exclamation_mark_is_the_padding_s_id(tokenizer):
    plain, loud = tokenizer(["mia jumps", "mia! jumps!"])

    assert plain[:4].tolist() == [plain[0], loud[1], loud[3], plain[3]]
    assert loud[[2, 4]].tolist() == [0, 0]


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in .*: tokenizer_config.json is missing"):
        Tokenizer(tmp_path, LENGTH)


def test_a_damaged_tokenizer_is_named(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text()[:-40])

    with pytest.raises(UserError, match=f"the tokenizer in {tmp_path} is damaged"):
        Tokenizer(tmp_path, LENGTH)
