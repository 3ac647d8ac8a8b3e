"""The nodes of edit control: presets and their parts, words, guider, masks, and what they refuse."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pack_nodes
import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core import host
from tune_a_video.tav_core.control.settings import PRESETS, Control
from tune_a_video.tav_core.control.words import words_in
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.tiny_sd import model as tiny_sd

pytestmark = pytest.mark.comfyui

STEPS = 3
SOURCE, EDIT = "a blue heart on sand, painting", "a purple star on sand, painting"
CLIP = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) / 0.18215


def out(node_output: Any) -> tuple[Any, ...]:
    return tuple(node_output.args if hasattr(node_output, "args") else node_output.result)


@pytest.fixture(scope="module")
def demo() -> Any:
    """The demo's model, inflated, and its CLIP."""
    with torch.inference_mode():
        model, clip, _ = tiny_sd.load()
        return host.inflate_model(model, Inflation()), clip


@pytest.fixture(autouse=True)
def on_the_server() -> Any:
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


def inverted(demo: Any, **options: Any) -> dict[str, Any]:
    source = out(pack_nodes.EditPrompt.execute(demo[1], SOURCE, EDIT, "empty prompt"))[0]
    return dict(out(pack_nodes.DDIMInvert.execute(demo[0], {"samples": CLIP}, source, STEPS, **options))[0])


@pytest.fixture(scope="module")
def latent(demo: Any) -> dict[str, Any]:
    with torch.inference_mode():
        return inverted(demo)


def sampled(demo: Any, latent: dict[str, Any], control: Control | None, edit: str = EDIT) -> tuple[Tensor, Tensor]:
    _, positive, negative = out(pack_nodes.EditPrompt.execute(demo[1], SOURCE, edit, "empty prompt"))
    edited, mask = out(
        pack_nodes.TAVSample.execute(demo[0], positive, negative, latent, STEPS, 5.0, 0.0, 0, control=control)
    )
    return edited["samples"], mask


def test_words_that_stay_go_and_are_new(demo: Any) -> None:
    source, positive, _ = out(pack_nodes.EditPrompt.execute(demo[1], SOURCE, EDIT, "empty prompt"))
    words = words_in(positive)
    assert words is not None and words_in(source) is words
    # Token 0 starts the sentence; "sand" is followed by a comma of its own.
    assert (words.goes, words.new) == ((2, 3), (2, 3))
    assert {(1, 1), (4, 4), (5, 5)} <= set(words.stays) and (2, 2) not in words.stays


def test_a_longer_sentence_shifts_the_words_that_stay(demo: Any) -> None:
    words = words_in(
        out(pack_nodes.EditPrompt.execute(demo[1], "a heart on sand", "a blue heart on sand", "empty prompt"))[1]
    )
    assert words is not None and (words.goes, words.new) == ((), (2,))
    assert {(1, 1), (2, 3), (3, 4), (4, 5)} <= set(words.stays)


def test_named_words_take_the_place_of_found_ones(demo: Any) -> None:
    arguments = demo[1], SOURCE, EDIT, "empty prompt"
    words = words_in(out(pack_nodes.EditPrompt.execute(*arguments, words_that_go="sand"))[1])
    assert words is not None and words.goes == (5,) and words.new == (2, 3)
    with pytest.raises(Refusal, match="^words_that_go: 'grass' names words that are not in the sentence"):
        pack_nodes.EditPrompt.execute(*arguments, words_that_go="grass")
    with pytest.raises(Refusal, match="^new_words: 'heart' names words that are not in the sentence"):
        pack_nodes.EditPrompt.execute(*arguments, new_words="heart")


@pytest.mark.parametrize(
    ("named", "goes"),
    [
        ("blue, heart", (2, 3)),  # the commas of a list are no words of it
        ("heart.", (3,)),
        ("(HEART:1.3), sand", (3, 6)),
        ("sand heart", (3, 6)),
        ("on sand", (5, 6)),
        ("a heart", (1, 3)),  # no phrase of the sentence: each of its words
        (",", (4, 7)),
    ],
)
def test_named_words_are_a_list(demo: Any, named: str, goes: tuple[int, ...]) -> None:
    sentence = "a blue heart, on sand, painting"
    positive = out(pack_nodes.EditPrompt.execute(demo[1], sentence, EDIT, "empty prompt", words_that_go=named))[1]
    words = words_in(positive)
    assert words is not None and words.goes == goes


def test_a_phrase_does_not_name_its_words_elsewhere(demo: Any) -> None:
    arguments = demo[1], "a heart on a sand", "a star", "empty prompt"
    words = words_in(out(pack_nodes.EditPrompt.execute(*arguments, words_that_go="a sand"))[1])
    assert words is not None and words.goes == (4, 5)


@pytest.mark.parametrize("named", ["grass, hill", "heart, grass", "grass heart", "a heart, , grass"])
def test_a_named_word_that_the_sentence_lacks_is_told(demo: Any, named: str) -> None:
    sentence = "a blue heart, on sand, painting"
    with pytest.raises(Refusal, match="^words_that_go: .* names words that are not in the sentence"):
        pack_nodes.EditPrompt.execute(demo[1], sentence, EDIT, "empty prompt", words_that_go=named)


def test_sentences_that_were_forgotten_are_refused_before_anything_runs() -> None:
    check = pack_nodes.EditPrompt.validate_inputs
    assert check(" ", "\n") == "both sentences are empty. Write what the clip shows and what the edit should show."
    assert [check(*each) for each in ((SOURCE, ""), ("", EDIT), (None, ""), ("", None))] == [True] * 4


def test_the_same_sentence_twice_is_told(demo: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    pack_nodes.EditPrompt.execute(demo[1], SOURCE, EDIT, "empty prompt")
    assert "same sentence" not in caplog.text
    pack_nodes.EditPrompt.execute(demo[1], SOURCE, f" {SOURCE}\n", "empty prompt")
    assert "source and edit are the same sentence" in caplog.text


def test_the_negative_prompt_is_empty_or_the_clips(demo: Any) -> None:
    for choice, text in (("empty prompt", ""), ("the clip's sentence", SOURCE)):
        negative = out(pack_nodes.EditPrompt.execute(demo[1], SOURCE, EDIT, choice))[2]
        assert torch.equal(negative[0][0], tiny_sd.encode(demo[1], text)[0][0])


def test_a_preset_is_itself_at_half_strength_and_parts_of_it_can_be_set() -> None:
    for name, preset in PRESETS.items():
        assert out(pack_nodes.EditControl.execute(name, 0.5)) == (preset,)
        assert not out(pack_nodes.EditControl.execute(name, 0.0))[0].acts
    (changed,) = out(
        pack_nodes.EditControl.execute(
            "colour", 0.5, self_share=0.25, blend_start=1.0, layers="all", attention_in_mask="the edit's"
        )
    )
    assert (changed.self_share, changed.blend_start, changed.layers, changed.free_inside) == (0.25, None, "all", True)
    assert changed.fresh_noise == PRESETS["colour"].fresh_noise
    with pytest.raises(Refusal, match="^strength: 2 is outside"):
        pack_nodes.EditControl.execute("colour", 2)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_with_a_mask_every_preset_keeps_the_clip_outside_it(demo: Any, latent: dict[str, Any], preset: str) -> None:
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    edited, found = sampled(demo, latent, out(pack_nodes.EditControl.execute(preset, 0.5, mask=mask))[0])
    clip = latent["tav_trajectory"].clip
    width = clip.shape[-1] // 2
    assert torch.equal(edited[..., width:], clip[..., width:])
    assert not torch.equal(edited[..., :width], clip[..., :width])
    assert found[..., :width].min() == 1 and found[..., width:].max() == 0
    (never,) = out(pack_nodes.EditControl.execute(preset, 0.5, mask=mask, blend_start=1.0))
    assert never.blend_start is None


def test_a_control_without_strength_is_todays_sampling(demo: Any, latent: dict[str, Any]) -> None:
    plain, mask = sampled(demo, latent, None)
    assert torch.equal(sampled(demo, latent, out(pack_nodes.EditControl.execute("object", 0.0))[0])[0], plain)
    assert mask.shape == (3, 8, 8) and mask.min() == 1


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "free"])
def test_every_preset_samples(demo: Any, latent: dict[str, Any], preset: str) -> None:
    edited, mask = sampled(demo, latent, out(pack_nodes.EditControl.execute(preset, 0.5))[0])
    assert torch.isfinite(edited).all() and mask.shape == (3, 8, 8)
    assert not torch.equal(edited, sampled(demo, latent, None)[0])


@pytest.mark.parametrize(
    ("preset", "said"), [("object", "in each of 2 steps, in which the clip is evaluated too"), ("free", "")]
)
def test_it_says_what_control_adds(
    demo: Any, latent: dict[str, Any], preset: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        sampled(demo, latent, replace(PRESETS[preset], proximal=0.5))
    (line,) = [text for text in caplog.messages if "edit control keeps" in text]
    assert line.endswith(said or "MB of the clip's trajectory in RAM")
    if said:
        kept = re.search(r"and ([0-9.]+) MB of its attention", line)
        assert kept and float(kept[1]) > 0


def test_a_noise_mask_is_the_controls_mask(demo: Any, latent: dict[str, Any]) -> None:
    noise_mask = torch.zeros(1, 1, 8, 8)
    noise_mask[..., :4] = 1
    edited, mask = sampled(demo, {**latent, "noise_mask": noise_mask}, PRESETS["object"])
    assert torch.equal(mask, noise_mask[0].expand(3, -1, -1))
    assert torch.equal(edited[..., 4:], CLIP[..., 4:]) and not torch.equal(edited[..., :4], CLIP[..., :4])


def test_a_guider_samples_what_the_node_samples(demo: Any, latent: dict[str, Any]) -> None:
    """Through SamplerCustomAdvanced with Euler at the levels of the inversion, twice."""
    import comfy.samplers
    from tune_a_video.tav_core import schedule

    _, positive, negative = out(pack_nodes.EditPrompt.execute(demo[1], SOURCE, EDIT, "empty prompt"))
    guider, mask = out(pack_nodes.EditGuider.execute(demo[0], positive, negative, latent, PRESETS["object"], 5.0))
    sigmas = schedule.sampling_sigmas(host.sigma_table(demo[0]), STEPS, "zero")
    start, euler = latent["samples"], comfy.samplers.sampler_object("euler")
    results = [
        guider.sample(torch.zeros_like(start), start, euler, sigmas, disable_pbar=True, seed=0) for _ in range(2)
    ]
    node = pack_nodes.TAVSample.execute(
        demo[0], positive, negative, latent, STEPS, 5.0, 0.0, 0, "zero", control=PRESETS["object"]
    )
    for result in results:
        assert float((result - out(node)[0]["samples"]).norm() / result.norm()) < 1e-5
    assert torch.equal(*results)
    # The mask is known before the sampling, and is the one that TAV Sample finds.
    assert torch.equal(mask, out(node)[1]) and 0 < mask.mean() < 1
    outside = (mask[:, None] == 0).expand_as(CLIP)
    assert torch.equal(results[0][outside], CLIP[outside])


def test_a_guider_takes_a_noise_mask_as_the_node_does(demo: Any, latent: dict[str, Any]) -> None:
    """Set Latent Noise Mask after DDIM Invert: the host would keep the inverted noise for the clip."""
    import comfy.samplers
    from tune_a_video.tav_core import schedule

    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    masked = {**latent, "noise_mask": mask}
    _, positive, negative = out(pack_nodes.EditPrompt.execute(demo[1], SOURCE, EDIT, "empty prompt"))
    for preset in ("object", "background"):
        guider, found = out(pack_nodes.EditGuider.execute(demo[0], positive, negative, masked, PRESETS[preset], 5.0))
        assert torch.equal(found, mask[0].expand(3, -1, -1))
        sigmas = schedule.sampling_sigmas(host.sigma_table(demo[0]), STEPS, "zero")
        start = latent["samples"]
        edited = guider.sample(
            torch.zeros_like(start),
            start,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            denoise_mask=mask,
            disable_pbar=True,
            seed=0,
        )
        assert float((edited - CLIP)[..., 4:].norm() / CLIP[..., 4:].norm()) < 1e-3
        node = pack_nodes.TAVSample.execute(
            demo[0], positive, negative, masked, STEPS, 5.0, 0.0, 0, "zero", control=PRESETS[preset]
        )
        assert float((edited - out(node)[0]["samples"]).norm() / edited.norm()) < 1e-3


def test_a_masked_clip_keeps_each_frames_noise_in_windows_with_freenoise(demo: Any, latent: dict[str, Any]) -> None:
    """FreeNoise overwrites the noise of later frames with that of the first ones, in place."""
    import comfy.patcher_extension
    import comfy.samplers
    from comfy import context_windows
    from tune_a_video.tav_core import schedule

    shuffled: list[bool] = []

    def freenoise(executor: Any, guider: Any, sigmas: Any, extra: Any, callback: Any, noise: Any, *rest: Any) -> Any:
        shuffled.append(extra["model_options"]["context_handler"].freenoise)
        if shuffled[-1]:
            noise[2:] = noise[:1]
        return executor(guider, sigmas, extra, callback, noise, *rest)

    def windowed(switched_on: bool) -> Any:
        model = demo[0].clone()
        handler = context_windows.IndexListContextHandler(
            context_windows.get_matching_context_schedule("standard_static"),
            context_windows.get_matching_fuse_method("pyramid"),
            context_length=2,
            context_overlap=1,
        )
        handler.freenoise = switched_on
        model.model_options["context_handler"] = handler
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, "test", freenoise)
        return model

    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    masked = {**latent, "noise_mask": mask}
    _, positive, negative = out(pack_nodes.EditPrompt.execute(demo[1], SOURCE, EDIT, "empty prompt"))
    sigmas = schedule.sampling_sigmas(host.sigma_table(demo[0]), STEPS, "zero")

    def node(model: Any, control: Any) -> Tensor:
        inputs = model, positive, negative, masked, STEPS, 5.0, 0.0, 0, "zero"
        return out(pack_nodes.TAVSample.execute(*inputs, control=control))[0]["samples"]

    def guided(model: Any, _: Any) -> Tensor:
        guider = out(pack_nodes.EditGuider.execute(model, positive, negative, masked, PRESETS["object"], 5.0))[0]
        start, euler = latent["samples"], comfy.samplers.sampler_object("euler")
        return guider.sample(
            torch.zeros_like(start), start, euler, sigmas, denoise_mask=mask, disable_pbar=True, seed=0
        )

    for edit, control in ((node, None), (node, PRESETS["object"]), (guided, None)):
        assert torch.equal(edit(windowed(True), control), edit(windowed(False), control))
    # Noise that a user draws may repeat.
    shuffled.clear()
    model, noise = windowed(True), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)
    assert shuffled == [True]


def test_a_guider_finds_its_mask_in_context_windows(demo: Any, latent: dict[str, Any]) -> None:
    """The clip has three frames, and the look for the mask two noise levels."""
    from comfy import context_windows

    model = demo[0].clone()
    schedule = context_windows.get_matching_context_schedule("standard_static")
    fuse = context_windows.get_matching_fuse_method("pyramid")
    model.model_options["context_handler"] = context_windows.IndexListContextHandler(
        schedule, fuse, context_length=2, context_overlap=1
    )
    _, positive, negative = out(pack_nodes.EditPrompt.execute(demo[1], SOURCE, EDIT, "empty prompt"))
    mask = out(pack_nodes.EditGuider.execute(model, positive, negative, latent, PRESETS["object"], 5.0))[1]
    node = pack_nodes.TAVSample.execute(
        model, positive, negative, latent, STEPS, 5.0, 0.0, 0, "zero", control=PRESETS["object"]
    )
    assert torch.equal(mask, out(node)[1]) and 0 < mask.mean() < 1


def test_a_guider_hands_a_given_mask_out(demo: Any, latent: dict[str, Any]) -> None:
    _, positive, negative = out(pack_nodes.EditPrompt.execute(demo[1], SOURCE, EDIT, "empty prompt"))
    given = torch.zeros(1, 64, 64)
    given[..., 20:36] = 1
    for control, columns in (({"mask": given}, slice(2, 5)), ({"preset": "style"}, slice(0, 8))):
        (made,) = out(pack_nodes.EditControl.execute(**{"preset": "object", "strength": 0.5, **control}))
        mask = out(pack_nodes.EditGuider.execute(demo[0], positive, negative, latent, made, 5.0))[1]
        expected = torch.zeros(3, 8, 8)
        expected[..., columns] = 1
        assert torch.equal(mask, expected)


def test_without_a_trajectory_control_is_refused(demo: Any) -> None:
    with pytest.raises(Refusal, match="^latent: it has no trajectory, which edit control needs"):
        sampled(demo, inverted(demo, trajectory="none"), PRESETS["object"])


def test_words_that_another_node_moved_are_refused(demo: Any, latent: dict[str, Any]) -> None:
    _, positive, negative = out(pack_nodes.EditPrompt.execute(demo[1], SOURCE, EDIT, "empty prompt"))
    longer = [[torch.cat([positive[0][0]] * 2, 1), positive[0][1]]]
    with pytest.raises(
        Refusal, match="^positive: its words cannot be aligned: Edit Prompt made 24 tokens, and it has 48"
    ):
        pack_nodes.TAVSample.execute(demo[0], longer, negative, latent, STEPS, 5.0, 0.0, 0, control=PRESETS["object"])


def test_a_mask_is_shown_over_frames_of_any_size() -> None:
    images = torch.rand(3, 16, 16, 3)
    mask = torch.zeros(1, 8, 8)
    mask[..., :4] = 1
    (shown,) = out(pack_nodes.ShowMask.execute(images, mask))
    assert torch.equal(shown[:, :, :8], images[:, :, :8])
    outside = shown[:, :, 8:]
    assert torch.equal(outside[..., 0], outside[..., 1]) and outside.mean() < 0.5 * images.mean()
    with pytest.raises(Refusal, match="^mask: it has 2 frames, the clip has 3"):
        pack_nodes.ShowMask.execute(images, torch.ones(2, 8, 8))
