"""python demo train: draws the demo's world, trains the tiny Stable Diffusion on it and writes its weights."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import auxiliary_losses
import comfy.clip_model
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ops
import numpy as np
import tokens
import torch
import torch.nn.functional as F
import world
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tune_a_video.tav_core.tiny_sd import model as tiny_sd

_LATENT_SCALE = 0.18215
_PARTS = ("vae", "unet", "text", "vision")
_SAVE_EVERY_SECONDS = 120
_GRID_EVERY_SECONDS = 600
_KL_WEIGHT = 2e-4
_EMPTY_CAPTION_RATE = 0.1
_GRID_STEPS, _GRID_GUIDANCE = 20, 5.0
_EMA = 0.999
_SNR_LIMIT = 5.0
_AUXILIARY_WEIGHT = 0.03
# How much more often than others a picture is seen in which several sprites share a pattern.
_SHARED_PATTERN_WEIGHT = 2.0
# Steps of the CLIP image encoder in the first cycle, and in one that starts from weights.
_VISION_STEPS, _MORE_VISION_STEPS = 1000, 300
_LEARNING_RATE, _LATER_LEARNING_RATE = 1e-3, 7e-4
_VISION_BATCH = 96
# The mean and the deviation by which the host's CLIP_VISION normalises pictures.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class Plan(NamedTuple):
    """The length of a training and its data.

    ``scenes`` are drawn once and seen again and again, each time with another noise. ``cycles``: steps of the UNet and
    the text model. ``minutes``: a cycle ends after this time, if given, with the learning rate at nothing, however many
    steps that were. ``vision_steps``, ``autoencoder_steps``: None for what suits a training from nothing or from
    weights.
    """

    cycles: Sequence[int]
    scenes: int = 60_000
    batch: int = 32
    minutes: float | None = None
    autoencoder_steps: int | None = None
    vision_steps: int | None = None


def train(output: Path, seed: int, plan: Plan, device: torch.device, scratch: Path, start: Path | None = None) -> None:
    """Train everything; resume where an interrupted training stopped.

    Each cycle has other scenes and a learning rate that begins high and ends at nothing (warm restarts, arXiv
    1608.03983). ``start``: finished weights to continue from, with their tokenizer beside them; the first cycle is
    then the one that the seed says. Their autoencoder is trained further only if the plan gives it steps.
    ``scratch``: a folder for the drawings and for checkpoints; ``output``: for weights, tokenizer and record.
    """
    torch.manual_seed(seed)
    scratch.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    tokens.write(output / "tokenizer")
    weights = None if start is None else load_file(start)
    earlier = [] if start is None else json.loads((start.parent / "training.json").read_text())["runs"]
    minutes: dict[str, float] = {}
    autoencoder_steps = plan.autoencoder_steps
    if autoencoder_steps is None:
        autoencoder_steps = 2500 if start is None else 0
    for cycle, steps in enumerate(plan.cycles, seed):
        scenes, pictures = _drawings(plan, cycle, scratch / f"drawings-{cycle}.npy")
        vae = tiny_sd.Autoencoder()
        if cycle == seed and autoencoder_steps:
            vae, minutes["autoencoder"] = _autoencoder(
                pictures, seed, autoencoder_steps, device, scratch / "autoencoder.pt", weights
            )
        else:
            assert weights is not None
            vae.load_state_dict(_part(weights, "vae."))
            vae.to(device).eval().requires_grad_(False)
        latents = _latents(vae, pictures, device, scratch / f"latents-{cycle}.pt")
        unet, text, minutes[f"diffusion {cycle}"] = _diffusion(
            plan,
            scenes,
            latents,
            vae,
            output / "tokenizer",
            cycle,
            steps,
            device,
            scratch / f"diffusion-{cycle}.pt",
            weights,
        )
        vision, minutes[f"clip {cycle}"] = _vision(
            plan, scenes, pictures, text, output / "tokenizer", cycle, device, scratch / f"vision-{cycle}.pt", weights
        )
        parts = {"vae.": vae, "unet.": unet, "text.": text, "vision.": vision}
        weights = _weights(parts, tokens.vocabulary_size(output / "tokenizer"))
    assert weights is not None
    _replace(output / "tiny-sd.safetensors", lambda path: save_file(weights, path))
    asked = f"--seed {seed} --steps {' '.join(map(str, plan.cycles))}"
    asked += f" --scenes {plan.scenes} --batch {plan.batch}"
    asked += f" --minutes {plan.minutes:g}" if plan.minutes else ""
    asked += f" --start {start.name}" if start else ""
    asked += f" --autoencoder-steps {autoencoder_steps}" if autoencoder_steps else ""
    asked += "" if plan.vision_steps is None else f" --vision-steps {plan.vision_steps}"
    run = {
        "command": f"python demo train {asked}",
        "scenes": plan.scenes,
        "minutes": minutes,
        "machine": f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
    }
    sizes = {name: sum(v.numel() for k, v in weights.items() if k.startswith(f"{name}.")) for name in _PARTS}
    record = {"runs": [*earlier, run], "parameters": sizes}
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def _weights(parts: Mapping[str, torch.nn.Module], rows: int) -> dict[str, Tensor]:
    """Collect the weights to save: half precision, and the vocabulary's ``rows`` that the tokenizer uses."""
    return {
        prefix + key: (value[:rows] if key == tiny_sd.EMBEDDING else value).to("cpu", torch.float16).contiguous()
        for prefix, part in parts.items()
        for key, value in part.state_dict().items()
        if value.is_floating_point()
    }


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value.float() for key, value in weights.items() if key.startswith(prefix)}


def _drawings(plan: Plan, seed: int, file: Path) -> tuple[list[world.Scene], np.ndarray]:
    """Draw the scenes of a cycle; pictures are [n, 3, SIZE, SIZE] in 0..255."""
    random = np.random.default_rng(seed)
    scenes = [world.random_scene(random) for _ in range(plan.scenes)]
    if not file.exists():
        pictures = np.empty((plan.scenes, 3, world.SIZE, world.SIZE), np.uint8)
        for index, scene in enumerate(scenes):
            pictures[index] = world.draw(scene).transpose(2, 0, 1)
            _say("drawing", index + 1, plan.scenes, every=2000)
        _replace(file, lambda path: np.save(path, pictures))
    return scenes, np.load(file)


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    temporary = file.with_name("unfinished-" + file.name)
    write(temporary)
    os.replace(temporary, file)


def _say(what: str, done: int, total: int, every: int, note: str = "") -> None:
    if done % every == 0 or done == total:
        print(f"{what}: {done} of {total}{note}", flush=True)


def _initialise(model: torch.nn.Module) -> None:
    """The host's layers leave their weights as they find them; draw them as torch.nn would."""
    for module in model.modules():
        for kind in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm):
            if isinstance(module, kind):
                kind.reset_parameters(module)
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)


class _Loop:
    """Steps of AdamW with a cosine schedule, a running mean of the weights, checkpoints and resume."""

    def __init__(
        self,
        name: str,
        modules: list[torch.nn.Module],
        steps: int,
        learning_rate: float,
        seed: int,
        file: Path,
        minutes: float | None = None,
    ) -> None:
        self.name, self.steps, self.file, self.minutes = name, steps, file, minutes
        self.parameters = [p for module in modules for p in module.parameters()]
        self.step, self.seconds = 0, 0.0
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, betas=(0.9, 0.99), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * self.share_done(step))) + 1e-3,
        )
        self.mean = [p.detach().clone() for p in self.parameters]
        self.random = torch.Generator().manual_seed(seed)
        if file.exists():
            self._resume()

    def share_done(self, step: int) -> float:
        """Return the share of the steps, or of the minutes where they are given, that is done, 0..1."""
        return min(self.seconds / 60 / self.minutes if self.minutes else step / max(self.steps, 1), 1.0)

    def _resume(self) -> None:
        state = torch.load(self.file, weights_only=True)
        if state["steps"] != self.steps:
            raise SystemExit(
                f"{self.file} belongs to a run of {state['steps']} steps, not {self.steps}: "
                "delete it to start over, or ask for as many steps."
            )
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
            for mean, value in zip(self.mean, state["mean"], strict=True):
                mean.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.random.set_state(state["random"])
        self.step, self.seconds = state["step"], state["seconds"]

    def _save(self) -> None:
        state = {
            "steps": self.steps,
            "step": self.step,
            "seconds": self.seconds,
            "parameters": [p.detach() for p in self.parameters],
            "mean": self.mean,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": self.random.get_state(),
        }
        _replace(self.file, lambda path: torch.save(state, path))

    def run(self, loss_of: Callable[[torch.Generator], Tensor], grid: Callable[[], None] | None = None) -> float:
        """Do all steps that are left; the modules end with the mean of their weights. Return the minutes of all runs.

        ``grid`` writes a picture of what the model draws, now and then, with the mean weights in place.
        """
        saved = shown = before = time.monotonic()
        losses: list[Tensor] = []
        while self.step < self.steps and not (self.minutes and self.share_done(self.step) >= 1):
            self.optimizer.zero_grad(set_to_none=True)
            loss = loss_of(self.random)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
            decay = min(_EMA, self.step / (self.step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(self.mean, self.parameters, 1 - decay)
            losses.append(loss.detach())
            now = time.monotonic()
            self.seconds, before = self.seconds + now - before, now
            if self.step % 50 == 0 or self.step == self.steps:
                _say(self.name, self.step, self.steps, 1, f", loss {torch.stack(losses).mean():.4f}")
                losses.clear()
            if now - saved > _SAVE_EVERY_SECONDS or self.step == self.steps or self.share_done(self.step) >= 1:
                self._save()
                saved = time.monotonic()
            if grid and now - shown > _GRID_EVERY_SECONDS:
                self._swap_mean()
                grid()
                self._swap_mean()
                shown = time.monotonic()
        self._swap_mean()
        if grid:
            grid()
        return round(self.seconds / 60, 1)

    @torch.no_grad()
    def _swap_mean(self) -> None:
        for parameter, mean in zip(self.parameters, self.mean, strict=True):
            kept = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(kept)


def _has_bfloat16(device: torch.device) -> bool:
    """Return whether products of bfloat16 are faster than of float32."""
    return device.type != "cpu" or bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=_has_bfloat16(device))


def _autoencoder(
    pictures: np.ndarray,
    seed: int,
    steps: int,
    device: torch.device,
    file: Path,
    start: Mapping[str, Tensor] | None,
) -> tuple[torch.nn.Module, float]:
    """Train the autoencoder, its latents of the deviation that SD 1.5's format expects; return the minutes too."""
    torch.manual_seed(seed)
    vae = tiny_sd.Autoencoder()
    _initialise(vae)
    if start is not None:
        vae.load_state_dict(_part(start, "vae."))
    vae.to(device)

    def loss_of(random: torch.Generator) -> Tensor:
        rows = torch.randint(len(pictures), (16,), generator=random)
        x = _pixels(pictures, rows, device)
        with _autocast(device):
            mean, logvar = (part.float().clamp(-20, 20) for part in vae.posterior(x))
            drawn = torch.randn(mean.shape, generator=random).to(device)
            seen = vae.decode(mean + torch.exp(0.5 * logvar) * drawn).float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(seen, x) + 2 * F.mse_loss(seen, x) + _KL_WEIGHT * kl

    rate = 1e-3 if start is None else 6e-4
    minutes = _Loop("autoencoder", [vae], steps, rate, seed, file).run(loss_of)
    with torch.no_grad():
        sample = _encode(vae, pictures[:1000], device)
        scale = 1 / (sample.std((0, 2, 3)).to(device) * _LATENT_SCALE)
        last: Any = vae.encoder[-1]
        first: Any = vae.decoder[0]
        last.weight[:4] *= scale[:, None, None, None]
        last.bias[:4] *= scale
        first.weight /= scale[None, :, None, None]
        shown = pictures[:256]
        x = torch.from_numpy(shown).to(device).float() / 127.5 - 1
        seen = torch.cat([vae.decode(vae.encode(part)) for part in x.split(32)])
        print(f"autoencoder: {10 * math.log10(4 / F.mse_loss(seen.clamp(-1, 1), x)):.1f} dB", flush=True)
    return vae.eval().requires_grad_(False), minutes


def _pixels(pictures: np.ndarray, rows: Tensor, device: torch.device) -> Tensor:
    return torch.from_numpy(pictures[rows.numpy()]).to(device).float() / 127.5 - 1


@torch.no_grad()
def _encode(vae: Any, pictures: np.ndarray, device: torch.device) -> Tensor:
    found = []
    for start in range(0, len(pictures), 32):
        rows = torch.arange(start, min(start + 32, len(pictures)))
        with _autocast(device):
            found.append(vae.encode(_pixels(pictures, rows, device)).float().cpu())
        if len(pictures) > 1000:
            _say("encoding", min(start + 32, len(pictures)), len(pictures), every=3200)
    return torch.cat(found)


def _latents(vae: Any, pictures: np.ndarray, device: torch.device, file: Path) -> Tensor:
    """Encode the pictures for the UNet, [n, 4, 16, 16]."""
    if not file.exists():
        _replace(file, lambda path: torch.save(_encode(vae, pictures, device) * _LATENT_SCALE, path))
    return torch.load(file, weights_only=True)


def _diffusion(
    plan: Plan,
    scenes: list[world.Scene],
    latents: Tensor,
    vae: Any,
    tokenizer: Path,
    seed: int,
    steps: int,
    device: torch.device,
    file: Path,
    start: Mapping[str, Tensor] | None,
) -> tuple[torch.nn.Module, torch.nn.Module, float]:
    """UNet and text model, trained together to predict the noise on latents [n, 4, 16, 16]; minutes.

    ``start``: weights to go on from.
    """
    torch.manual_seed(seed)
    unet: Any = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        **tiny_sd.UNET, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    )
    text: Any = tiny_sd.TextModel(dtype=torch.float32).transformer
    for model in (unet, text):
        _initialise(model)
        # Some hosts make them frozen.
        model.to(device).train().requires_grad_(True)
    tiny_sd.coarser_groups(unet)
    _start_at_nothing(unet)
    embedding = text.text_model.embeddings.token_embedding
    embedding.weight = torch.nn.Parameter(embedding.weight[: tokens.vocabulary_size(tokenizer)].detach().clone())
    if start is not None:
        unet.load_state_dict(_part(start, "unet."))
        text.load_state_dict(_part(start, "text."))
    tokenize = tiny_sd.Tokenizer(tokenizer)
    encoded = _Captions(scenes, tokenize)
    # SD's schedule, as comfy.model_sampling makes it.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bars = torch.cumprod(1 - betas, 0).float()
    # Min-SNR weights (arXiv 2303.09556), but never so small that the last details stay noise. Timesteps are drawn by
    # them: the same loss on average, with no step spent on what hardly counts.
    weights = (_SNR_LIMIT * (1 - alpha_bars) / alpha_bars).clamp(0.1, 1)
    latents = latents.to(device)
    labels = auxiliary_losses.label(scenes)
    chances = torch.where(auxiliary_losses.shares_pattern(labels), _SHARED_PATTERN_WEIGHT, 1.0)
    auxiliary = auxiliary_losses.AuxiliaryLosses(
        unet,
        [int(encoded.ids(word)[1]) for word in (*world.SHAPES, *world.PLURALS.values())],
        int(encoded.ids("and")[1]),
        int(encoded.ids("on")[1]),
    ).to(device)

    def loss_of(random: torch.Generator) -> Tensor:
        rows = torch.multinomial(chances, plan.batch, replacement=True, generator=random)
        captions = encoded.draw(rows.tolist(), random).to(device)
        t = torch.multinomial(weights, plan.batch, replacement=True, generator=random)
        noise = torch.randn(plan.batch, *latents.shape[1:], generator=random).to(device)
        batch = labels.batch(rows, device)
        alpha_bar, loss_weight, copies = auxiliary_losses.mixed_noise_levels(t, batch, alpha_bars, random)
        noisy = alpha_bar.sqrt() * latents[rows.to(device)] + (1 - alpha_bar).sqrt() * noise
        with _autocast(device), _differentiable(text):
            predicted = unet(noisy, t.to(device), context=text(captions)[0])
        # High noise decides the places and the number of sprites, and its error is small.
        weight = loss_weight * alpha_bars[t].to(device)[:, None, None, None] ** -0.5
        loss = (weight * F.mse_loss(predicted.float(), noise, reduction="none")).mean()
        return loss + _AUXILIARY_WEIGHT * auxiliary(captions, batch, copies)

    @torch.no_grad()
    def grid() -> None:
        asked = [world.caption(world.random_scene(np.random.default_rng(index))) for index in range(24)]
        said, nothing = (
            text(torch.stack([encoded.ids(line) for line in lines]).to(device))[0] for lines in (asked, [""])
        )
        context = torch.cat([said, nothing.expand_as(said)])
        x = torch.randn(len(asked), *latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(device)
        times = torch.linspace(999, 0, _GRID_STEPS).long().tolist()
        for now, then in zip(times, [*times[1:], None], strict=True):
            noise, free = unet(torch.cat([x, x]), torch.full((2 * len(x),), now, device=device), context=context).chunk(
                2
            )
            noise = free + _GRID_GUIDANCE * (noise - free)
            kept, later = float(alpha_bars[now]), 1.0 if then is None else float(alpha_bars[then])
            clean = (x - (1 - kept) ** 0.5 * noise) / kept**0.5
            x = later**0.5 * clean + (1 - later) ** 0.5 * noise
        seen = vae.decode(x / _LATENT_SCALE).clamp(-1, 1).add(1).mul(127.5).byte().permute(0, 2, 3, 1).cpu().numpy()
        rows = [np.concatenate(list(seen[at : at + 8]), 1) for at in range(0, len(seen), 8)]
        Image.fromarray(np.concatenate(rows)).save(file.with_name(f"grid-{seed}-{loop.step:05}.png"))
        file.with_name(f"grid-{seed}.txt").write_text("\n".join(asked) + "\n")

    rate = (_LEARNING_RATE if start is None else _LATER_LEARNING_RATE) * (plan.batch / 32) ** 0.5
    loop = _Loop(f"diffusion, cycle {seed}", [unet, text, auxiliary], steps, rate, seed, file, plan.minutes)
    # With AMX the fused attention's backward pass takes three times as long as a plain one, with heads this small.
    with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" and _has_bfloat16(device) else nullcontext():
        minutes = loop.run(loss_of, grid)
    return unet.eval(), text.eval(), minutes


def _start_at_nothing(unet: Any) -> None:
    """Zero what residual branches and the head end in, as Stable Diffusion's training does."""
    ends = [unet.out[-1]]
    for module in unet.modules():
        if hasattr(module, "out_layers"):
            ends.append(module.out_layers[-1])
        if hasattr(module, "transformer_blocks"):
            ends.append(module.proj_out)
    for layer in ends:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


@contextmanager
def _differentiable(text: torch.nn.Module) -> Iterator[None]:
    """The host's CLIP layers add in place, which autograd cannot undo; here they add out of place."""

    def out_of_place(layer: Any) -> Callable[..., Tensor]:
        def forward(x: Tensor, mask: Any = None, optimized_attention: Any = None) -> Tensor:
            x = x + layer.self_attn(layer.layer_norm1(x), mask, optimized_attention)
            return x + layer.mlp(layer.layer_norm2(x))

        return forward

    layers = [module for module in text.modules() if hasattr(module, "layer_norm2")]
    for layer in layers:
        layer.forward = out_of_place(layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _vision(
    plan: Plan,
    scenes: list[world.Scene],
    pictures: np.ndarray,
    text: Any,
    tokenizer: Path,
    seed: int,
    device: torch.device,
    file: Path,
    start: Mapping[str, Tensor] | None,
) -> tuple[torch.nn.Module, float]:
    """A CLIP image encoder for the finished text model, and that model's projection; minutes.

    The text model itself stays as diffusion training left it. It serves measurements, not pictures.
    """
    torch.manual_seed(seed)
    vision: Any = comfy.clip_model.CLIPVisionModelProjection(
        tiny_sd.VISION, torch.float32, "cpu", comfy.ops.disable_weight_init
    )
    _initialise(vision)
    torch.nn.init.normal_(vision.vision_model.embeddings.class_embedding, std=0.02)
    if start is not None:
        vision.load_state_dict(_part(start, "vision."), strict=False)
    vision.to(device).train().requires_grad_(True)
    text.requires_grad_(False)
    projection = text.text_projection.requires_grad_(True)
    scale = torch.nn.Parameter(torch.tensor(math.log(10.0), device=device))
    learning = torch.nn.ModuleList([vision, projection])
    learning.register_parameter("scale", scale)
    encoded = _Captions(scenes, tiny_sd.Tokenizer(tokenizer))
    average = torch.tensor(_CLIP_MEAN, device=device).view(3, 1, 1)
    deviation = torch.tensor(_CLIP_DEVIATION, device=device).view(3, 1, 1)

    def loss_of(random: torch.Generator) -> Tensor:
        rows = torch.randint(len(pictures), (_VISION_BATCH,), generator=random)
        captions = encoded.draw(rows.tolist(), random, always=True).to(device)
        x = (_pixels(pictures, rows, device) + 1) / 2
        # Decoded pictures have gone through the autoencoder, so some are blurred or noisy.
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        x = x.lerp(blurred, torch.rand(len(x), 1, 1, 1, generator=random).to(device))
        x = (x + 0.03 * torch.randn(x.shape, generator=random).to(device)).clamp(0, 1)
        with _autocast(device), _differentiable(vision), _differentiable(text):
            seen = vision(pixel_values=(x - average) / deviation)[2]
            said = text(captions)[2]
        logits = scale.exp() * F.normalize(seen.float(), dim=-1) @ F.normalize(said.float(), dim=-1).T
        # Two pictures may have one caption: neither is wrong for the other.
        same = (captions[:, None] == captions[None]).all(-1).float()
        wanted = same / same.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted))

    steps, rate = (_VISION_STEPS, 1e-3) if start is None else (_MORE_VISION_STEPS, 5e-4)
    steps = steps if plan.vision_steps is None else plan.vision_steps
    minutes = _Loop(f"clip, cycle {seed}", [learning], steps, rate, seed, file).run(loss_of)
    return vision.eval(), minutes


class _Captions:
    """Token ids of the scenes' captions: sometimes without the style, sometimes empty."""

    def __init__(self, scenes: list[world.Scene], tokenizer: Any) -> None:
        self.scenes = scenes
        self.tokenizer = tokenizer
        self.known: dict[str, Tensor] = {}

    def draw(self, rows: list[int], random: torch.Generator, always: bool = False) -> Tensor:
        """One caption for each of some scenes, with ``always`` never an empty one: [n, tiny_sd.TOKENS]."""
        chances = torch.rand(len(rows), 2, generator=random).tolist()
        found = []
        for row, (empty, styleless) in zip(rows, chances, strict=True):
            text = world.caption(self.scenes[row], style=styleless >= 0.1)
            found.append(self.ids("" if empty < _EMPTY_CAPTION_RATE and not always else text))
        return torch.stack(found)

    def ids(self, text: str) -> Tensor:
        """Return the tokens of a text, [tiny_sd.TOKENS]."""
        if text not in self.known:
            (section,) = self.tokenizer.tokenize_with_weights(text)["l"]
            self.known[text] = torch.tensor([token for token, _ in section])
        return self.known[text]
