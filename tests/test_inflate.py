"""Inflation of any UNet: what it equals, what it leaves alone, what it refuses."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import comfy.model_management
import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core import host, temporal
from tune_a_video.tav_core import unet as unet_parts
from tune_a_video.tav_core.attention import attend, gather_frames, shuffled_groups, temporal_attend
from tune_a_video.tav_core.host import inflated_model
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.norm import pooled_group_norm
from tune_a_video.tav_core.tuning.trainable import in_scope
from unets import UNETS, build_model

SIZES = ["tiny", "tiny-v", "tiny-sdxl"]


def random_motion(model: Any, seed: int = 1, scale: float = 0.1) -> Motion:
    """A motion in which every weight matters."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: Any) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    tensors = {key.replace(".weight", ".diff"): drawn(shape) for key, shape in host.query_shapes(model).items()}
    for key, value in temporal.initial_temporal(host.unet_of(model), lambda path: True, seed).items():
        tensors[key] = value + drawn(value.shape)
    return Motion(tensors)


def conditioning(model: Any, rows: int = 1, seed: int = 2) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(rows, 7, host.context_width(model), generator=generator)
    return [[embedding, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


def latent(frames: int = 3, seed: int = 3) -> Tensor:
    return torch.randn(frames, 4, 8, 12, generator=torch.Generator().manual_seed(seed))


def sample(model: Any, x: Tensor, positive: Any, negative: Any = None, guidance: float = 1.0) -> Tensor:
    """One Euler step through the host's guider."""
    with torch.inference_mode():
        sigmas = torch.tensor([5.0, 1.0])

        def step(denoiser: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **_: Any) -> Tensor:
            return denoiser(x, sigmas[0] * x.new_ones([x.shape[0]]), **extra_args)

        return host.run_sampler(model, step, sigmas, (positive, negative or positive), guidance, x)


@pytest.mark.parametrize(
    ("mode", "looks_at"),
    [
        ("sparse-causal", [[0, 0], [0, 0], [0, 1], [0, 2]]),
        ("first frame only", [[0], [0], [0], [0]]),
        ("full", [[0, 1, 2, 3]] * 4),
        ("per frame", [[0], [1], [2], [3]]),
        ("self, first and previous", [[0, 0, 0], [1, 0, 0], [2, 0, 1], [3, 0, 2]]),
    ],
)
def test_gathered_keys_are_those_of_the_frames_that_are_looked_at(mode: Any, looks_at: list[list[int]]) -> None:
    frames, videos, tiles, n, c = 4, 2, 3, 5, 6
    tokens = torch.randn(videos * frames * tiles, n, c)
    by_frame = tokens.view(videos, frames, tiles, n, c)
    gathered = gather_frames(tokens, frames, videos, mode)
    assert gathered.shape == (videos * frames * tiles, len(looks_at[0]) * n, c)
    gathered = gathered.view(videos, frames, tiles, -1, c)
    for i, keys in enumerate(looks_at):
        assert torch.equal(gathered[:, i], torch.cat([by_frame[:, k] for k in keys], dim=2))


@pytest.mark.parametrize("frames", [1, 3, 4, 6, 8, 9])
def test_frames_of_a_shuffled_group_see_each_other(frames: int) -> None:
    seen = [shuffled_groups(frames, seed) for seed in range(9)]
    for groups in seen:
        members = [set(row.tolist()) for row in groups]
        assert all(len(row) == groups.shape[1] == min(4, frames) for row in members)
        assert all(frame in row for frame, row in enumerate(members))
        # Whole groups are closed: whom a frame sees sees the same.
        closed = [row for row in members if members.count(row) == len(row)]
        assert len(closed) >= frames // 4 * 4
    assert frames <= 4 or any(not torch.equal(groups, seen[0]) for groups in seen)
    tokens = torch.arange(frames, dtype=torch.float32).view(frames, 1, 1)
    gathered = gather_frames(tokens, frames, 1, "shuffled groups", shuffle=3)
    assert torch.equal(gathered[..., 0].long(), seen[3])


def test_shuffled_groups_are_those_of_the_step_for_all_conditionings() -> None:
    model = build_model(UNETS["tiny"])
    grouped = host.inflate_model(model, Inflation("shuffled groups"))
    x, a, b = latent(6), conditioning(model, seed=5), conditioning(model, seed=6)
    alone = [sample(grouped, x, each) for each in (a, b)]
    guided = sample(grouped, x, a, b, guidance=3.0)
    torch.testing.assert_close(guided, alone[1] + 3 * (alone[0] - alone[1]), rtol=1e-3, atol=1e-3)


def test_rows_that_are_no_whole_videos_are_refused() -> None:
    with pytest.raises(ValueError, match="5 attention rows"):
        gather_frames(torch.zeros(5, 2, 2), 2, 2, "sparse-causal")


def test_temporal_attention_is_attention_over_the_frames_of_each_pixel() -> None:
    frames, videos, n, heads, d = 5, 2, 3, 2, 4
    q, k, v = (torch.randn(videos * frames, n, heads * d) for _ in range(3))
    out = temporal_attend(q, k, v, heads, frames).view(videos, frames, n, -1)
    for video in range(videos):
        for pixel in range(n):
            rows = [t.view(videos, frames, n, -1)[video, :, pixel][None] for t in (q, k, v)]
            torch.testing.assert_close(out[video, :, pixel], attend(*rows, heads)[0])


@pytest.mark.parametrize("silu", [False, True])
def test_pooled_group_norm_is_group_norm_of_the_video(silu: bool) -> None:
    frames, videos, c, groups = 3, 2, 8, 4
    x = torch.randn(videos * frames, c, 4, 5, dtype=torch.float64, requires_grad=True) + 2
    weight, bias = torch.randn(c, dtype=torch.float64), torch.randn(c, dtype=torch.float64)
    ours = pooled_group_norm(x, frames, groups, weight, bias, 1e-5, silu)
    five_d = x.unflatten(0, (videos, frames)).transpose(1, 2)
    theirs = torch.nn.functional.group_norm(five_d, groups, weight, bias, 1e-5).transpose(1, 2).flatten(0, 1)
    theirs = torch.nn.functional.silu(theirs) if silu else theirs
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(x)
    (ours_dx,) = torch.autograd.grad(ours, x, g, retain_graph=True)
    (theirs_dx,) = torch.autograd.grad(theirs, x, g)
    torch.testing.assert_close(ours_dx, theirs_dx, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_one_frame_of_a_fresh_inflation_is_the_plain_model(size: str) -> None:
    model = build_model(UNETS[size], prediction="v" if size == "tiny-v" else "epsilon")
    fresh = Motion(temporal.initial_temporal(host.unet_of(model), lambda path: True, 0))
    x, cond = latent(1), conditioning(model)
    torch.testing.assert_close(
        sample(host.inflate_model(model, Inflation(), fresh), x, cond), sample(model, x, cond), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("size", SIZES)
def test_every_part_of_the_inflation_matters(size: str) -> None:
    model = build_model(UNETS[size])
    motion, x, cond = random_motion(model), latent(), conditioning(model)

    def run(inflation: Inflation, motion: Motion | None = motion, strength: float = 1.0) -> Tensor:
        return sample(host.inflate_model(model, inflation, motion, strength), x, cond)

    full = run(Inflation())
    variants = {
        "plain": sample(model, x, cond),
        "no motion": run(Inflation(), None),
        "first frame": run(Inflation("first frame only")),
        "full": run(Inflation("full")),
        "per frame": run(Inflation("per frame")),
        "with itself": run(Inflation("self, first and previous")),
        "norm per frame": run(Inflation(pool_group_norm=False)),
        "temporal off": run(Inflation(temporal_strength=0)),
        "temporal half": run(Inflation(temporal_strength=0.5)),
        "queries off": run(Inflation(), strength=0),
    }
    for name, other in variants.items():
        assert float((full - other).norm() / full.norm()) > 1e-4, name
    nothing = run(Inflation("per frame", False, 0.0), strength=0)
    torch.testing.assert_close(nothing, variants["plain"], rtol=1e-4, atol=1e-4)


def test_frames_of_one_video_do_not_reach_into_another() -> None:
    """Conditionings that the host batches: batched, alone, and in any number, all give the same."""
    model = build_model(UNETS["tiny"])
    inflated = host.inflate_model(model, Inflation(), random_motion(model))
    x = latent()
    a, b, c = (conditioning(model, seed=seed) for seed in (5, 6, 7))
    alone = [sample(inflated, x, cond) for cond in (a, b, c)]
    guided = sample(inflated, x, a, b, guidance=3.0)
    torch.testing.assert_close(guided, alone[1] + 3 * (alone[0] - alone[1]), rtol=1e-3, atol=1e-3)
    combined = sample(inflated, x, a + c, b, guidance=3.0)
    mean = (alone[0] + alone[2]) / 2
    torch.testing.assert_close(combined, alone[1] + 3 * (mean - alone[1]), rtol=1e-3, atol=1e-3)


def test_a_motion_serves_clips_of_any_length() -> None:
    """As the parts that VideoHelperSuite's meta batches queue one after the other: the last one is shorter."""
    model = build_model(UNETS["tiny"])
    inflated = host.inflate_model(model, Inflation(), random_motion(model))
    long, short = (sample(inflated, latent()[:frames], conditioning(model)) for frames in (3, 2))
    # Norms and temporal attention see a clip as a whole, so its parts differ.
    assert long.shape[0] == 3 and short.shape[0] == 2 and float((long[:2] - short).abs().max()) > 1e-3


def test_the_model_is_itself_again_after_a_call_that_failed() -> None:
    model = build_model(UNETS["tiny"])
    unet = host.unet_of(model)
    before = sample(model, latent(), conditioning(model))
    state = {name: dict(module.__dict__) for name, module in unet.named_modules()}
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    inflated = host.inflate_model(model, Inflation(), random_motion(model))

    class CancelledError(Exception):
        pass

    def cancel(*_: Any) -> None:
        raise CancelledError

    handle = unet.output_blocks[0][0].register_forward_hook(cancel)
    with pytest.raises(CancelledError):
        sample(inflated, latent(), conditioning(model))
    handle.remove()
    for name, module in unet.named_modules():
        assert module.__dict__.get("forward") is state[name].get("forward"), name
    assert torch.equal(sample(model, latent(), conditioning(model)), before)
    comfy.model_management.unload_all_models()
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())
    assert set(unet.state_dict()) == set(weights)


def test_a_swap_by_another_pack_survives() -> None:
    model = build_model(UNETS["tiny"])
    block = next(iter(unet_parts.transformer_blocks(host.unet_of(model)).values()))
    calls = []
    original = block.forward

    def theirs(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = theirs
    sample(host.inflate_model(model, Inflation(), random_motion(model)), latent(), conditioning(model))
    assert calls and block.forward is theirs


@pytest.mark.comfyui
def test_inflating_twice_is_inflating_once() -> None:
    model = build_model(UNETS["tiny"])
    first, second = random_motion(model, 1), random_motion(model, 2)
    x, cond = latent(), conditioning(model)
    once = sample(host.inflate_model(model, Inflation(), second), x, cond)
    other = {"diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight": 0.3}
    twice = host.inflate_model(host.inflate_model(model, Inflation(), first), Inflation(), second)
    assert torch.equal(sample(twice, x, cond), once)
    plain = sample(model, x, cond)
    assert torch.equal(sample(host.without_inflation(twice), x, cond), plain)

    # Patches of other nodes, made before or after, stay when the inflation goes.
    patched = model.clone()
    key = next(iter(other))
    patch = {key: ("diff", (torch.full(model.model_state_dict()[key].shape, 0.01),))}
    patched.add_patches(patch)
    inflated = host.inflate_model(model, Inflation(), first)
    inflated.add_patches(patch)
    assert torch.equal(sample(host.without_inflation(inflated), x, cond), sample(patched, x, cond))


@pytest.mark.comfyui
def test_carried_motion_has_its_strengths_applied() -> None:
    model = build_model(UNETS["tiny"])
    motion, x, cond = random_motion(model), latent(), conditioning(model)
    weak = host.inflate_model(model, Inflation(temporal_strength=0.5), motion, query_strength=0.3)
    carried = host.carried_motion(weak)
    again = sample(host.inflate_model(model, Inflation(), carried), x, cond)
    torch.testing.assert_close(again, sample(weak, x, cond), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tuned_for", "told"), [("v", True), ("epsilon", False), (None, False)])
def test_a_motion_of_another_prediction_is_told(
    tuned_for: str | None, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The shapes of SD 2.1 and of its base model are the same."""
    model = build_model(UNETS["tiny"])
    metadata = {} if tuned_for is None else {"prediction_type": tuned_for}
    host.inflate_model(model, Inflation(), Motion(random_motion(model).tensors, metadata))
    assert ("predicts v, and this one predicts epsilon" in caplog.text) is told


def test_scopes() -> None:
    blocks = unet_parts.transformer_blocks(host.unet_of(build_model(UNETS["tiny"])))
    later = [path for path in blocks if in_scope(path, "middle and up")]
    assert {path.split(".")[0] for path in blocks} == {"input_blocks", "middle_block", "output_blocks"}
    assert {path.split(".")[0] for path in later} == {"middle_block", "output_blocks"}


def test_sd15_has_the_papers_parameters() -> None:
    """74.35 M trained, in 16 blocks, on the shapes alone."""
    config = {**UNETS["sd15"], "device": "meta"}
    import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel

    unet = openaimodel.UNetModel(**config)
    shapes = unet_parts.query_shapes(unet)
    temporal = sum(4 * a * b + a for key, (a, b) in shapes.items() if ".attn1." in key)
    queries = sum(a * b for a, b in shapes.values())
    assert len(unet_parts.transformer_blocks(unet)) == 16
    assert round((temporal + queries) / 1e6, 2) == 74.35


def test_models_without_a_unet_are_refused() -> None:
    model = build_model(UNETS["tiny"])
    model.model.diffusion_model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has no UNet with spatial transformer blocks.*Stable Diffusion"):
        host.inflate_model(model, Inflation())


def test_unknown_prediction_types_are_refused() -> None:
    import comfy.model_sampling

    model = build_model(UNETS["tiny"])

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    model.add_object_patch("model_sampling", Flow())
    with pytest.raises(ValueError, match="neither epsilon- nor v-prediction"):
        host.prediction_type(model)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(2, 16, 8, 8), "16 channels, the model takes 4"),
        (torch.zeros(1, 4, 3, 8, 8), r"frames must lie on the batch axis"),
        (torch.zeros(0, 4, 8, 8), "empty"),
        (torch.full((2, 4, 8, 8), float("nan")), "not finite"),
    ],
)
def test_latents_that_do_not_suit_the_model_are_refused(samples: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^latent: .*{message}"):
        host.check_latent(build_model(UNETS["tiny"]), {"samples": samples})


def test_conditionings_that_do_not_suit_are_refused() -> None:
    model = build_model(UNETS["tiny"])
    host.check_conditioning(model, "positive", conditioning(model), 3)
    host.check_conditioning(model, "positive", conditioning(model, rows=3), 3)
    with pytest.raises(ValueError, match="^positive: it is empty"):
        host.check_conditioning(model, "positive", [], 3)
    with pytest.raises(ValueError, match="^positive: it holds 2 text embeddings for 3 frames"):
        host.check_conditioning(model, "positive", conditioning(model, rows=2), 3)
    with pytest.raises(ValueError, match="^positive: its text embedding is 1024 wide.*takes 32"):
        host.check_conditioning(model, "positive", [[torch.zeros(1, 7, 1024), {}]], 3)


def test_forwards_are_made_once_and_again_when_the_unet_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk over all modules takes longer than a small evaluation."""
    model = build_model(UNETS["tiny"])
    unet, x, cond = host.unet_of(model), latent(), conditioning(model)
    motion = random_motion(model)
    inflated, walks = host.inflate_model(model, Inflation(), motion), []
    parts_of = inflated_model.parts_of
    monkeypatch.setattr(inflated_model, "parts_of", lambda unet: walks.append(1) or parts_of(unet))
    first = sample(inflated, x, cond)
    assert torch.equal(sample(inflated, x, cond), first) and len(walks) == 1
    other = sample(inflated, latent(2), cond)
    assert torch.equal(sample(host.inflate_model(model, Inflation(), motion), latent(2), cond), other)

    # Another pack exchanges a block for one of its own, and puts it back.
    walks.clear()
    path, block = next(iter(unet_parts.transformer_blocks(unet).items()))
    parent = unet.get_submodule(path.rpartition(".")[0])
    theirs = copy.deepcopy(block)
    with torch.inference_mode():
        theirs.attn1.to_v.weight.mul_(2)
    parent[0] = theirs
    changed = sample(inflated, x, cond)
    assert len(walks) == 1 and float((changed - first).abs().max()) > 1e-3
    assert "forward" not in vars(theirs)
    parent[0] = block
    assert torch.equal(sample(inflated, x, cond), first) and len(walks) == 2

    # And gives the block a forward of its own, which stays part of the sum while it is there.
    block.forward = lambda *args, **kwargs: 0.5 * type(block).forward(block, *args, **kwargs)
    halved = sample(inflated, x, cond)
    fresh = sample(host.inflate_model(model, Inflation(), motion), x, cond)
    assert torch.equal(halved, fresh) and not torch.equal(halved, first)
    del block.forward
    assert torch.equal(sample(inflated, x, cond), first)


def test_what_was_made_for_a_unet_goes_with_it() -> None:
    """The next model to be loaded needs its memory, even while the node's result is cached."""
    model = build_model(UNETS["tiny"])
    inflated = host.inflate_model(model, Inflation(), random_motion(model))
    x, cond = latent(), conditioning(model)
    sample(inflated, x, cond)
    wrapper = inflated.get_wrappers("apply_model", "tune-a-video") if hasattr(inflated, "get_wrappers") else None
    comfy.model_management.unload_all_models()
    weight = weakref.ref(host.unet_of(model).input_blocks[1][0].in_layers[0])
    del model, inflated
    gc.collect()
    assert weight() is None and (wrapper is None or wrapper)
