"""Edit Prompt: the clip's sentence and a new one, as prompts that know which words change."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..tav_core import host
from .support.limits import within_limits
from .support.said import say
from .support.types import CATEGORY, search_aliases

NEGATIVES = ("empty prompt", "the clip's sentence")


class EditPrompt(io.ComfyNode):
    """Two sentences -> CONDITIONINGs that know which words stay, which go and which are new."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="TAV_EditPrompt",
            display_name="Edit Prompt (Tune-A-Video)",
            category=CATEGORY,
            **search_aliases("prompt to prompt", "word alignment"),
            description="Encodes the clip's sentence and the edit's, and finds the words that stay, go and are new. "
            "Edit Control uses them to keep what the words that stay describe.",
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of the model's own checkpoint."),
                io.String.Input("source", multiline=True, tooltip="The clip's sentence, as it was tuned."),
                io.String.Input("edit", multiline=True, tooltip="The same sentence with the change."),
                io.Combo.Input(
                    "negative_prompt",
                    options=list(NEGATIVES),
                    default=NEGATIVES[0],
                    tooltip="The negative prompt. empty prompt: as in the released code. the clip's sentence: keeps "
                    "more of the clip, and leads away from the words that go.",
                ),
                io.String.Input(
                    "words_that_go",
                    default="",
                    optional=True,
                    tooltip="Words of the clip's sentence that the edit changes. Empty: those that the edit lacks.",
                ),
                io.String.Input(
                    "new_words",
                    default="",
                    optional=True,
                    tooltip="Words of the edit that are new. Empty: those that the clip's sentence lacks.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="source", tooltip="The clip's sentence, for DDIM Invert."),
                io.Conditioning.Output(display_name="positive", tooltip="The edit's sentence, for TAV Sample."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt, for TAV Sample."),
            ],
        )

    @classmethod
    def validate_inputs(cls, source: str | None, edit: str | None) -> bool | str:
        """Refuse two empty sentences before anything runs. A linked sentence is None here."""
        if source is None or edit is None or source.strip() or edit.strip():
            return True
        return "both sentences are empty. Write what the clip shows and what the edit should show."

    @classmethod
    @within_limits
    def execute(
        cls, clip: Any, source: str, edit: str, negative_prompt: str, words_that_go: str = "", new_words: str = ""
    ) -> io.NodeOutput:
        """Refuses named words that are not in their sentence (ValueError)."""
        if source.split() == edit.split():
            say("source and edit are the same sentence: Edit Control finds nothing to change")
        negative = source if negative_prompt == NEGATIVES[1] else ""
        return io.NodeOutput(*host.encode_edit(clip, source, edit, words_that_go, new_words, negative))


NODES = [EditPrompt]
