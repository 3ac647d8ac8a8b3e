"""The tiny model's tokenizer: files that CLIP's tokenizer reads, with one token for each word of the demo's world."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import world

START, END = "<|startoftext|>", "<|endoftext|>"


def write(folder: Path) -> None:
    """Write the four files of a CLIP tokenizer with one token for each word of the world.

    Other words fall apart into syllables and letters.
    """
    merges = _whole_word_merges(world.words())
    letters = _byte_letters()
    pieces = [START, END, *letters, *(letter + "</w>" for letter in letters)]
    pieces += dict.fromkeys(left + right for left, right in merges)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}, indent=0))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    settings = {**special, "do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _whole_word_merges(known: Sequence[str]) -> list[tuple[str, str]]:
    """Build merges that make one token of every word: each word first takes the merges that earlier words need."""
    merges: dict[tuple[str, str], int] = {}
    for word in known:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:], strict=False))
            pair = min(pairs, key=lambda pair: merges.get(pair, len(merges)))
            merges.setdefault(pair, len(merges))
            at = pairs.index(pair)
            parts[at : at + 2] = ["".join(pair)]
    return list(merges)


def vocabulary_size(folder: Path) -> int:
    """How many tokens the tokenizer in a folder has."""
    return len(json.loads((folder / "vocab.json").read_text()))


def _byte_letters() -> list[str]:
    """The 256 characters by which byte-level BPE writes the 256 bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(len(others))]
