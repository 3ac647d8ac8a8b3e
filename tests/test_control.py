"""Edit control on a real UNet: what it equals where it is off, full or masked, and that every way of running agrees."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import comfy.model_base
import pytest
import torch
from hints import controlnet, t2i_adapter
from torch import Tensor
from tune_a_video.tav_core import host
from tune_a_video.tav_core.control import injection
from tune_a_video.tav_core.control.settings import LAYERS, PRESETS, Control, at_strength
from tune_a_video.tav_core.control.trajectory import Trajectory
from tune_a_video.tav_core.control.words import WORDS_KEY, EditWords
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.inflate import Inflation, Layout
from tune_a_video.tav_core.pipeline import controlled, invert_and_keep, sample
from tune_a_video.tav_core.schedule import to_vp
from unets import UNETS, build_model

pytestmark = pytest.mark.comfyui

STEPS, FRAMES, HEIGHT, WIDTH = 5, 4, 8, 12
SIZES = ["tiny", "tiny-v", "tiny-sdxl"]
CLIP = torch.randn(FRAMES, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) / 0.18215
# The left half may change.
MASK = torch.zeros(1, HEIGHT, WIDTH)
MASK[..., : WIDTH // 2] = 1
EVERYTHING = Control(
    self_share=0.8,
    layers="all",
    cross_share=0.6,
    feature_share=0.4,
    free_inside=True,
    blend_start=0.2,
    fresh_noise=0.3,
    proximal=0.3,
    threshold=0.95,
)


def text(width: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(1, 7, width, generator=generator)
    return [[embedding, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


class Edit:
    """A tiny model, a clip's trajectory and the sentences of an edit that changes the third word."""

    def __init__(self, size: str = "tiny") -> None:
        prediction = "v" if size == "tiny-v" else "epsilon"
        self.model = host.inflate_model(build_model(UNETS[size], prediction=prediction), Inflation())
        self.source, self.positive, self.negative = (text(host.context_width(self.model), n) for n in range(3))
        stays = tuple((n, n) for n in range(7) if n != 3)
        self.positive[0][1][WORDS_KEY] = EditWords(self.source, (3,), (3,), stays, (7, 7))
        self.noise, self.trajectory = invert_and_keep(self.model, CLIP, self.source, STEPS)

    def run(self, control: Control | None, guidance: float = 3.0, **changes: Any) -> Tensor:
        positive = changes.pop("positive", self.positive)
        model, trajectory = changes.pop("model", self.model), changes.pop("trajectory", self.trajectory)
        with torch.inference_mode():
            run = control and controlled(model, control, trajectory, self.noise, positive)
            negative = changes.pop("negative", self.negative)
            return sample(model, self.noise, positive, negative, STEPS, guidance, control=run, **changes)


@pytest.fixture(scope="module", params=SIZES)
def any_edit(request: pytest.FixtureRequest) -> Edit:
    with torch.inference_mode():
        return Edit(request.param)


@pytest.fixture(scope="module")
def edit() -> Edit:
    with torch.inference_mode():
        return Edit()


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_no_control_and_control_at_strength_0_are_plain_sampling(edit: Edit) -> None:
    plain = edit.run(None)
    assert torch.equal(edit.run(Control()), plain)
    for preset in PRESETS.values():
        assert torch.equal(edit.run(at_strength(preset, 0.0)), plain)


@pytest.mark.parametrize("start", [0.0, 0.5, 1.0])
def test_a_mask_of_ones_leaves_the_sampling_bit_by_bit(any_edit: Edit, start: float) -> None:
    """The machinery runs, and changes nothing."""
    control = Control(blend_start=start, mask=torch.ones(1, HEIGHT, WIDTH))
    assert control.acts and torch.equal(any_edit.run(control), any_edit.run(None))


@pytest.mark.parametrize("control", [EVERYTHING, Control(blend_start=0.0), Control(self_share=1.0, blend_start=0.9)])
def test_a_mask_of_zeros_gives_the_clip_bit_by_bit(any_edit: Edit, control: Control) -> None:
    assert torch.equal(any_edit.run(replace(control, mask=torch.zeros(1, HEIGHT, WIDTH))), CLIP)


def test_outside_a_mask_the_clip_stays_bit_by_bit(any_edit: Edit) -> None:
    edited = any_edit.run(replace(EVERYTHING, mask=MASK))
    outside = (MASK == 0).expand(FRAMES, 4, -1, -1)
    assert torch.equal(edited[outside], CLIP[outside])
    assert off(edited[~outside], CLIP[~outside]) > 0.1


def test_full_control_with_the_clips_own_sentence_gives_the_reconstruction(any_edit: Edit) -> None:
    """On a trajectory that sampling follows exactly, the clip's branch is the edit's."""
    latents: list[Tensor] = []
    source = [[any_edit.source[0][0], any_edit.positive[0][1]]]

    def keep(step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        latents.append(x)

    reconstruction = any_edit.run(None, 1.0, positive=source, callback=keep)
    sigmas = any_edit.trajectory.sigmas
    scale = host.model_scale(any_edit.model)
    path = torch.stack([to_vp(x, sigma) / scale for x, sigma in zip(latents, sigmas[1:].flip(0), strict=True)]).flip(0)
    trajectory = Trajectory(reconstruction, path, sigmas, source)
    full = Control(self_share=1.0, layers="all", cross_share=1.0, feature_share=1.0)
    again = any_edit.run(full, 1.0, positive=source, trajectory=trajectory)
    assert off(again, reconstruction) < 1e-4
    edited, kept = (any_edit.run(control, 1.0, trajectory=trajectory) for control in (None, full))
    assert 1e-2 < off(kept, reconstruction) < off(edited, reconstruction)


@pytest.mark.parametrize(
    "name", ["self_share", "cross_share", "feature_share", "fresh_noise", "proximal", "blend_start"]
)
def test_every_lever_alone_changes_the_edit(any_edit: Edit, name: str) -> None:
    plain = any_edit.run(None)
    assert off(any_edit.run(Control(**{name: 0.5, "threshold": 0.95})), plain) > 1e-3


def test_layers_and_the_mask_of_the_attention_matter(edit: Edit) -> None:
    found = [edit.run(Control(self_share=0.8, layers=layers)) for layers in LAYERS]
    found.append(edit.run(Control(self_share=0.8, layers="all", free_inside=True, mask=MASK)))
    assert all(off(a, b) > 1e-4 for n, a in enumerate(found) for b in found[:n])


def test_a_mask_of_ones_and_one_of_zeros_bound_the_free_attention(edit: Edit) -> None:
    free = Control(self_share=0.8, free_inside=True)
    plain, injected = edit.run(None), edit.run(Control(self_share=0.8))
    torch.testing.assert_close(edit.run(replace(free, mask=torch.ones(1, 8, 8))), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(edit.run(replace(free, mask=torch.zeros(1, 8, 8))), injected, rtol=1e-4, atol=1e-4)


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say that two conditionings at once do not fit into memory."""
    needed = lambda self, shape, *_, **__: 1e30 if shape[0] > FRAMES else 1.0  # noqa: E731
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", needed)


@pytest.mark.parametrize("mask", [None, MASK])
def test_together_and_apart_agree(any_edit: Edit, mask: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    control = replace(EVERYTHING, mask=mask)
    together = any_edit.run(control)
    batches: list[int] = []
    original = type(any_edit.model.model).apply_model

    def counted(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batches.append(len(x))
        return original(self, x, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(any_edit.model.model), "apply_model", counted)
        apart(patched)
        separately = any_edit.run(control)
    assert set(batches) == {FRAMES}
    assert off(separately, together) < 1e-4


def test_combined_prompts_get_the_control_each(edit: Edit) -> None:
    """Three conditionings in a batch; a second positive one that is the first changes nothing."""
    control = replace(EVERYTHING, mask=MASK)
    twice = [*edit.positive, [edit.positive[0][0], dict(edit.positive[0][1])]]
    assert off(edit.run(control, positive=twice), edit.run(control)) < 1e-4


def longer(conditioning: Any, times: int = 2) -> Any:
    """The prompt with ``times`` as many tokens, as CLIP encodes a long text."""
    (embedding, options), other = conditioning[0], text(conditioning[0][0].shape[2], 9)[0][0]
    return [[torch.cat([embedding, *[other] * (times - 1)], 1), options]]


def test_a_longer_negative_prompt_leaves_the_words_known(edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host repeats the shorter text in a batch, and not where it evaluates the two apart."""
    control, negative = Control(cross_share=1.0), longer(edit.negative)
    together = edit.run(control, negative=negative)
    assert off(edit.run(None, negative=negative), together) > 1e-3
    apart(monkeypatch)
    assert off(edit.run(control, negative=negative), together) < 1e-4


def test_words_are_those_of_the_prompt_that_has_them(edit: Edit) -> None:
    """Beside a prompt that Edit Prompt did not make, the words are exchanged in its own alone."""
    call = injection.Call(injection.Step(Control(), None, CLIP, None, False, True, False), False, (0,), frozenset("a"))
    bound = call.bound(Layout(FRAMES, 3), CLIP, [0, 0, 1], ["b", "a", "c"])
    assert bound._positive == [False, True, False]
    other = text(edit.positive[0][0].shape[2], 8)
    cross = Control(cross_share=1.0)
    (alone,) = edit.positive
    mixed, plain = (edit.run(control, positive=[alone, *other]) for control in (cross, None))
    assert off(mixed, plain) > 1e-3
    first = edit.run(cross, positive=[*other, alone])
    assert off(first, mixed) < 1e-4


def test_several_sentences_of_the_clip_give_what_the_first_one_does(
    edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = Control(self_share=0.8, layers="all")
    positive = text(edit.positive[0][0].shape[2], 1)
    several = replace(edit.trajectory, conditioning=[*edit.source, *text(positive[0][0].shape[2], 7)])
    one = edit.run(control, positive=positive)
    assert off(edit.run(control, positive=positive, trajectory=several), one) < 1e-4
    apart(monkeypatch)
    assert off(edit.run(control, positive=positive, trajectory=several), one) < 1e-4


def test_a_compiled_unet_gets_every_lever(edit: Edit) -> None:
    """It was compiled by an evaluation without control."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    torch._dynamo.reset()
    compiled = edit.model.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    assert off(edit.run(None, model=compiled), edit.run(None)) < 1e-4
    for control in (Control(feature_share=0.8), PRESETS["style"]):
        assert off(edit.run(control, model=compiled), edit.run(control)) < 1e-4
    assert off(edit.run(None, model=compiled), edit.run(None)) < 1e-4
    torch._dynamo.reset()


def test_each_gpu_has_its_own_places_of_a_mask() -> None:
    step = injection.Step(
        Control(free_inside=True), None, CLIP, MASK[None].expand(FRAMES, -1, -1, -1), True, False, False
    )
    bound = injection.Call(step, False, tuple(range(FRAMES))).bound(Layout(FRAMES, 1), CLIP, [0])
    places = [bound._mixed(torch.zeros(FRAMES, HEIGHT * WIDTH, 2, device=device)) for device in ("cpu", "meta", "cpu")]
    assert [each.mask.device.type for each in places if each] == ["cpu", "meta", "cpu"]
    assert places[0] is places[2]


def test_guidance_1_leaves_the_negative_out(edit: Edit) -> None:
    control = replace(EVERYTHING, mask=MASK)
    one = edit.run(control, 1.0)
    assert torch.isfinite(one).all() and torch.equal(one, edit.run(control, 1.0, negative=edit.source))


def windowed(model: Any, length: int, shift: int = 0) -> Any:
    """Return the MODEL with context windows of ``length`` frames. With a ``shift``, the windows move by it and loop."""
    from comfy import context_windows

    def schedule(count: int, handler: Any, model_options: Any) -> list[list[int]]:
        return [[(start + shift + n) % count for n in range(length)] for start in range(0, count, length)]

    clone = model.clone()
    clone.model_options["context_handler"] = context_windows.IndexListContextHandler(
        context_windows.ContextSchedule("test", schedule),
        context_windows.get_matching_fuse_method("flat"),
        context_length=length,
    )
    return clone


def test_in_context_windows_the_trajectory_follows_its_window() -> None:
    """Frame by frame, windows are as good as the whole clip."""
    with torch.inference_mode():
        edit = Edit()
        edit.model = host.inflate_model(edit.model, Inflation("per frame", pool_group_norm=False))
        for control in (replace(EVERYTHING, mask=MASK), replace(EVERYTHING, proximal=0.0)):
            whole = edit.run(control)
            for shift in (0, 3):
                assert off(edit.run(control, model=windowed(edit.model, 2, shift)), whole) < 1e-4


@pytest.mark.parametrize("shared", [True, False])
def test_in_context_windows_hints_and_masks_of_clip_and_edit_follow(shared: bool) -> None:
    """The clip's prompt and the edit's, with the same ControlNet or one each, and a mask for each frame."""
    masks = torch.linspace(0.2, 1, FRAMES)[:, None, None].expand(-1, HEIGHT, WIDTH)
    with torch.inference_mode():
        edit = Edit()
        edit.model = host.inflate_model(edit.model, Inflation("per frame", pool_group_norm=False))
        net = controlnet(FRAMES)
        hinted = [[edit.source[0][0], {**edit.source[0][1], "control": net, "mask": masks}]]
        trajectory = replace(edit.trajectory, conditioning=hinted)
        theirs = net if shared else controlnet(FRAMES, previous=t2i_adapter(2))
        positive = [[edit.positive[0][0], {**edit.positive[0][1], "control": theirs}]]
        control = replace(EVERYTHING, mask=torch.linspace(0, 1, FRAMES)[:, None, None].expand(-1, HEIGHT, WIDTH))
        whole = edit.run(control, positive=positive, trajectory=trajectory)
        without = edit.run(control, positive=positive)
        assert off(without, whole) > 1e-3
        for shift in (0, 3):
            model = windowed(edit.model, 2, shift)
            assert off(edit.run(control, positive=positive, trajectory=trajectory, model=model), whole) < 1e-4


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("levers", [("self",), ("cross",), ("feature",), ("self", "cross", "feature")])
def test_the_clip_is_evaluated_no_further_than_is_kept_of_it(
    any_edit: Edit, levers: tuple[str, ...], layers: Any, windows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = {f"{lever}_share": 0.8 for lever in levers}
    control = Control(layers=layers, blend_start=0.2, mask=MASK, free_inside=True, **shares)
    model = windowed(any_edit.model, 2, shift=1) if windows else any_edit.model
    ends: list[int] = []
    head, forward = any_edit.model.model.diffusion_model.out, torch.nn.Sequential.forward

    def counted(self: Any, x: Tensor) -> Tensor:
        if self is head:
            ends.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Sequential, "forward", counted)
    short = any_edit.run(control, model=model)
    reached = len(ends)
    monkeypatch.setattr(injection, "shortcut", lambda *_: (None, []))
    assert torch.equal(short, any_edit.run(control, model=model))
    assert 0 < reached < len(ends) - reached


def test_with_deep_shrink_the_clip_is_evaluated_whole(edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes the size of latents midway, so that layers are at half size which are not so otherwise."""
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    node: Any = PatchModelAddDownscale()
    patch = getattr(node, "patch", None) or node.execute
    model = patch(edit.model, 1, 2.0, 0.0, 1.0, False, "bicubic", "bicubic")[0]
    control = Control(self_share=1.0, layers="half size and below")
    controlled = edit.run(control, model=model)
    monkeypatch.setattr(injection, "shortcut", lambda *_: (None, []))
    assert torch.equal(controlled, edit.run(control, model=model))


def test_a_mask_is_found_and_handed_out(any_edit: Edit) -> None:
    with torch.inference_mode():
        run = controlled(any_edit.model, EVERYTHING, any_edit.trajectory, any_edit.noise, any_edit.positive)
        assert run.mask is None
        edited = sample(any_edit.model, any_edit.noise, any_edit.positive, any_edit.negative, STEPS, 3.0, control=run)
        mask = run.mask
        assert mask is not None and mask.shape == (FRAMES, 1, HEIGHT, WIDTH) and 0 < mask.mean() < 1
        outside = (mask == 0).expand_as(CLIP)
        assert torch.equal(edited[outside], CLIP[outside])
        # It serves a second sampling.
        assert torch.equal(
            edited,
            sample(any_edit.model, any_edit.noise, any_edit.positive, any_edit.negative, STEPS, 3.0, control=run),
        )


def test_without_words_a_mask_is_found_as_well(edit: Edit) -> None:
    plain_text = [[edit.positive[0][0], {}]]
    control = Control(self_share=0.5, blend_start=0.2, free_inside=True)
    assert torch.equal(edit.run(control, positive=plain_text), edit.run(control))
    assert not torch.equal(edit.run(control), edit.run(Control(self_share=0.5)))


def test_the_clips_own_sentence_leaves_the_clip(edit: Edit) -> None:
    """The two sentences differ nowhere, so that there is no place to change."""
    own = edit.trajectory.conditioning
    assert torch.equal(edit.run(Control(blend_start=0.0), positive=own), CLIP)


def test_what_a_plain_model_samples_can_be_controlled(edit: Edit) -> None:
    plain = host.without_inflation(edit.model)
    control = replace(EVERYTHING, mask=MASK)
    inflated = host.inflate_model(plain, Inflation("per frame", pool_group_norm=False))
    assert torch.equal(edit.run(control, model=plain), edit.run(control, model=inflated))


def test_what_is_kept_of_the_clip_is_one_steps_and_goes_at_the_end(edit: Edit) -> None:
    with torch.inference_mode():
        run = controlled(edit.model, EVERYTHING, edit.trajectory, edit.noise, edit.positive)
        sizes: list[int] = []

        def callback(*_: Any) -> None:
            assert run._now is not None
            sizes.append(sum(kept.nbytes for kept in run._now[1].kept.values()))

        sample(edit.model, edit.noise, edit.positive, edit.negative, STEPS, 3.0, control=run, callback=callback)
        # Levers end one after the other.
        assert len(sizes) == STEPS and sizes[0] > sizes[-1] == 0 and sizes == sorted(sizes, reverse=True)
        assert run._now is None


def test_cancelled_at_any_step_the_model_is_its_own_again(edit: Edit) -> None:
    unet = host.unet_of(edit.model)
    before = edit.run(None)

    class CancelledError(Exception):
        pass

    for cancelled in range(STEPS):

        def callback(step: int, *_: Any, at: int = cancelled) -> None:
            if step == at:
                raise CancelledError

        with pytest.raises(CancelledError):
            edit.run(EVERYTHING, callback=callback)
        assert not any(module._forward_hooks or "forward" in vars(module) for module in unet.modules())
    assert torch.equal(edit.run(None), before)


def test_a_failure_inside_the_unet_leaves_no_hooks(edit: Edit) -> None:
    unet = host.unet_of(edit.model)
    handle = unet.output_blocks[0][0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        edit.run(EVERYTHING)
    handle.remove()
    assert not any(module._forward_hooks or "forward" in vars(module) for module in unet.modules())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(3, 8, 8), "mask: it has 3 frames, the clip has 4"),
        (torch.full((1, 8, 8), float("nan")), "mask: .*not finite"),
    ],
)
def test_masks_that_do_not_fit_are_refused(edit: Edit, mask: Tensor, message: str) -> None:
    with pytest.raises(Refusal, match=f"^{message}"):
        edit.run(Control(blend_start=0.2, mask=mask))


def test_latents_without_their_own_trajectory_are_refused(edit: Edit) -> None:
    with pytest.raises(Refusal, match="^latent: it has no trajectory, which edit control needs. Connect DDIM Invert"):
        controlled(edit.model, EVERYTHING, None, edit.noise, edit.positive)
    with pytest.raises(Refusal, match="^latent: its trajectory is of shape"):
        controlled(edit.model, EVERYTHING, edit.trajectory, edit.noise[:2], edit.positive)


def test_strength_goes_from_plain_to_full() -> None:
    for name, preset in PRESETS.items():
        assert at_strength(preset, 0.5) == preset, name
        full = at_strength(preset, 1.0)
        assert full.self_share == (1.0 if preset.self_share else 0.0) and full.fresh_noise == 0
    starts = [at_strength(PRESETS["colour"], strength).blend_start for strength in (0.1, 0.3, 0.5, 0.8, 1.0)]
    assert starts == sorted(starts, reverse=True, key=lambda start: start or 0.0) and starts[-1] == pytest.approx(0)


def test_above_half_strength_the_clip_comes_inside_the_mask_too(edit: Edit) -> None:
    """Outside it the clip is back at 0.5 already, so that more strength must act inside."""
    object_in_mask = replace(PRESETS["object"], mask=MASK)
    results = [edit.run(at_strength(object_in_mask, strength)) for strength in (0.5, 0.75, 1.0)]
    outside = (MASK == 0)[:, None].expand_as(results[0])
    for lower, higher in pairwise(results):
        assert torch.equal(lower[outside], higher[outside])
        assert off(higher[~outside], lower[~outside]) > 1e-3


def test_a_trajectory_at_other_numbers_of_steps(edit: Edit) -> None:
    """Sampling at other levels than the inversion's: between levels the path is a straight line."""
    with torch.inference_mode():
        run = controlled(edit.model, replace(EVERYTHING, mask=MASK), edit.trajectory, edit.noise, edit.positive)
        edited = sample(edit.model, edit.noise, edit.positive, edit.negative, 8, 3.0, control=run)
    assert torch.isfinite(edited).all()
    assert isinstance(edit.trajectory, Trajectory)
