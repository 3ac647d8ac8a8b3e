"""The released implementation's numbers, reproduced by the code that the nodes run.

A reference file (safetensors, its JSON sidecar beside it) holds a small UNet's weights and what the released
code computes with them. Every tensor in it is either an input or checked; one that no case consumed fails the
run. Keys ending in ``_literal`` repeat a defect of the released code and are not a target.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from tune_a_video.tav_core import host, schedule
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.invert import ddim_invert
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.sample import ddim_sample
from tune_a_video.tav_core.temporal import TemporalLayer
from tune_a_video.tav_core.tuning.memory_plan import LEVELS, Level, Plan
from tune_a_video.tav_core.tuning.trainer import TuneSettings
from tune_a_video.tav_core.unet import transformer_blocks
from tuning_runs import trainer_of
from unets import build_model

GUIDANCE = 12.5


class Reference:
    """A reference file that keeps track of what was read from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sidecar = json.loads(path.with_suffix(".json").read_text())
        self.tensors = load_file(path)
        self.used: set[str] = set()
        self.checked: list[str] = []
        self.scale = 0.18215

    def __getitem__(self, key: str) -> Tensor:
        self.used.add(key)
        return self.tensors[key]

    def family(self, prefix: str) -> dict[str, Tensor]:
        """All tensors below a prefix, by the rest of their key."""
        return {key.removeprefix(prefix): self[key] for key in self.tensors if key.startswith(prefix)}

    def check(self, name: str, rule: str, ours: Tensor, theirs: Tensor) -> None:
        """Hold a result against the file's, at every measure that the sidecar's rule names."""
        assert ours.shape == theirs.shape, f"{name}: {list(ours.shape)} for {list(theirs.shape)}"
        ours, theirs = ours.double(), theirs.double()
        measures = {
            "rel_l2": (ours - theirs).norm() / theirs.norm(),
            "max_rel": (ours - theirs).abs().max() / theirs.abs().max(),
            "relative": ((ours - theirs).abs() / theirs.abs()).max(),
        }
        for measure, limit in self.sidecar["tolerances"][rule].items():
            error = float(measures[measure])
            assert error <= limit, f"{name}: {measure} {error:.2e} exceeds {limit:.0e}"
        self.checked.append(name)

    def model(self, prediction: str = "epsilon") -> Any:
        return build_model(self.sidecar["unet2d"]["comfyui_unet_config"], self.family("unet."), prediction)

    def motion(self) -> Motion:
        return Motion(self.family("temporal."))

    def inflated(self, prediction: str = "epsilon", tensors: dict[str, Tensor] | None = None) -> Any:
        motion = self.motion() if tensors is None else Motion(tensors)
        return host.inflate_model(self.model(prediction), Inflation(), motion)


REFERENCES: dict[Path, Reference] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "reference" not in metafunc.fixturenames:
        return
    paths = metafunc.config.option.reference
    references = [REFERENCES.setdefault(path, Reference(path)) for path in paths]
    if "trajectory" in metafunc.fixturenames or "variant" in metafunc.fixturenames:
        name, pattern = (
            ("trajectory", r"(ddim\.(?:vpred\.)?(?:inv|sample)_\w+)$")
            if "trajectory" in metafunc.fixturenames
            else ("variant", r"train\.(\w+)\.loss$")
        )
        cases = [
            (reference, match[1])
            for reference in references
            for match in (re.match(pattern, key) for key in reference.tensors)
            if match and not match[1].endswith("_literal")
        ]
        metafunc.parametrize(("reference", name), cases, ids=[f"{r.path.stem}-{case}" for r, case in cases])
    else:
        metafunc.parametrize("reference", references, ids=[r.path.stem for r in references])


@pytest.fixture(autouse=True)
def on_the_server() -> Any:
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


def frames_first(video: Tensor) -> Tensor:
    """[videos, c, frames, h, w] -> [videos * frames, c, h, w]"""
    return video.transpose(1, 2).flatten(0, 1)


def video(rows: Tensor, videos: int = 1) -> Tensor:
    """[videos * frames, c, h, w] -> [videos, c, frames, h, w]"""
    return rows.unflatten(0, (videos, -1)).transpose(1, 2)


class UNetIO:
    """Records what goes into and comes out of a UNet."""

    def __init__(self, model: Any) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.handle = host.unet_of(model).register_forward_hook(self._record)

    def _record(self, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        self.inputs.append(args[0].detach().clone())
        self.outputs.append(output.detach().clone())

    def __enter__(self) -> UNetIO:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def evaluate(model: Any, x: Tensor, timesteps: Tensor, contexts: Tensor, videos: int = 1) -> Tensor:
    """The UNet's raw output for noisy latents x [rows, c, h, w], through the host's apply_model and what the
    pack wraps around it; one timestep and one context per video."""
    comfy.model_management.load_models_gpu([model])
    frames = x.shape[0] // videos
    sigma = model.model.model_sampling.sigma(timesteps.float()).repeat_interleave(frames)
    options: dict[str, Any] = {"cond_or_uncond": [0] * videos, "wrappers": getattr(model, "wrappers", {})}
    x = schedule.to_ve(x, sigma.view(-1, 1, 1, 1))
    args = {
        "input": x,
        "timestep": sigma,
        "c": {"c_crossattn": contexts.repeat_interleave(frames, 0), "transformer_options": options},
    }
    with UNetIO(model) as io:
        wrapper = model.model_options.get("model_function_wrapper")
        if wrapper is not None:
            wrapper(model.model.apply_model, args)
        else:
            model.model.apply_model(args["input"], args["timestep"], **args["c"])
    return io.outputs[0]


def test_noise_schedule(reference: Reference) -> None:
    ours = schedule.alphas_cumprod(host.sigma_table(reference.model()))
    theirs = reference["schedule.alphas_cumprod"].double()
    assert float(((ours - theirs).abs() / theirs).max()) <= 1e-5
    reference.checked.append("schedule")


def test_plain_2d(reference: Reference) -> None:
    x, t, context = (reference[f"check2d.{name}"] for name in ("x", "t", "context"))
    # An inflated clone exists and is not used: the plain model must not notice.
    model = reference.model()
    host.inflate_model(model, Inflation(), reference.motion())
    ours = evaluate(model, x, t, context, videos=len(x))
    reference.check("check2d", "check2d", ours, reference["check2d.out"])


@pytest.mark.parametrize(
    ("case", "frames", "zeroed"),
    [
        ("pred", None, ()),
        ("pred_zero_temporal", None, ("weight", "bias")),
        ("pred_zero_temporal_weight_only", None, ("weight",)),
        ("pred_f1", 1, ()),
        ("pred_f1_zero_temporal", 1, ("weight", "bias")),
    ],
)
def test_forward(reference: Reference, case: str, frames: int | None, zeroed: tuple[str, ...]) -> None:
    tensors = {
        key: torch.zeros_like(value) if key.endswith(tuple(f"to_out.0.{z}" for z in zeroed)) else value
        for key, value in reference.motion().tensors.items()
    }
    x = frames_first(reference["forward.x"])[:frames]
    ours = evaluate(reference.inflated(tensors=tensors), x, reference["forward.t"], reference["context.source"])
    reference.check(f"forward.{case}", "forward.*", video(ours), reference[f"forward.{case}"])


def test_forward_two_videos(reference: Reference) -> None:
    contexts = torch.cat([reference["context.uncond"], reference["context.edit"]])
    x, t = reference["forward.batch2.x"], reference["forward.batch2.t"]
    ours = evaluate(reference.inflated(), frames_first(x), t, contexts, videos=2)
    reference.check("forward.batch2", "forward.*", video(ours, 2), reference["forward.batch2.pred"])


def test_probes(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reference.inflated()
    unet = host.unet_of(model)
    path, block = next(iter(transformer_blocks(unet).items()))
    transformer = unet.get_submodule(path.rpartition(".transformer_blocks")[0])
    described = str(reference.sidecar["tensors"].get("probe.resblock.in", {}).get("what"))
    named = re.search(r"input_blocks\.\d+\.\d+", described)
    resblock = unet.get_submodule(named[0] if named else "input_blocks.1.0")
    seen: dict[str, Tensor] = {}

    def record(name: str, module: torch.nn.Module, argument: int | None, reshape: Any = lambda x: x) -> None:
        def hook(_: Any, args: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = reshape(output if argument is None else args[argument]).clone()

        handles.append(module.register_forward_hook(hook))

    # The first temporal layer that runs is the first block's.
    forward = TemporalLayer.forward

    def temporal(self: TemporalLayer, x: Tensor, frames: int) -> Tensor:
        out = forward(self, x, frames)
        seen.setdefault("attn_temp.in", self.norm_temp(x).transpose(0, 1).clone())
        seen.setdefault("attn_temp.out", out.transpose(0, 1).clone())
        return out

    monkeypatch.setattr(TemporalLayer, "forward", temporal)
    handles: list[Any] = []
    record("resblock.in", resblock, 0, video)
    record("resblock.emb", resblock, 1, lambda emb: emb[:1])
    record("resblock.out", resblock, None, video)
    record("attn1.in", block.attn1, 0)
    record("attn1.out", block.attn1, None)
    record("tblock.in", block, 0)
    record("tblock.out", block, None)
    record("transformer.out", transformer, None, video)
    record("mid.out", unet.middle_block[-1], None, video)
    x = frames_first(reference["forward.x"])
    evaluate(model, x, reference["forward.t"], reference["context.source"])
    for handle in handles:
        handle.remove()
    for name, theirs in reference.family("probe.").items():
        reference.check(f"probe.{name}", "probe.*", seen[name], theirs)


@pytest.mark.parametrize("level", LEVELS)
def test_training(reference: Reference, variant: str, level: Level) -> None:
    case = f"train.{variant}"
    recorded = reference.sidecar.get("training_results", {}).get(variant, {})
    prediction = "v" if "vpred" in variant or recorded.get("prediction_type", "").startswith("v") else "epsilon"
    noise, timesteps = reference["train.noise"], reference["train.timesteps"].tolist()
    settings = TuneSettings(steps=len(timesteps), train_scope="middle and up" if variant.endswith("ckpt") else "all")
    model = reference.model(prediction)
    latents, cond = frames_first(reference["latents.clean"]) / reference.scale, [[reference["context.source"], {}]]
    norms: list[Tensor] = []
    with UNetIO(model) as io, trainer_of(model, latents, cond, settings, start=reference.motion()) as trainer:
        trainer.plan = Plan.all_at(trainer.costs, level)
        # Small probes have run the UNet to plan the memory.
        first = len(io.outputs)
        for timestep, each in zip(timesteps, noise, strict=True):
            loss = trainer.backward(timestep, frames_first(each))
            if not norms:
                gradients_seen = {key: p.grad.clone() for key, p in trainer.trained.items() if p.grad is not None}
            norms.append(trainer.update(loss).grad_norm)
        motion, losses = trainer.motion(), trainer.losses
    theirs = reference.family(f"{case}.")
    reference.check(f"{case}.loss", "train.*.loss", torch.tensor(losses), theirs.pop("loss"))
    reference.check(f"{case}.grad_norm", "train.*.grad_norm", torch.stack(norms), theirs.pop("grad_norm"))
    if "pred_step0" in theirs:
        reference.check(f"{case}.pred_step0", "forward.*", video(io.outputs[first]), theirs.pop("pred_step0"))
    if "train.noisy_step0" in reference.tensors:
        reference.check("train.noisy_step0", "forward.*", video(io.inputs[first]), reference["train.noisy_step0"])

    def key(name: str) -> str:
        return name.replace(".to_q.weight", ".to_q.diff") if "attn_temp" not in name else name

    start = {**reference.motion().tensors}
    exempt = set(reference.sidecar["tolerances"]["exempt"]["tensors"])
    gradients = {n.removeprefix("grad_step0."): theirs.pop(n) for n in list(theirs) if n.startswith("grad_step0.")}
    deltas = {n.removeprefix("delta."): theirs.pop(n) for n in list(theirs) if n.startswith("delta.")}
    finals = {n.removeprefix("final."): theirs.pop(n) for n in list(theirs) if n.startswith("final.")}
    ours = {name: motion.tensors[key(name)] - start.get(key(name), 0) for name in deltas}

    assert set(gradients_seen) == {key(name) for name in deltas}, "what learns is not what learns there"
    rule = "train.*.grad_step0.* (per tensor)"
    for name, gradient in gradients.items():
        if name not in exempt:
            reference.check(f"{case}.grad_step0", rule, gradients_seen[key(name)], gradient)
    rule = "train.*.delta.* (per tensor)"
    for name, delta in deltas.items():
        if name in exempt:
            assert float(ours[name].abs().max()) <= 5 * settings.learning_rate
        else:
            reference.check(f"{case}.delta", rule, ours[name], delta)
    counted = [name for name in deltas if name not in exempt]
    reference.check(
        f"{case}.delta, together",
        "train.*.delta.* (all non-exempt tensors concatenated)",
        torch.cat([ours[name].flatten() for name in counted]),
        torch.cat([deltas[name].flatten() for name in counted]),
    )
    weights = reference.family("unet.")
    for name, final in finals.items():
        if name not in exempt:
            value = motion.tensors[key(name)] + (weights[name] if key(name) != name else 0)
            # The differences have been compared; this compares what they are added to.
            assert torch.allclose(value - ours[name], final - deltas[name], rtol=0, atol=1e-6), name
    untouched = {k: v for k, v in motion.tensors.items() if k not in {key(name) for name in deltas}}
    assert all(torch.equal(v, start[k]) for k, v in untouched.items()), "something frozen has moved"

    if "pred_after" in theirs:
        after = host.inflate_model(reference.model(prediction), Inflation(), motion)
        x = frames_first(reference["forward.x"])
        pred = evaluate(after, x, reference["forward.t"], reference["context.source"])
        reference.check(f"{case}.pred_after", "train.*.pred_after", video(pred), theirs.pop("pred_after"))
    assert not theirs, f"not understood: {sorted(theirs)}"


def invert_v_at_the_latents_level(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Tensor:
    """Invert as diffusers' DDIMInverseScheduler: a v becomes noise at the lower level of each step."""
    x = schedule.to_ve(x, sigmas[0])
    for i, (now, up) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        seen = x * ((1 + up**2) / (1 + now**2)) ** 0.5
        denoised = model(seen, up * x.new_ones([len(x)]), **(extra_args or {}))
        v = (seen - denoised) / up * (1 + up**2) ** 0.5 - schedule.to_vp(x, now) * up
        callback({"x": x, "i": i, "sigma": now, "sigma_hat": up, "denoised": denoised})
        x = x + (up - now) * schedule.to_vp(v + schedule.to_vp(x, now) * now, now)
    return x


def run_trajectory(reference: Reference, trajectory: str, v_level: str = "evaluated") -> list[Tensor]:
    """Every latent of an inversion or a sampling run, variance-preserving [frames, c, h, w], both ends included."""
    theirs = reference[trajectory]
    steps = len(theirs) - 1
    model = reference.inflated("v" if "vpred" in trajectory else "epsilon")
    edit, empty, source = ([[reference[f"context.{name}"], {}]] for name in ("edit", "uncond", "source"))
    seen: list[Tensor] = []

    def callback(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        seen.append(x.clone())

    start = frames_first(theirs[0])
    if is_inversion(trajectory):
        sigmas = schedule.inversion_sigmas(host.sigma_table(model), steps)
        cond = source if "source" in trajectory else empty
        clean = start / reference.scale
        sampler = ddim_invert if v_level == "evaluated" else invert_v_at_the_latents_level
        end = host.run_sampler(model, sampler, sigmas, (cond, cond), 1.0, clean, callback=callback)
        end = schedule.to_vp(end, sigmas[-1])
    else:
        sigmas = schedule.sampling_sigmas(host.sigma_table(model), steps)
        noisy = schedule.to_ve(start, sigmas[0]) / reference.scale
        end = host.run_sampler(model, ddim_sample, sigmas, (edit, empty), GUIDANCE, noisy, callback=callback)
    states = [schedule.to_vp(x, sigma) for x, sigma in zip(seen, sigmas[:-1], strict=True)]
    return [*states, end * reference.scale]


def is_inversion(trajectory: str) -> bool:
    return re.search(r"\binv_", trajectory) is not None


def test_ddim(reference: Reference, trajectory: str, exercised: list[str]) -> None:
    theirs = reference[trajectory]
    ours = run_trajectory(reference, trajectory)
    if is_inversion(trajectory) and "vpred" in trajectory:
        # The released code has no inversion for v-prediction, so a corrected one may turn v into noise at
        # either of a step's two levels. The whole trajectory must then follow that reading.
        other = run_trajectory(reference, trajectory, v_level="latent")
        expected = theirs[1].double()
        if (video(other[1]) - expected).norm() < (video(ours[1]) - expected).norm():
            ours = other
            exercised.append(f"reference {reference.path.name}: {trajectory} reads v at the latent's level")
    rule = "ddim.inv* (every step)" if is_inversion(trajectory) else "ddim.sample* (every step)"
    for state, expected in zip(ours, theirs, strict=True):
        reference.check(trajectory, rule, video(state), expected)


def test_first_sampling_step(reference: Reference) -> None:
    """Raw outputs of the conditional and the unconditional pass, run as one batch of two videos."""
    for key in [k for k in reference.tensors if re.match(r"ddim\.(vpred\.)?step0\.", k)]:
        prefix = key.rpartition("step0.")[0]
        start = reference["ddim.inv_source" if prefix == "ddim." else f"{prefix}inv_source_corrected"]
        model = reference.inflated("epsilon" if prefix == "ddim." else "v")
        contexts = torch.cat([reference["context.edit"], reference["context.uncond"]])
        t = schedule.ddim_timesteps(len(start) - 1)[-1]
        x = frames_first(start[-1]).repeat(2, 1, 1, 1)
        both = video(evaluate(model, x, torch.tensor([t, t]), contexts, videos=2), 2)
        ours = both[1:] if key.endswith("uncond") else both[:1]
        reference.check(key, "forward.*", ours, reference[key])


def test_everything_in_the_file_was_consumed(reference: Reference, exercised: list[str]) -> None:
    """Runs last. Fails, too, if cases above were deselected: then the file was not checked."""
    left = sorted(k for k in reference.tensors if k not in reference.used and not k.endswith("_literal"))
    exercised.append(f"reference {reference.path.name}: {', '.join(dict.fromkeys(reference.checked))}")
    assert not left, f"nothing checked these: {left}"
