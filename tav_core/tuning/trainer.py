"""One-shot tuning: a model and one clip in, a MOTION out (paper, section 4.2)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import host
from ..inflate import (
    Inflation,
    TemporalLayer,
    build_temporal,
    initial_temporal,
    swapped,
    temporal_layers,
    transformer_blocks,
)
from ..motion.file import QUERY_SUFFIX, Motion, check_fits
from ..out_of_memory import OutOfMemoryError, explained, is_out_of_memory
from ..schedule import add_noise, alphas_cumprod, training_target
from . import checkpoint as resume
from . import early_stop as plateau
from . import memory_plan as memory
from .adamw import AdamW
from .pinned_copy import Later, to_device
from .preview_clip import reconstruct
from .trainable import CastingOperations, TrainScope, in_scope

# After so many steps whose loss or gradient is not finite, one after the other, a run is over.
_PATIENCE = 5
# A GradScaler starts at 2**16 and halves with each overflow: only from here on is it not its business any more.
_SCALER_HALVINGS = 16
# How often the host looks at how steps went: often enough to stop early, seldom enough not to stall a GPU.
_CHECK_INTERVAL = 5

# The rest is for what the allocator cannot use and for what other programs on the device do meanwhile.
SHARE_OF_FREE_MEMORY = 0.8

_NO_MEMORY = (
    "Use fewer frames or a smaller size, set train_scope to middle and up, or close what else takes memory. What was "
    "learnt until the run's state was last written is kept: queued again, it goes on from there."
)

_ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")

INFLATED = Inflation()

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class TuneSettings:
    """The released configuration. ``gradient_clip`` is a total L2 norm, 0 = off; ``warmup_steps`` linear."""

    steps: int = 500
    learning_rate: float = 3e-5
    seed: int = 0
    train_scope: TrainScope = "all"
    warmup_steps: int = 0
    gradient_clip: float = 1.0
    weight_decay: float = 1e-2


@dataclass(frozen=True)
class TuneStep:
    """State of a step, after its backward pass and before the update.

    ``gradients``: by motion key, before clipping. ``loss``, ``grad_norm``: scalars on the device; reading
    them waits for it.
    """

    index: int
    timestep: int
    loss: Tensor
    grad_norm: Tensor
    gradients: Mapping[str, Tensor]


Draw = Callable[[int], tuple[int, Tensor]]


def seeded_draw(latents: Tensor, train_steps: int, seed: int) -> Draw:
    """A timestep, uniform over all training timesteps, and noise like ``latents``; the same on any device."""
    return random_draw(latents, train_steps, torch.Generator().manual_seed(seed))


def random_draw(latents: Tensor, train_steps: int, generator: torch.Generator) -> Draw:
    """``seeded_draw`` from a generator of the caller's, on the CPU."""

    def draw(step: int) -> tuple[int, Tensor]:
        timestep = int(torch.randint(train_steps, (1,), generator=generator))
        return timestep, torch.randn(latents.shape, generator=generator)

    return draw


def one_shot_tune(
    model: Any,
    latents: Tensor,
    conditioning: Any,
    settings: TuneSettings,
    inflation: Inflation = INFLATED,
    motion: Motion | None = None,
    precision: torch.dtype | None = None,
    budget: float | None = None,
    level: memory.Level | None = None,
    draw: Draw | None = None,
    on_gradients: Callable[[TuneStep], None] | None = None,
    on_plan: Callable[[memory.Plan], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    on_losses: Callable[[list[float]], None] | None = None,
    checkpoints: Path | None = None,
    checkpoint_interval: float = 60.0,
    on_warning: Callable[[str], None] | None = None,
    on_preview: Callable[[int, Tensor, Tensor], None] | None = None,
    preview_every: int = 0,
    patience: int = 0,
    stop: Callable[[], bool] | None = None,
) -> tuple[Motion, list[float]]:
    """Tune query projections and temporal layers on one clip.

    ``model``: a ComfyUI ModelPatcher without inflation; LoRAs on it are part of what is tuned on.
    ``latents``: the clip [frames, c, h, w] in the host's LATENT scale. ``conditioning``: a ComfyUI
    conditioning of one prompt. ``motion``: weights to go on from. ``precision``: compute dtype, None for the
    model's own; what learns is float32 always. ``budget``: bytes for activations, gradients and the optimiser's
    moments, None for what the device has free; ``level``: what every block keeps, instead of a plan from a budget.
    Moments go to RAM where else not even the smallest plan fits. ``draw(step)``:
    timestep and noise [frames, c, h, w], for runs that must repeat given draws. ``on_gradients`` sees each step
    before its update; ``on_plan`` is told what blocks keep before the first one; ``on_step`` is called after
    each, may raise to stop; ``on_losses`` gets the losses so far, every few steps.
    ``checkpoints``: a folder to keep the run's state in, every ``checkpoint_interval`` seconds and when it is
    stopped: a run with the same inputs (and the same ``draw``) goes on from there, to the same weights, and a
    finished one gives its result again without tuning. ``on_warning`` is told if the state cannot be kept.
    ``on_preview(done, clip, made)`` gets, every ``preview_every`` steps (0 = never), the clip and what the weights
    make of it now, both [frames, c, h, w] in the UNet's own scale; the weights do not depend on it.
    ``patience``: end when the loss has not fallen for so many steps (``plateau.end_of_progress``; 0 = never).
    ``stop``: asked before every step but a fresh run's first; True ends the run. After either end the result is
    what was learnt until then, and a run with the same inputs that is not ended goes on from there.

    A step whose loss or gradient is not finite changes nothing; several in a row end the run. Returns the
    motion (float32, without metadata) and the loss of every step until then. Raises ValueError for inputs that
    don't fit together, RuntimeError when no step went well, OutOfMemoryError when no plan fits into memory.
    """
    host.check_model(model)
    if motion is not None:
        check_fits(motion, host.query_shapes(model), host.family(model))
    start = {} if motion is None else {key: value.float() for key, value in motion.tensors.items()}

    with explained("latent", _NO_MEMORY), host.training_unet(model, latents, conditioning, precision) as session:
        weights = _trainable_weights(session, settings, start)
        descent = _Descent(session, weights.trained, settings, draw, on_gradients)
        checkpoint = None
        if checkpoints is not None:
            run = resume.fingerprint(_decisive(session, settings, inflation), _all_values(session, start))
            checkpoint = resume.Checkpoint(checkpoints, run, checkpoint_interval, on_warning)
            checkpoint.tidy()
            # The weights that learn and AdamW's two moments of each.
            checkpoint.check(3 * sum(p.nbytes for p in weights.trained.values()))
            state = checkpoint.read()
            # Of no use to a run that would have ended before it.
            ended = None if state is None else _end(state.tensors["history"], patience)
            if state is not None and (ended is None or state.tensors["history"].shape[1] <= ended):
                descent.go_on(state)
        frames = len(session.latents)
        costs = descent.with_room(lambda: _costs(session, weights, inflation))
        plan = _planned(descent, costs, budget, level)
        if on_plan is not None:
            on_plan(plan)
        with session.prepared(inflation, weights.layers, weights.queries, frames):
            previews = None if on_preview is None or preview_every < 1 else (preview_every, on_preview)
            _run(descent, costs, plan, on_step, on_losses, checkpoint, previews, patience, stop)
        return weights.motion(session), descent.history[0].tolist()


def _planned(
    descent: _Descent, costs: Mapping[str, memory.UnitCost], budget: float | None, level: memory.Level | None
) -> memory.Plan:
    """What blocks keep; moves moments and weights off the device where that takes it, and keeps converted weights."""
    session, optimizer = descent.session, descent.optimizer

    def plan() -> memory.Plan:
        moments = optimizer.resident_bytes
        given = budget
        if given is None:
            given = SHARE_OF_FREE_MEMORY * host.free_memory(session.device) + moments
        if level is not None:
            return replace(memory.uniform_plan(costs, level), budget=given - moments)
        if _has_own_memory(session.device):
            return memory.make_plan(costs, given, moments)
        return memory.make_plan(costs, given - moments)

    found = plan()
    if found.offload:
        optimizer.offload()
        found = replace(plan(), offload=True)
    if budget is None and level is None and not found.fits:
        host.offload_weights(session.model, (found.bytes - found.budget) / SHARE_OF_FREE_MEMORY)
        found = replace(plan(), offload=found.offload)
    # Computing activations again is dearer: that room is theirs first.
    converted = session.converted.bytes if found.count("keep") == len(found.levels) or level is not None else 0
    session.converted.keep = 0 < converted <= found.budget - found.bytes
    if not found.fits:
        asked, given = found.bytes / 2**30, max(found.budget, 0.0) / 2**30
        logging.warning("Tune-A-Video: the least that it takes is %.2f GiB, more than the %.2f there are", asked, given)
    return found


def _has_own_memory(device: torch.device) -> bool:
    """Whether what goes to RAM leaves the device."""
    return device.type != "cpu"


def _decisive(session: host.TrainingUNet, settings: TuneSettings, inflation: Inflation) -> dict[str, Any]:
    """What decides a run's result, beside tensors; PyTorch's version since its kernels do, too."""
    compute = [str(session.dtype), session.device.type, session.prediction, torch.__version__]
    return {"settings": asdict(settings), "inflation": asdict(inflation), "compute": compute}


def _all_values(session: host.TrainingUNet, start: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from session.values()
    yield from sorted(start.items())


def costs_of(
    model: Any,
    latents: Tensor,
    conditioning: Any,
    settings: TuneSettings,
    inflation: Inflation = INFLATED,
    precision: torch.dtype | None = None,
) -> tuple[dict[str, memory.UnitCost], int]:
    """What each block would hold on to in a tuning step, and how many numbers learn. Arguments as ``one_shot_tune``."""
    with host.training_unet(model, latents, conditioning, precision) as session:
        weights = _trainable_weights(session, settings, {})
        return _costs(session, weights, inflation), sum(p.numel() for p in weights.trained.values())


def _costs(session: host.TrainingUNet, weights: _Weights, inflation: Inflation) -> dict[str, memory.UnitCost]:
    frames, channels, height, width = session.latents.shape

    def evaluate(frames: int, height: int, width: int) -> Tensor:
        with session.prepared(inflation, weights.layers, weights.queries, frames):
            return session.predict(session.latents.new_zeros(frames, channels, height, width), 0)

    return memory.measure(session.unet, evaluate, frames, height, width, _gradient_bytes(weights.trained))


def _gradient_bytes(trained: Mapping[str, torch.nn.Parameter]) -> dict[str, int]:
    """Bytes of gradients by transformer block."""
    found: dict[str, int] = {}
    for key, parameter in trained.items():
        block = key.partition(".attn")[0]
        found[block] = found.get(block, 0) + parameter.nbytes
    return found


@dataclass(frozen=True)
class _Weights:
    """What a tuning run works on, float32, on its device.

    ``queries``: query projection weights by path, those that learn and those that a motion to go on from
    brings along. ``temporal``: the temporal layers; ``layers``: the same by block path. ``trained``: the
    parameters that learn, by motion key.
    """

    temporal: torch.nn.Module
    layers: Mapping[str, TemporalLayer]
    queries: Mapping[str, torch.nn.Parameter]
    trained: Mapping[str, torch.nn.Parameter]

    def motion(self, session: host.TrainingUNet) -> Motion:
        """The temporal weights, and the queries' differences from the model's, on the CPU."""
        tensors = {key: value.detach().to("cpu", copy=True) for key, value in self.temporal.state_dict().items()}
        for path, query in self.queries.items():
            delta = query.detach() - session.weight(path.removesuffix(".weight"))
            tensors[path.removesuffix(".weight") + QUERY_SUFFIX] = delta.cpu()
        return Motion(tensors)


def _trainable_weights(session: host.TrainingUNet, settings: TuneSettings, start: Mapping[str, Tensor]) -> _Weights:
    """Weights at the start of a run. ``start``: tensors of a motion to go on from, none for a fresh run."""

    def scope(path: str) -> bool:
        return in_scope(path, settings.train_scope)

    temporal = initial_temporal(session.unet, scope, settings.seed)
    temporal.update({key: value for key, value in start.items() if not key.endswith(QUERY_SUFFIX)})
    root = build_temporal(session.unet, temporal, CastingOperations, torch.float32).to(session.device)
    layers = temporal_layers(root)
    queries: dict[str, torch.nn.Parameter] = {}
    trained: dict[str, torch.nn.Parameter] = {}
    for block in transformer_blocks(session.unet):
        for path in (f"{block}.attn1.to_q", f"{block}.attn2.to_q"):
            delta = start.get(path + QUERY_SUFFIX)
            if delta is None and not scope(block):
                continue
            weight = session.weight(path)
            query = torch.nn.Parameter(weight if delta is None else weight + delta.to(weight), scope(block))
            queries[path + ".weight"] = query
            if scope(block):
                trained[path + QUERY_SUFFIX] = query
        if scope(block):
            layers[block].attn_temp.requires_grad_(True)
            for leaf, parameter in layers[block].attn_temp.named_parameters():
                trained[f"{block}.attn_temp.{leaf}"] = parameter
    return _Weights(root, layers, queries, trained)


class _Descent:
    """AdamW on the mean squared error of the model's own prediction target."""

    def __init__(
        self,
        session: host.TrainingUNet,
        trained: Mapping[str, torch.nn.Parameter],
        settings: TuneSettings,
        draw: Draw | None,
        on_gradients: Callable[[TuneStep], None] | None,
    ) -> None:
        self.session, self.trained, self.settings, self.on_gradients = session, trained, settings, on_gradients
        self.alpha_bars = alphas_cumprod(session.sigmas).tolist()
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.draw = draw or random_draw(session.latents, len(self.alpha_bars), self.generator)
        self.parameters = list(trained.values())
        self.optimizer = self._made_optimizer()
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / max(settings.warmup_steps, 1))
        )
        self.scaler = torch.amp.GradScaler(session.device.type, enabled=session.dtype == torch.float16)
        # Per step, on the device: its loss, and whether it was left out.
        self.losses: list[Tensor] = []
        self.skipped: list[Tensor] = []
        # Of the generator before the step that comes next; None within an update, when nothing goes together.
        self.random_state: Tensor | None = self.generator.get_state()
        self._looked_at: Later | None = None
        # Plans whose peak was told.
        self.measured: list[memory.Plan] = []

    def _made_optimizer(self) -> AdamW:
        rate, decay = self.settings.learning_rate, self.settings.weight_decay
        try:
            return AdamW(self.parameters, rate, decay)
        except Exception as error:
            if not is_out_of_memory(error) or not _has_own_memory(self.session.device):
                raise
        # Not in there, where the error still holds on to what was allocated.
        host.release_cached_memory()
        return AdamW(self.parameters, rate, decay, offloaded=True)

    def make_room(self) -> str:
        """Give up what takes memory on the device beside activations, the cheapest first; says what, "" for nothing."""
        if self.session.converted.keep:
            self.session.converted.drop()
            return "weights are converted anew in every step"
        if not self.optimizer.offloaded and _has_own_memory(self.session.device):
            self.optimizer.offload()
            return "the optimiser's moments go to RAM"
        if host.offload_weights(self.session.model, host.weights_on_device(self.session.model) / 2):
            return "half of the model's weights go to RAM"
        return ""

    def with_room(self, work: Callable[[], _Result]) -> _Result:
        """What ``work`` returns; tried again with more room as long as it runs out of memory and any can be made."""
        while True:
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                given_up = self.make_room()
                if not given_up:
                    raise
            host.release_cached_memory()
            logging.warning("Tune-A-Video: out of memory; %s", given_up)

    @property
    def done(self) -> int:
        """Steps behind it."""
        return len(self.losses)

    @property
    def history(self) -> Tensor:
        """Loss of each step, and 1.0 where it was left out, [2, steps], float32."""
        return torch.stack([torch.stack(self.losses), torch.stack(self.skipped)]) if self.losses else torch.zeros(2, 0)

    def backward(self, timestep: int, noise: Tensor) -> Tensor:
        """The loss at a timestep with noise [frames, c, h, w]; leaves its gradients in the parameters."""
        x0, alpha_bar = self.session.latents, self.alpha_bars[timestep]
        predicted = self.session.predict(add_noise(x0, noise, alpha_bar), timestep)
        target = training_target(x0, noise, alpha_bar, self.session.prediction)
        loss = torch.nn.functional.mse_loss(predicted, target)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def update(self, timestep: int, loss: Tensor) -> None:
        """Clip the gradients and apply them, unless they or the loss are not finite."""
        self.random_state = None
        self.with_room(lambda: self.scaler.unscale_(self.optimizer))
        gradients: dict[str, Tensor] = {}
        if self.on_gradients is not None:
            gradients = {key: p.grad.clone() for key, p in self.trained.items() if p.grad is not None}
        # Clipping again what is clipped changes nothing.
        limit = self.settings.gradient_clip or math.inf
        norm = self.with_room(lambda: torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if self.on_gradients is not None:
            self.on_gradients(TuneStep(self.done, timestep, loss, norm, gradients))
        skip = (~(norm.isfinite() & loss.isfinite())).float()
        # Decided on the device, as a GradScaler does it, since asking would wait for it. Not so on Apple's, whose
        # fused AdamW does not look.
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        if skip.device.type != "mps" or not skip:
            self.with_room(lambda: self.scaler.step(self.optimizer))
        self.scaler.update()
        self.schedule.step()
        self.losses.append(loss)
        self.skipped.append(skip)
        self.random_state = self.generator.get_state()

    def state(self) -> resume.State:
        """All that the steps to come depend on; of a finished run, its result alone."""
        tensors = {"history": self.history}
        tensors |= {f"weight.{key}": parameter.detach() for key, parameter in self.trained.items()}
        if self.done < self.settings.steps:
            assert self.random_state is not None
            self.optimizer.settle()
            tensors["random_state"] = self.random_state
            for key, parameter in self.trained.items():
                tensors |= {f"{name}.{key}": value for name, value in self.optimizer.state[parameter].items()}
        return resume.State(tensors, {"schedule": self.schedule.state_dict(), "scaler": self.scaler.state_dict()})

    def go_on(self, state: resume.State) -> None:
        """Go on from what ``state`` returned in a run like this one."""
        tensors = state.tensors
        with torch.no_grad():
            for key, parameter in self.trained.items():
                parameter.copy_(tensors[f"weight.{key}"])
        losses, skipped = tensors["history"].to(self.session.device)
        self.losses, self.skipped = list(losses.unbind()), list(skipped.unbind())
        logging.info("Tune-A-Video: an earlier run with the same inputs goes on after step %d", self.done)
        if self.done == self.settings.steps:
            return
        moments = {
            number: {name: tensors[f"{name}.{key}"] for name in _ADAMW_STATE if f"{name}.{key}" in tensors}
            for number, key in enumerate(self.trained)
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.schedule.load_state_dict(dict(state.values["schedule"]))
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        self.scaler.load_state_dict(state.values["scaler"])
        self.generator.set_state(tensors["random_state"])
        self.random_state = tensors["random_state"]

    def look_back(self) -> Tensor | None:
        """A history to judge by, without waiting for a device: of a device, it is that of the call before."""
        before, self._looked_at = self._looked_at, Later(self.history)
        found = before if _has_own_memory(self.session.device) else self._looked_at
        return None if found is None else found.read()

    def is_hopeless(self, history: Tensor) -> bool:
        """Log which of the latest steps were left out; whether so many were that the run is over."""
        patience = _PATIENCE + (_SCALER_HALVINGS if self.scaler.is_enabled() else 0)
        steps, recent = history.shape[1], history[1, -patience:].tolist()
        left_out = [steps + i + 1 for i in range(-min(_CHECK_INTERVAL, len(recent)), 0) if recent[i]]
        if left_out:
            logging.warning("Tune-A-Video: left out, loss or gradient is not finite: steps %s", left_out)
        return len(recent) == patience and all(recent)


def _run(
    descent: _Descent,
    costs: Mapping[str, memory.UnitCost],
    plan: memory.Plan,
    on_step: Callable[[int], None] | None,
    on_losses: Callable[[list[float]], None] | None,
    checkpoint: resume.Checkpoint | None,
    previews: tuple[int, Callable[[int, Tensor, Tensor], None]] | None,
    patience: int,
    stop: Callable[[], bool] | None,
) -> None:
    """The steps that are left, until done, ended or hopeless; the state goes to ``checkpoint``."""
    unet, steps = descent.session.unet, descent.settings.steps
    logging.info("Tune-A-Video: %s", plan)
    hopeless = False
    try:
        while descent.done < steps and not hopeless and not _ended(descent, patience, stop):
            plan = _step(descent, unet, costs, plan)
            if previews is not None and descent.done % previews[0] == 0:
                _preview(descent, previews[1])
            history = descent.look_back() if descent.done % _CHECK_INTERVAL == 0 else None
            if history is not None:
                hopeless = descent.is_hopeless(history)
                if on_losses is not None:
                    on_losses(history[0].tolist())
            if checkpoint is not None and checkpoint.due():
                checkpoint.write(descent.state())
            if on_step is not None:
                on_step(descent.done - 1)
    except BaseException:
        # Within an update, weights and moments are of different steps: then what was written last stands.
        if checkpoint is not None and descent.done and descent.random_state is not None:
            checkpoint.write(descent.state())
        raise
    if checkpoint is not None and hopeless:
        checkpoint.remove()
    elif checkpoint is not None:
        checkpoint.write(descent.state())
    _judge(descent, hopeless)


def _end(history: Tensor, patience: int) -> int | None:
    """The step after which a run with this history is out of patience, as it would have been noticed."""
    ended = plateau.end_of_progress(history[0].tolist(), patience)
    return None if ended is None else math.ceil(ended / _CHECK_INTERVAL) * _CHECK_INTERVAL


def _ended(descent: _Descent, patience: int, stop: Callable[[], bool] | None) -> bool:
    """Whether a run ends here, before its last step. Waits for the device every few steps."""
    if not descent.done:
        return False
    why = "it was told to" if stop is not None and stop() else ""
    if patience and descent.done % _CHECK_INTERVAL == 0 and _end(descent.history, patience) == descent.done:
        why = f"the loss has not fallen for {patience} steps"
    if why:
        logging.info("Tune-A-Video: tuning ends after step %d, because %s; its weights are kept", descent.done, why)
    return bool(why)


def _preview(descent: _Descent, show: Callable[[int, Tensor, Tensor], None]) -> None:
    """Show what the weights make of the clip; a look that there is no memory for is not worth a run."""
    try:
        show(descent.done, descent.session.latents, reconstruct(descent.session))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        host.release_cached_memory()
        logging.warning("Tune-A-Video: no memory for a preview after step %d; tuning goes on", descent.done)


def _step(
    descent: _Descent, unet: torch.nn.Module, costs: Mapping[str, memory.UnitCost], plan: memory.Plan
) -> memory.Plan:
    """One step; repeated with half of what was planned if it runs out of memory, then with what else can be moved away.

    Returns the plan that it took.
    """
    timestep, noise = descent.draw(descent.done)
    noise = to_device(noise, descent.session.latents)
    while True:
        descent.optimizer.zero_grad(set_to_none=True)
        try:
            with memory.measured_peak(descent.session.device) as measured, swapped(memory.planned_forwards(unet, plan)):
                loss = descent.backward(timestep, noise)
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            smaller = None if plan.smallest else replace(memory.make_plan(costs, plan.bytes / 2), offload=plan.offload)
            # Converted weights are the cheapest to give up, and all else is dearer than computing activations again.
            given_up = "" if smaller is not None and not descent.session.converted.keep else descent.make_room()
            if not given_up and smaller is None:
                raise OutOfMemoryError(
                    "latent: out of memory, although all activations are recomputed. "
                    "Use fewer frames or a smaller size, or set train_scope to middle and up."
                ) from error
        if not given_up and smaller is not None:
            plan, given_up = smaller, str(smaller)
        host.release_cached_memory()
        logging.warning("Tune-A-Video: out of memory in step %d; it is repeated with %s", descent.done + 1, given_up)
    if measured and plan not in descent.measured:
        descent.measured.append(plan)
        # Those that are kept came to be in the first step.
        converted = descent.session.converted.bytes if descent.session.converted.keep else 0
        predicted, peak = (plan.bytes + converted) / 2**30, measured[0] / 2**30
        logging.info("Tune-A-Video: predicted %.2f GiB for activations and gradients, measured %.2f", predicted, peak)
    descent.update(timestep, loss)
    return plan


def _judge(descent: _Descent, hopeless: bool) -> None:
    """Refuse a run in which no step went well; tell of one that ended early."""
    losses, skipped = descent.history.tolist()
    learnt = max((number for number, left_out in enumerate(skipped, 1) if not left_out), default=0)
    # A few steps in fp16 may all go into finding the scale of the gradients: nothing is wrong with them.
    searching = descent.scaler.is_enabled() and all(map(math.isfinite, losses)) and not hopeless
    if losses and not learnt and not searching:
        raise RuntimeError(
            "The loss stopped being a finite number around step 1. "
            "Lower learning_rate, or set precision to fp32 or bf16."
        )
    if hopeless:
        logging.warning(
            "Tune-A-Video: loss or gradient is not finite after step %d; tuning ends, and the weights of that step "
            "are kept. Lower learning_rate, or set precision to fp32 or bf16.",
            learnt,
        )
