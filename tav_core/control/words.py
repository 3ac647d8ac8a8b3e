"""Align two sentences: find the words that stay, go and are new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

# The option of a CONDITIONING under which it knows the words of its edit.
WORDS_KEY = "tav_words"


@dataclass(frozen=True)
class EditWords:
    """The change from the clip's sentence to the edit's, in positions of their text embeddings.

    ``source``: the clip's sentence as CONDITIONING. ``goes``: positions of its words that the edit leaves out.
    ``new``: positions of the edit's words that it lacks. ``stays``: (position in the clip's sentence, in the edit's)
    of each token that both have. ``lengths``: tokens of the two embeddings.
    """

    source: Any
    goes: tuple[int, ...]
    new: tuple[int, ...]
    stays: tuple[tuple[int, int], ...]
    lengths: tuple[int, int]

    def kept(self, source_tokens: int, edit_tokens: int) -> Tensor | None:
        """Return [source tokens, edit tokens], 1 where a token of the edit stands for the same one of the clip.

        None where the attention's tokens are not the embeddings' own.
        """
        if (source_tokens, edit_tokens) != self.lengths:
            return None
        found = torch.zeros(source_tokens, edit_tokens)
        for source, edit in self.stays:
            found[source, edit] = 1
        return found


def words_in(conditioning: Any) -> EditWords | None:
    """Return the edit's words that Edit Prompt stored in a CONDITIONING, or None without them."""
    found = (options.get(WORDS_KEY) for _, options in conditioning)
    return next((words for words in found if isinstance(words, EditWords)), None)


# A word: the ids of its tokens, and their positions in the text embedding.
Word = tuple[tuple[Any, ...], tuple[int, ...]]


def aligned(source: Sequence[Word], edit: Sequence[Word]) -> tuple[set[int], set[int], list[tuple[int, int]]]:
    """Align two sentences word by word; return numbers of words that go, that are new, and pairs that stay."""
    matcher = SequenceMatcher(None, [word[0] for word in source], [word[0] for word in edit], autojunk=False)
    pairs = [
        (block.a + offset, block.b + offset) for block in matcher.get_matching_blocks() for offset in range(block.size)
    ]
    goes = set(range(len(source))) - {a for a, _ in pairs}
    new = set(range(len(edit))) - {b for _, b in pairs}
    return goes, new, pairs


def occurrences(named: Sequence[Word], sentence: Sequence[Word]) -> set[int]:
    """Return the numbers of the words of a sentence that are among the named ones."""
    wanted = {word[0] for word in named}
    return {number for number, word in enumerate(sentence) if word[0] in wanted}


def positions(words: Sequence[Word], numbers: set[int]) -> tuple[int, ...]:
    """Return the positions of all tokens of some words."""
    return tuple(position for number in sorted(numbers) for position in words[number][1])
