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

    def kept(self) -> Tensor:
        """Return ``lengths`` zeros, and 1 where a token of the edit stands for the same one of the clip."""
        found = torch.zeros(self.lengths)
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


def phrases(named: Sequence[Word], marks: Sequence[Word]) -> list[list[Word]]:
    """Split words where a punctuation mark stands; marks alone are one phrase."""
    ids = {mark[0] for mark in marks}
    found: list[list[Word]] = [[]]
    for word in named:
        if word[0] in ids:
            found.append([])
        else:
            found[-1].append(word)
    return [phrase for phrase in found if phrase] or [list(named)]


def occurrences(phrase: Sequence[Word], sentence: Sequence[Word]) -> set[int]:
    """Return the numbers of the words of a sentence that a phrase names; none if one of its words is not there.

    Where the sentence has the phrase as such, only there: "the snow" does not name every "the".
    """
    wanted, words = [word[0] for word in phrase], [word[0] for word in sentence]
    starts = [at for at in range(len(words)) if words[at : at + len(wanted)] == wanted]
    if starts:
        return {at + offset for at in starts for offset in range(len(wanted))}
    return {number for number, word in enumerate(words) if word in wanted} if set(wanted) <= set(words) else set()


def positions(words: Sequence[Word], numbers: set[int]) -> tuple[int, ...]:
    """Return the positions of all tokens of some words."""
    return tuple(position for number in sorted(numbers) for position in words[number][1])
