"""Wiring mistakes get a sentence, and graphs that merely look odd run."""

from __future__ import annotations

from typing import Any

import pack_nodes
import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core import host
from tune_a_video.tav_core.errors import Refusal
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.temporal import initial_temporal
from unets import UNETS, build_model

pytestmark = pytest.mark.comfyui
CLIP = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) / 0.18215
PROMPT: list[Any] = [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]


@pytest.fixture(autouse=True)
def on_the_server() -> Any:
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


def inflated(seed: int = 0, **options: Any) -> Any:
    model = build_model(UNETS["tiny"])
    motion = Motion(initial_temporal(host.unet_of(model), lambda path: True, seed))
    return host.inflate_model(model, Inflation(**options), motion.to(torch.float16))


def first(out: Any) -> dict[str, Any]:
    return (out.args if hasattr(out, "args") else out.result)[0]


def invert(model: Any, steps: int = 5, samples: Tensor = CLIP) -> dict[str, Any]:
    return first(pack_nodes.DDIMInvert.execute(model, {"samples": samples}, PROMPT, steps))


def sample(model: Any, latent: dict[str, Any], steps: int = 5) -> dict[str, Any]:
    return first(pack_nodes.TAVSample.execute(model, PROMPT, PROMPT, latent, steps, 1.0, 0.0, 0))


@pytest.mark.parametrize("samples", [CLIP, 1.5 * CLIP, torch.zeros_like(CLIP)], ids=["clean", "contrasty", "empty"])
def test_a_latent_that_was_not_inverted_is_refused(samples: Tensor) -> None:
    with pytest.raises(ValueError, match="latent: it was not inverted: .* Connect the output of DDIM Invert; .*bypass"):
        sample(inflated(), {"samples": samples}, steps=20)


def test_inverted_latents_from_anywhere_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    from nodes import LatentFromBatch, SetLatentNoiseMask

    model = inflated()
    inverted = invert(model)
    sample(model, inverted)
    (part,) = LatentFromBatch().frombatch(inverted, 0, 2)
    sample(model, part)
    (masked,) = SetLatentNoiseMask().set_mask(inverted, torch.ones(1, 64, 64))
    edited = sample(model, masked)
    assert set(edited) == {"samples"}
    # Save Latent keeps the samples alone: noise of the first level.
    noise = CLIP + 14.6 / 0.18215 * torch.randn(CLIP.shape, generator=torch.Generator().manual_seed(2))
    sample(model, {"samples": noise}, steps=20)
    assert "differ" not in caplog.text


@pytest.mark.parametrize("shape", [(2, 64, 64), (4, 1, 8, 8), (6, 8, 8)])
def test_a_noise_mask_of_another_length_is_refused_before_any_step(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = inflated()
    latent = {**invert(model), "noise_mask": torch.ones(shape)}
    monkeypatch.setattr(model.model, "apply_model", lambda *_, **__: pytest.fail("it was evaluated"))
    said = f"^latent: its noise mask has {shape[0]} frames, the clip has 3. Give"
    with pytest.raises(ValueError, match=said):
        sample(model, latent)
    with pytest.raises(ValueError, match=said):
        pack_nodes.DDIMInvert.execute(model, latent, PROMPT, 5)


def test_few_steps_begin_at_noise_too_low_to_judge() -> None:
    sample(inflated(), {"samples": CLIP}, steps=2)


@pytest.mark.parametrize(
    ("other", "steps", "said"),
    [
        ({}, 4, "steps 5 and 4"),
        ({"attention": "full"}, 5, "attention sparse-causal and full"),
        ({"seed": 1}, 5, "another motion"),
        ({}, 5, None),
    ],
)
def test_inversion_and_sampling_that_differ_are_named(
    other: dict[str, Any], steps: int, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    sample(inflated(**other), invert(inflated()), steps)
    assert (f"inversion and sampling differ ({said})" in caplog.text) if said else "differ" not in caplog.text


def test_another_familys_inversion_is_refused() -> None:
    model = inflated()
    latent = {"samples": CLIP, "tav_made_with": {**pack_nodes.made_with(model, 5), "family": "SDXL"}}
    with pytest.raises(ValueError, match="latent: it was inverted with SDXL .* Connect the same model"):
        pack_nodes.check_inverted(model, latent, 5)


@pytest.mark.parametrize(("family", "side", "warned"), [("SD1", 16, True), ("SD1", 32, False), ("SDXL", 32, True)])
def test_a_clip_far_below_the_familys_size_is_named(
    family: str, side: int, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_a_video.tav_core.host.inputs.family", lambda model: family)
    said = host.small_clip(inflated(), torch.zeros(2, 4, side, side)) or ""
    assert (f"the clip is {8 * side} x {8 * side}, and {family} was trained at" in said) == warned


def test_half_precision_latents_are_walked_in_float32() -> None:
    """Hosts with --fp16-intermediates encode in fp16."""
    inverted = invert(inflated(), samples=CLIP.half())["samples"]
    assert inverted.dtype == torch.float32
    assert torch.allclose(inverted, invert(inflated())["samples"], atol=0.05)


@pytest.mark.parametrize("shape", [(1, 0, 0), (1, 1, 0, 64), (64,)])
def test_an_empty_noise_mask_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(Refusal, match="^latent: its noise mask is empty"):
        pack_nodes.DDIMInvert.execute(inflated(), {"samples": CLIP, "noise_mask": torch.ones(shape)}, PROMPT, 2)


def test_a_noise_mask_of_booleans_is_taken() -> None:
    inverted = {**invert(inflated()), "noise_mask": torch.arange(64).reshape(1, 1, 1, 64).expand(1, 1, 64, 64) < 32}
    edited = first(pack_nodes.TAVSample.execute(inflated(), PROMPT, PROMPT, inverted, 5, 3.0, 0.0, 0))["samples"]
    assert torch.equal(edited[..., 5:], CLIP[..., 5:]) and not torch.allclose(edited[..., :3], CLIP[..., :3], atol=0.1)


@pytest.mark.parametrize("pooled", ["missing", None, (1, 768)])
def test_a_missing_pooled_embedding_is_named_before_any_step(pooled: Any) -> None:
    model = build_model({**UNETS["tiny-sdxl"], "adm_in_channels": 2816})
    options = {} if pooled == "missing" else {"pooled_output": pooled and torch.zeros(pooled)}
    with pytest.raises(Refusal, match="^conditioning: .* needs a pooled text embedding .*CLIP Text Encode"):
        pack_nodes.DDIMInvert.execute(model, {"samples": CLIP}, [[PROMPT[0][0], options]], 2)
    whole = [[PROMPT[0][0], {"pooled_output": torch.zeros(1, 1280)}]]
    assert "samples" in first(pack_nodes.DDIMInvert.execute(model, {"samples": CLIP}, whole, 2))


def test_what_a_checkpoint_does_not_have_is_named() -> None:
    with pytest.raises(Refusal, match="^model: its file has no UNet"):
        pack_nodes.InflateUNet.execute(None, "sparse-causal", "over frames", 1.0, 1.0)
    with pytest.raises(Refusal, match="^clip: the checkpoint has none. Connect Load CLIP"):
        pack_nodes.EditPrompt.execute(None, "a cat", "a dog", "empty prompt")


@pytest.mark.parametrize("latent", [None, {}, {"samples": None}, {"samples": [CLIP, CLIP]}])
def test_a_latent_without_frames_is_named(latent: Any) -> None:
    with pytest.raises(Refusal, match="^latent: it holds no frames. Encode"):
        pack_nodes.DDIMInvert.execute(inflated(), latent, PROMPT, 2)


def test_a_mask_of_other_values_than_zero_to_one_is_refused() -> None:
    """As bytes have it; the host would multiply what lies under it."""
    for mask in (255 * torch.ones(1, 8, 8), 255 * torch.ones(3, 8, 8, dtype=torch.uint8), -torch.ones(1, 8, 8)):
        with pytest.raises(Refusal, match="^latent: its noise mask holds values from .*0..1"):
            pack_nodes.DDIMInvert.execute(inflated(), {"samples": CLIP, "noise_mask": mask}, PROMPT, 2)
    host.check_latent(inflated(), {"samples": CLIP, "noise_mask": 1.02 * torch.ones(1, 8, 8)})


def ranges(*pairs: tuple[float, float]) -> list[Any]:
    return [[PROMPT[0][0], {"start_percent": start, "end_percent": end}] for start, end in pairs]


@pytest.mark.parametrize(
    ("pairs", "gap"),
    [
        ([(0.0, 0.5)], "0.5 and 1"),
        ([(0.3, 1.0)], "0 and 0.3"),
        ([(0.0, 0.4), (0.6, 1.0), (0.1, 0.2)], "0.4 and 0.6"),
        ([(0.4, 1.0), (0.0, 0.4)], None),
        ([(0.0, 0.5), (0.501, 1.0)], None),
        ([(0.2, 0.3), (0.0, 1.0)], None),
    ],
)
def test_timesteps_without_a_prompt_are_named(pairs: list[tuple[float, float]], gap: str | None) -> None:
    """The host takes an empty picture for what the model predicts there."""
    model = inflated()
    if gap is None:
        host.check_conditioning(model, "positive", ranges(*pairs), len(CLIP))
    else:
        with pytest.raises(Refusal, match=f"^positive: no prompt acts between {gap} of the steps"):
            pack_nodes.TAVSample.execute(model, ranges(*pairs), PROMPT, invert(model), 5, 3.0, 0.0, 0)


@pytest.mark.parametrize(
    "odd",
    [
        None,
        [],
        [[None, {}]],
        [[PROMPT[0][0], None]],
        [[PROMPT[0][0]]],
        [PROMPT[0][0]],
        [None],
        PROMPT[0][0],
        {"a": 1},
        [[[1.0], {}]],
    ],
    ids=lambda odd: type(odd).__name__,
)
@pytest.mark.parametrize("node", ["tune", "invert", "sample"])
def test_a_conditioning_that_is_none_is_named(odd: Any, node: str) -> None:
    """Other packs' nodes give what they like; the host, too, fails on these with Python's words."""
    model = build_model(UNETS["tiny"]) if node == "tune" else inflated()
    with pytest.raises(Refusal, match="(conditioning|positive): it is (empty|not made as a CONDITIONING is)"):
        if node == "tune":
            pack_nodes.OneShotTune.execute(model, {"samples": CLIP}, odd, 1, 1e-3, 0, "all", "auto", 0, 1.0)
        elif node == "invert":
            pack_nodes.DDIMInvert.execute(model, {"samples": CLIP}, odd, 5)
        else:
            pack_nodes.TAVSample.execute(model, odd, PROMPT, invert(model), 5, 3.0, 0.0, 0)


@pytest.mark.comfyui
@pytest.mark.parametrize("first", ["compiled", "inflated"])
def test_a_compiled_model_with_temporal_layers(first: str) -> None:
    """As TorchCompileModel sets it, before Inflate UNet or after it."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    torch._dynamo.reset()
    plain = inflated()
    compiled = build_model(UNETS["tiny"]) if first == "compiled" else plain.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    if first == "compiled":
        assert (record := host.inflation_of(plain)) is not None
        compiled = host.inflate_model(compiled, Inflation(), record.motion)
    inverted = invert(plain, 2)
    ours, theirs = (sample(model, inverted, 2)["samples"] for model in (compiled, plain))
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()
