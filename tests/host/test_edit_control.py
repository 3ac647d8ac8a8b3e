"""Edit control on a real server: every preset, the guider, and what it chains with."""

from __future__ import annotations

import pytest
import torch
from graphs import (
    FRAMES,
    HEIGHT,
    SOURCE_PROMPT,
    STEPS,
    WIDTH,
    Graph,
    checkpoint,
    clip_latent,
    context_windows,
    inflate,
    random_hints,
    relative_error,
    sample,
)

pytestmark = [pytest.mark.host, pytest.mark.shared]

PRESETS = ("style", "colour", "object", "background", "add or remove", "free")
EDIT = "a panda is skiing"


class Controlled:
    """A tuned model, the clip with its trajectory, and Edit Prompt's conditionings."""

    def __init__(self, motion_file: str) -> None:
        graph = self.graph = Graph()
        loaded = checkpoint(graph)
        motion = graph.add("TAV_LoadMotion", file=motion_file)[0]
        self.loaded, self.motion = loaded, motion
        self.model = inflate(graph, loaded.model, motion=motion)
        self.clip = clip_latent(graph, loaded.vae)
        prompt = graph.add(
            "TAV_EditPrompt", clip=loaded.clip, source=SOURCE_PROMPT, edit=EDIT, negative_prompt="empty prompt"
        )
        self.source, self.positive, self.negative = prompt[0], prompt[1], prompt[2]
        self.inverted = graph.add(
            "TAV_DDIMInvert", model=self.model, latent=self.clip, conditioning=self.source, steps=STEPS
        )[0]

    def control(self, preset="object", strength=0.5, **parts):
        return self.graph.add("TAV_EditControl", preset=preset, strength=strength, **parts)[0]

    def video(self, control=None, **changes):
        model = changes.pop("model", self.model)
        conds = changes.pop("positive", self.positive), changes.pop("negative", self.negative)
        given = {} if control is None else {"control": control}
        return sample(self.graph, model, *conds, self.inverted, **given, **changes)

    def left_half(self):
        """A mask of the left half, for all frames."""
        solid = self.graph.add("SolidMask", value=0.0, width=WIDTH, height=HEIGHT)[0]
        half = self.graph.add("SolidMask", value=1.0, width=WIDTH // 2, height=HEIGHT)[0]
        return self.graph.add("MaskComposite", destination=solid, source=half, x=0, y=0, operation="add")[0]


def test_every_preset(server, motion_file):
    edit = Controlled(motion_file)
    plain, off, *edits = server.latents(
        edit.graph,
        edit.video(),
        edit.video(edit.control(strength=0.0)),
        *(edit.video(edit.control(preset)) for preset in PRESETS),
    )
    assert torch.equal(off, plain) and torch.equal(edits[-1], plain)
    for preset, latent in zip(PRESETS[:-1], edits, strict=False):
        assert torch.isfinite(latent).all() and relative_error(latent, plain) > 1e-4, preset


def test_a_mask_keeps_the_clip_outside_bit_by_bit(server, motion_file):
    edit = Controlled(motion_file)
    clip, masked, nothing = server.latents(
        edit.graph,
        edit.clip,
        edit.video(edit.control(mask=edit.left_half())),
        edit.video(edit.control(mask=edit.graph.add("SolidMask", value=0.0, width=WIDTH, height=HEIGHT)[0])),
    )
    right = WIDTH // 16
    assert torch.equal(masked[..., right:], clip[..., right:]) and torch.equal(nothing, clip)
    assert relative_error(masked[..., :right], clip[..., :right]) > 1e-2


def test_the_guider_of_samplercustomadvanced(server, motion_file, exercised):
    edit = Controlled(motion_file)
    graph, control = edit.graph, edit.control("style")
    guider = graph.add(
        "TAV_EditGuider",
        model=edit.model,
        positive=edit.positive,
        negative=edit.negative,
        latent=edit.inverted,
        control=control,
        guidance=7.5,
    )[0]

    def custom(sampler):
        sigmas = graph.add("BasicScheduler", model=edit.model, scheduler="ddim_uniform", steps=STEPS, denoise=1.0)[0]
        return graph.add(
            "SamplerCustomAdvanced",
            noise=graph.add("DisableNoise")[0],
            guider=guider,
            sampler=graph.add("KSamplerSelect", sampler_name=sampler)[0],
            sigmas=sigmas,
            latent_image=edit.inverted,
        )[0]

    ours, euler, other = server.latents(
        graph, edit.video(control, last_step="zero"), custom("euler"), custom("dpmpp_2m")
    )
    assert relative_error(euler, ours) < 1e-4
    assert torch.isfinite(other).all() and relative_error(other, ours) > 1e-4
    exercised.append(f"Edit Guider against TAV Sample: relative difference {relative_error(euler, ours):.0e}")


def test_what_it_chains_with(server, motion_file):
    """LoRA, ControlNet with a hint for each frame, area and scheduled prompts, context windows, conditionings apart."""
    edit = Controlled(motion_file)
    graph, control = edit.graph, edit.control("object", mask=edit.left_half())
    lora = graph.add("LoraLoaderModelOnly", model=edit.model, lora_name="style.safetensors", strength_model=1.0)[0]
    net = graph.add("ControlNetLoader", control_net_name="control.safetensors")[0]
    hinted = graph.add(
        "ControlNetApplyAdvanced",
        positive=edit.positive,
        negative=edit.negative,
        control_net=net,
        image=random_hints(graph, FRAMES),
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    area = graph.add(
        "ConditioningSetArea", conditioning=edit.positive, width=64, height=HEIGHT, x=0, y=0, strength=1.0
    )[0]
    late = graph.add("ConditioningSetTimestepRange", conditioning=edit.positive, start=0.0, end=0.5)[0]
    both = graph.add("ConditioningCombine", conditioning_1=edit.positive, conditioning_2=late)[0]
    windows = context_windows(graph, edit.model)
    separate = graph.add("ProbeSeparateConds", model=edit.model)[0]
    clip, plain, *others = server.latents(
        graph,
        edit.clip,
        edit.video(control),
        edit.video(control, model=lora),
        edit.video(control, positive=hinted[0], negative=hinted[1]),
        edit.video(control, positive=area),
        edit.video(control, positive=both),
        edit.video(control, model=windows),
        edit.video(control, model=windows, positive=hinted[0], negative=hinted[1]),
        edit.video(control, model=separate),
    )
    assert relative_error(others.pop(), plain) < 1e-4
    right = WIDTH // 16
    for number, latent in enumerate(others):
        assert torch.isfinite(latent).all(), number
        assert torch.equal(latent[..., right:], clip[..., right:]), number
        if number != 3:  # a second helping of the same prompt changes nothing
            assert relative_error(latent, plain) > 1e-4, number


def test_the_guider_finds_the_mask_that_tav_sample_finds(server, motion_file):
    """As a MASK, and as a picture over the clip; outside it another sampler's result is the clip, too."""
    edit = Controlled(motion_file)
    graph, control = edit.graph, edit.control("object")
    prompts = {"positive": edit.positive, "negative": edit.negative}
    both = graph.add("TAV_EditGuider", model=edit.model, **prompts, latent=edit.inverted, control=control, guidance=7.5)
    guider, mask = both[0], both[1]
    sampled = graph.add(
        "TAV_Sample", model=edit.model, **prompts, latent=edit.inverted, control=control,
        steps=STEPS, guidance=7.5, eta=0.0, seed=0, last_step="zero",
    )  # fmt: skip
    custom = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("DisableNoise")[0],
        guider=guider,
        sampler=graph.add("KSamplerSelect", sampler_name="dpmpp_2m")[0],
        sigmas=graph.add("BasicScheduler", model=edit.model, scheduler="ddim_uniform", steps=STEPS, denoise=1.0)[0],
        latent_image=edit.inverted,
    )[0]
    images = graph.add("VAEDecode", samples=edit.clip, vae=edit.loaded.vae)[0]

    def shown(mask):
        return graph.add(
            "VAEEncode", pixels=graph.add("TAV_ShowMask", images=images, mask=mask)[0], vae=edit.loaded.vae
        )[0]

    clip, other, ours, of_guider, of_sample = server.latents(
        graph, edit.clip, custom, sampled[0], shown(mask), shown(sampled[1])
    )
    assert torch.equal(of_guider, of_sample)
    kept = (ours == clip).all(1, keepdim=True).expand_as(clip)
    assert 0 < kept.float().mean() < 1 and torch.equal(other[kept], clip[kept])
    assert relative_error(other[~kept], clip[~kept]) > 1e-2


def test_hooks_and_patches_beside_it(server, motion_file):
    """LoRA hooks, patches of attn2 as IPAdapter sets them, FreeU: each acts, and the clip stays outside the mask."""
    edit = Controlled(motion_file)
    graph = edit.graph
    control = edit.control("style", mask=edit.left_half(), blend_start=0.2)

    def hooked(strength):
        hooks = graph.add("CreateHookLora", lora_name="style.safetensors", strength_model=1.0, strength_clip=0.0)[0]
        keyframes = graph.add("CreateHookKeyframe", strength_mult=strength, start_percent=0.0)[0]
        hooks = graph.add("SetHookKeyframes", hooks=hooks, hook_kf=keyframes)[0]
        return graph.add(
            "ConditioningSetProperties", cond_NEW=edit.positive, strength=1.0, set_cond_area="default", hooks=hooks
        )[0]

    prompted = graph.add("ProbeImagePrompt", model=edit.model, strength=0.8, seed=5)[0]
    before = graph.add("ProbeImagePrompt", model=edit.loaded.model, strength=0.8, seed=5)[0]
    free_u = graph.add("FreeU_V2", model=edit.model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)[0]
    clip, plain, off, before, apart, *acting = server.latents(
        graph,
        edit.clip,
        edit.video(control),
        edit.video(control, positive=hooked(0.0)),
        edit.video(control, model=inflate(graph, before, motion=edit.motion)),
        edit.video(control, model=graph.add("ProbeSeparateConds", model=prompted)[0]),
        edit.video(control, positive=hooked(1.0)),
        edit.video(control, model=free_u),
        edit.video(control, model=prompted),
    )
    assert relative_error(off, plain) < 1e-5
    right = WIDTH // 16
    for latent in acting:
        assert torch.isfinite(latent).all() and relative_error(latent, plain) > 1e-4
        assert torch.equal(latent[..., right:], clip[..., right:])
    assert relative_error(before, acting[-1]) < 1e-4 and relative_error(apart, acting[-1]) < 1e-4


def test_offloaded_weights_and_guidance_1(server, motion_file):
    """As under --lowvram; and at guidance 1 the negative prompt is not asked."""
    edit = Controlled(motion_file)
    graph, control = edit.graph, edit.control("style")
    offloaded = graph.add("ProbeOffloaded", model=edit.loaded.model)[0]
    loaded, fetched, plain, one, other = server.latents(
        graph,
        edit.video(control),
        edit.video(control, model=inflate(graph, offloaded, motion=edit.motion)),
        edit.video(),
        edit.video(control, guidance=1.0),
        edit.video(control, guidance=1.0, negative=edit.source),
    )
    assert relative_error(fetched, loaded) < 0.05 * relative_error(loaded, plain)
    assert torch.equal(one, other) and relative_error(one, loaded) > 1e-4


def test_without_its_trajectory_one_sentence_says_what_to_do(server, motion_file):
    edit = Controlled(motion_file)
    bare = edit.graph.add(
        "TAV_DDIMInvert",
        model=edit.model,
        latent=edit.clip,
        conditioning=edit.source,
        steps=STEPS,
        trajectory="none",
    )[0]
    edit.inverted = bare
    edit.graph.add("SaveLatent", samples=edit.video(edit.control()), filename_prefix="none")
    result = server.run(edit.graph.nodes)
    with pytest.raises(Exception, match="it has no trajectory, which edit control needs"):
        result.raise_for_error()
