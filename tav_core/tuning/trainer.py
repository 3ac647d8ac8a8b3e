"""One-shot tuning: a model and one clip in, a MOTION out (paper, section 4.2)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..attention import SLICE_BYTES, is_fused
from ..inflate import Inflation, Swap, swapped
from ..motion.file import Motion
from ..motion.low_rank import RANK_KEY, SEED_KEY, for_rank, temporal_seed
from ..out_of_memory import OutOfMemoryError, is_out_of_memory
from ..schedule import add_noise, alphas_cumprod, training_target
from . import early_stop, memory_probe
from .adamw import AdamW
from .frame_window import draw_window, window_length
from .memory_plan import Plan, UnitCost, make_plan
from .pinned_copy import AsyncCopy, to_device
from .preview_clip import reconstruct
from .recompute import planned_forwards
from .relief import retry_on_oom
from .trainable import TrainScope, frozen_bytes, trainable_weights, trained_bytes
from .training_unet import TrainingUNet

# A run is over after this many steps in a row whose loss or gradient is not finite.
_MOST_SKIPPED = 5
# A GradScaler starts at 2**16 and halves with each overflow; these overflows are its search, not a failure.
_SCALER_HALVINGS = 16
# Steps between two looks at the losses: often enough to stop early, seldom enough not to stall a GPU.
CHECK_INTERVAL = 5

# The rest is for memory that the allocator cannot use, and for other programs on the device.
SHARE_OF_FREE_MEMORY = 0.8

# A weight that learns, its gradient and its two moments.
_FIXED_COPIES = 4
# The rank that is named where whole matrices do not fit.
_SMALL_RANK = 32

_ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")

PAPER = Inflation()


@dataclass(frozen=True)
class TuneSettings:
    """The released configuration. ``gradient_clip`` is a total L2 norm, 0 = off; ``warmup_steps`` linear.

    ``frames_per_step``: frames that a step sees, the first one among them (``frame_window``); 0 = all.
    ``rank``: the changes of matrices learn as products of that rank, 0 = as whole matrices.
    """

    steps: int = 500
    learning_rate: float = 3e-5
    seed: int = 0
    train_scope: TrainScope = "all"
    warmup_steps: int = 0
    gradient_clip: float = 1.0
    weight_decay: float = 1e-2
    frames_per_step: int = 0
    rank: int = 0


RECIPES = ("released", "fast")


def by_recipe(settings: TuneSettings, recipe: str) -> TuneSettings:
    """Apply a recipe of RECIPES to a user's settings.

    "released" returns them unchanged. "fast" returns a fifth of the steps, three times the learning rate and at least
    10 steps of warm-up; docs/ablation.md has the measurements.
    """
    if recipe != "fast":
        return settings
    return replace(
        settings,
        steps=max(settings.steps // 5, 1),
        learning_rate=3 * settings.learning_rate,
        warmup_steps=max(settings.warmup_steps, 10),
    )


@dataclass(frozen=True)
class TuneStep:
    """One optimiser step. ``number``: from 1. ``loss``, ``grad_norm``: scalars on the device; reading waits for it."""

    number: int
    loss: Tensor
    grad_norm: Tensor


class Trainer:
    """Tunes query projections and temporal layers on the clip of a ``TrainingUNet``; iterate it, a step at a time.

    AdamW on the mean squared error of the model's own prediction target. What learns is float32 always. A step that
    runs out of memory is repeated with less; a step whose loss or gradient is not finite changes nothing, and several
    in a row end the iteration. Between steps the host's UNet has its own forwards.

    ``start``: a motion to go on from, that fits the model (``host.check_motion``) and the rank (``for_rank``).
    ``memory_budget``: bytes for activations, gradients and the optimiser's moments, None for what the device has free.
    ``patience``: the iteration ends when the loss has not fallen for this many steps (``early_stop``), 0 = never.
    Raises OutOfMemoryError when no plan fits into memory.
    """

    def __init__(
        self,
        unet: TrainingUNet,
        settings: TuneSettings,
        inflation: Inflation = PAPER,
        start: Motion | None = None,
        memory_budget: float | None = None,
        patience: int = 0,
    ) -> None:
        self.unet, self.settings, self.inflation, self.patience = unet, settings, inflation, patience
        self._budget = memory_budget
        # The length of the windows that the clip is tuned in; None for the whole clip in every step.
        self._window = window_length(len(unet.latents), settings.frames_per_step)
        if self._window is not None:
            unet.check_windows()
        start = None if start is None else for_rank(start, settings.rank)
        self._start = {} if start is None else {key: value.float() for key, value in start.tensors.items()}
        # The seed that all temporal weights were drawn from; None where the start motion does not know its own.
        self.temporal_seed = temporal_seed(start) if start is not None and start.temporal() else settings.seed
        self._drawn_from = settings.seed if self.temporal_seed is None else self.temporal_seed
        _check_fixed_memory(unet, settings.train_scope, settings.rank)
        self._weights = retry_on_oom(
            lambda: trainable_weights(unet, settings.train_scope, self._drawn_from, self._start, settings.rank),
            (self._offload_weights,),
            "at the start",
        )
        self.trained = self._weights.trained
        self._parameters = list(self.trained.values())
        self._alpha_bars = alphas_cumprod(unet.sigmas).tolist()
        self._generator = torch.Generator().manual_seed(settings.seed)
        self.optimizer = self._make_optimizer()
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / max(settings.warmup_steps, 1))
        )
        self._scaler = torch.amp.GradScaler(unet.device.type, enabled=unet.dtype == torch.float16)
        # [2, steps] on the device: each step's loss, and 1.0 where the step was skipped.
        self._history = torch.zeros(2, settings.steps, device=unet.device)
        self.done = 0
        # The generator's state before the next step; None within an update, when weights and moments differ in step.
        self._random_state: Tensor | None = self._generator.get_state()
        self._copied: AsyncCopy | None = None
        self._losses_so_far: list[float] | None = None
        self.diverged = False
        self._plan: Plan | None = None
        self._planned: list[Swap] = []
        self._measured: set[str] = set()

    # --- iteration ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[TuneStep]:
        while not self.ended:
            yield self.train_step(*self.draw())
        if self._is_out_of_patience():
            logging.info(
                "Tune-A-Video: tuning ends after step %d: the loss has not fallen for %d steps; its weights are kept",
                self.done,
                self.patience,
            )

    @property
    def ended(self) -> bool:
        """Say whether no step is left: all are done, the run has diverged, or patience is over."""
        return self.done >= self.settings.steps or self.diverged or self._is_out_of_patience()

    @property
    def frames(self) -> int:
        """Return the number of frames that a step sees."""
        return self._window or len(self.unet.latents)

    def draw(self) -> tuple[int, Tensor, Tensor | None]:
        """Draw the next timestep, noise and frames, on the CPU.

        The noise is [frames, c, h, w] of the frames that the step sees: their numbers, or None for the whole clip.
        """
        latents, generator = self.unet.latents, self._generator
        timestep = self.draw_timestep(generator)
        frames = None if self._window is None else draw_window(len(latents), self._window, generator)
        return timestep, torch.randn(self.frames, *latents.shape[1:], generator=generator), frames

    def draw_timestep(self, generator: torch.Generator) -> int:
        """Draw a timestep, uniform over all training timesteps."""
        return int(torch.randint(len(self._alpha_bars), (1,), generator=generator))

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Return the loss of a prediction [frames, c, h, w], a scalar."""
        return torch.nn.functional.mse_loss(predicted, target)

    def train_step(self, timestep: int, noise: Tensor, frames: Tensor | None = None) -> TuneStep:
        """Take one optimiser step at a timestep with noise [frames, c, h, w], on some frames or on all."""
        return self.update(self.backward(timestep, noise, frames))

    def backward(self, timestep: int, noise: Tensor, frames: Tensor | None = None) -> Tensor:
        """Return the loss at a timestep with noise [frames, c, h, w]; leaves its gradients in ``trained``.

        ``frames``: indices of the frames to train on, ``self.frames`` of them; None trains on the whole clip.
        """
        x0, alpha_bar = self.unet.latents, self._alpha_bars[timestep]
        x0 = x0 if frames is None else x0[frames.to(x0.device)]
        noise = to_device(noise, x0)
        during = f"in step {self.done + 1}"
        _ = self.plan  # made before the attempts, so that its probes are neither a failed step nor part of the peak

        def attempt() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            with memory_probe.measured_peak(self.unet.device) as peak, self._training_forwards():
                predicted = self.unet.predict(add_noise(x0, noise, alpha_bar), timestep, frames)
                target = training_target(x0, noise, alpha_bar, self.unet.prediction)
                loss = self.loss(predicted, target)
                self._scaler.scale(loss).backward()
            self._log_peak(peak)
            return loss.detach()

        try:
            return retry_on_oom(attempt, (self._drop_casts, self._shrink_plan, *self._reliefs()[1:]), during)
        except Exception as error:
            if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                "latent: out of memory, although all activations are recomputed. "
                "Use fewer frames or a smaller size, set frames_per_step to fewer frames, or set "
                "train_scope to middle and up."
            ) from error

    def update(self, loss: Tensor) -> TuneStep:
        """Clip the gradients and apply them, unless they or the loss are not finite."""
        self._random_state = None
        self._with_relief(lambda: self._scaler.unscale_(self.optimizer))
        # Repeated after a failure it changes nothing: the gradients are clipped already.
        limit = self.settings.gradient_clip or math.inf
        norm = self._with_relief(lambda: torch.nn.utils.clip_grad_norm_(self._parameters, limit))
        skip = (~(norm.isfinite() & loss.isfinite())).float()
        # Decided on the device, as a GradScaler does it, since asking would wait for it. Apple's fused AdamW does not
        # look at found_inf, so there the answer is read.
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        if skip.device.type != "mps" or not skip:
            self._with_relief(lambda: self._scaler.step(self.optimizer))
        self._scaler.update()
        self._schedule.step()
        self._history[:, self.done] = torch.stack([loss, skip])
        self.done += 1
        self._random_state = self._generator.get_state()
        self._look_at_losses()
        return TuneStep(self.done, loss, norm)

    # --- results --------------------------------------------------------------------------------------------------

    @property
    def losses(self) -> list[float]:
        """Return the loss of every step; waits for the device."""
        return self._history[0, : self.done].tolist()

    def losses_so_far(self) -> list[float] | None:
        """Return the losses that are known without waiting for the device, once each time that there are new ones."""
        found, self._losses_so_far = self._losses_so_far, None
        return found

    def reconstruct(self) -> Tensor | None:
        """Make the clip with the weights as they are now, [frames, c, h, w] in the UNet's scale; see ``preview_clip``.

        With windows it is the clip's first one. Returns None where there is no memory for it.
        """
        try:
            with swapped(self._forwards):
                return reconstruct(self.unet, self.frames)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        host.release_cached_memory()
        logging.warning("Tune-A-Video: no memory for a preview after step %d; tuning continues", self.done)
        return None

    def motion(self) -> Motion:
        """Return what was learnt, float32; of metadata only what a low rank needs.

        Raises RuntimeError when no step went well.
        """
        losses, skipped = self._history[:, : self.done].tolist()
        learnt = max((number for number, left_out in enumerate(skipped, 1) if not left_out), default=0)
        # A few steps in fp16 may all go into the search for the gradients' scale: nothing is wrong with them.
        searching = self._scaler.is_enabled() and all(map(math.isfinite, losses)) and not self.diverged
        if losses and not learnt and not searching:
            raise RuntimeError(
                "The loss stopped being a finite number around step 1. "
                "Lower learning_rate, or set precision to fp32 or bf16."
            )
        if self.diverged:
            logging.warning(
                "Tune-A-Video: loss or gradient is not finite after step %d; tuning ends, and the weights of that step "
                "are kept. Lower learning_rate, or set precision to fp32 or bf16.",
                learnt,
            )
        rank = self.settings.rank
        metadata = {RANK_KEY: str(rank), SEED_KEY: str(self._drawn_from)} if rank else {}
        return replace(self._weights.motion(self.unet), metadata=metadata)

    # --- state ----------------------------------------------------------------------------------------------------

    @property
    def decisive(self) -> dict[str, Any]:
        """Return the values that decide a run's result beside tensors; PyTorch's version, since its kernels do too."""
        unet = self.unet
        compute = [str(unet.dtype), unet.device.type, unet.prediction, torch.__version__]
        # No step depends on how many follow: a run of more steps resumes from the end of a shorter one. States that
        # were written before there were windows and ranks resume.
        settings = {k: v for k, v in asdict(self.settings).items() if k not in ("steps", "frames_per_step", "rank")}
        if self._window is not None:
            settings["frames_per_step"] = self._window
        if self.settings.rank:
            settings["rank"] = self.settings.rank
        return {
            "settings": settings,
            "temporal_seed": self._drawn_from,
            "inflation": asdict(self.inflation),
            "compute": compute,
        }

    def decisive_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that decide a run's result, by name."""
        yield from self.unet.fingerprint_tensors()
        yield from sorted(self._start.items())

    @property
    def is_consistent(self) -> bool:
        """Say whether ``state_dict`` describes the end of a step; False before the first one and within an update."""
        return self.done > 0 and self._random_state is not None

    @property
    def state_bytes(self) -> int:
        """Return the size of ``state_dict``'s tensors: the weights that learn and AdamW's two moments of each."""
        return 3 * sum(parameter.nbytes for parameter in self._parameters)

    def close(self) -> None:
        """Drop the optimiser's moments; no step can follow."""
        self.optimizer.release()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and JSON values that further steps depend on, also those of a run of more steps."""
        assert self._random_state is not None
        self.optimizer.settle()
        tensors = {"history": self._history[:, : self.done]}
        tensors |= {f"weight.{key}": parameter.detach() for key, parameter in self.trained.items()}
        tensors["random_state"] = self._random_state
        for key, parameter in self.trained.items():
            tensors |= {f"{name}.{key}": value for name, value in self.optimizer.state[parameter].items()}
        return tensors, {"schedule": self._schedule.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Resume from what ``state_dict`` returned in a run with the same inputs but the number of steps.

        A state from behind this run's last step, or from behind the step at which its patience is over, is ignored.
        """
        history = tensors["history"]
        done, end = history.shape[1], self._end_of_patience(history)
        if done > self.settings.steps or (end is not None and done > end):
            logging.info("Tune-A-Video: an earlier run with the same inputs is longer; tuning starts from step 1")
            return
        with torch.no_grad():
            for key, parameter in self.trained.items():
                parameter.copy_(tensors[f"weight.{key}"])
        self._history[:, :done] = history.to(self.unet.device)
        self.done = done
        logging.info("Tune-A-Video: an earlier run with the same inputs resumes after step %d", done)
        moments = {
            number: {name: tensors[f"{name}.{key}"] for name in _ADAMW_STATE if f"{name}.{key}" in tensors}
            for number, key in enumerate(self.trained)
        }
        self.optimizer.load_moments(moments)
        self._schedule.load_state_dict(dict(values["schedule"]))
        for group, rate in zip(self.optimizer.param_groups, self._schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        self._scaler.load_state_dict(values["scaler"])
        self._generator.set_state(tensors["random_state"])
        self._random_state = tensors["random_state"]

    # --- looking back ---------------------------------------------------------------------------------------------

    def _look_at_losses(self) -> None:
        """Every few steps, read the history without waiting: on a device, as it was at the look before."""
        if self.done % CHECK_INTERVAL:
            return
        before, self._copied = self._copied, AsyncCopy(self._history[:, : self.done])
        copied = before if _has_own_memory(self.unet.device) else self._copied
        if copied is None:
            return
        history = copied.read()
        self._losses_so_far = history[0].tolist()
        most = _MOST_SKIPPED + (_SCALER_HALVINGS if self._scaler.is_enabled() else 0)
        steps, recent = history.shape[1], history[1, -most:].tolist()
        left_out = [steps + i + 1 for i in range(-min(CHECK_INTERVAL, len(recent)), 0) if recent[i]]
        if left_out:
            logging.warning("Tune-A-Video: left out, loss or gradient is not finite: steps %s", left_out)
        self.diverged = len(recent) == most and all(recent)

    def _end_of_patience(self, history: Tensor) -> int | None:
        """Return the step after which a run with this history is out of patience, at a multiple of CHECK_INTERVAL."""
        end = early_stop.stopped_improving_at(history[0].tolist(), self.patience)
        return None if end is None else math.ceil(end / CHECK_INTERVAL) * CHECK_INTERVAL

    def _is_out_of_patience(self) -> bool:
        if not self.patience or not self.done or self.done % CHECK_INTERVAL:
            return False
        return self._end_of_patience(self._history[:, : self.done]) == self.done

    # --- memory ---------------------------------------------------------------------------------------------------

    @cached_property
    def _forwards(self) -> list[Swap]:
        return self.unet.forwards(self.inflation, self._weights.layers, self._weights.queries, self.frames)

    @cached_property
    def costs(self) -> dict[str, UnitCost]:
        """Measure what each block would hold on to in a step; runs three small probes at first use."""
        channels, height, width = self.unet.latents.shape[1:]

        def evaluate(frames: int, height: int, width: int) -> Tensor:
            with swapped(self.unet.forwards(self.inflation, self._weights.layers, self._weights.queries, frames)):
                return self.unet.predict(self.unet.latents.new_zeros(frames, channels, height, width), 0)

        gradients = self._weights.gradient_bytes()
        return self._with_relief(
            lambda: memory_probe.measure(self.unet.module, evaluate, self.frames, height, width, gradients)
        )

    @property
    def plan(self) -> Plan:
        """The plan of what blocks keep; made at the first step from the budget, or set by the caller."""
        if self._plan is None:
            self.plan = self._fit_plan()
            logging.info("Tune-A-Video: %s", self._plan)
        assert self._plan is not None
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._plan, self._planned = plan, []
        # Recomputing activations costs more than casting weights again, so activations come first.
        kept_whole = plan.count("keep") == len(plan.levels)
        spare = self._given() - self.optimizer.resident_bytes - plan.bytes
        self.unet.cast_cache.keep = kept_whole and 0 < self.unet.cast_cache.bytes <= spare

    @property
    def planned_bytes(self) -> float:
        """Return the bytes that a step is planned to take beside the model's own weights, as a budget counts them.

        Activations and gradients, the moments that are on the device, and casts of weights that are kept.
        """
        return self.plan.bytes + self.optimizer.resident_bytes + self._kept_casts

    @property
    def _kept_casts(self) -> int:
        """Return the bytes of the cast weights that are kept between steps."""
        return self.unet.cast_cache.bytes if self.unet.cast_cache.keep else 0

    @contextmanager
    def _training_forwards(self) -> Iterator[None]:
        """Give the UNet its forwards for a step, as the plan says."""
        plan = self.plan  # first, because its probes need the UNet's own forwards
        with swapped(self._forwards):
            if not self._planned:
                self._planned = planned_forwards(self.unet.module, plan)
            with swapped(self._planned):
                yield

    def _given(self) -> float:
        """Return the budget in bytes, moments included."""
        if self._budget is not None:
            return self._budget
        free = host.free_memory(self.unet.device) + host.evictable_memory(self.unet.model)
        return SHARE_OF_FREE_MEMORY * free + self.optimizer.resident_bytes

    def _fit_plan(self) -> Plan:
        """Plan for the budget; moves moments, then weights off the device where that is needed to fit."""

        sample = torch.zeros(1, 1, 2, 8, device=self.unet.device, dtype=self.unet.dtype, requires_grad=True)
        fused = is_fused(sample, sample, sample)
        if not fused:
            logging.info("Tune-A-Video: PyTorch has no fused attention here; attention runs in slices")
        slices = 0 if fused else 3 * SLICE_BYTES

        def fitted() -> Plan:
            moments, given = self.optimizer.resident_bytes, self._given() - slices
            if _has_own_memory(self.unet.device):
                return make_plan(self.costs, given, moments)
            return make_plan(self.costs, given - moments)

        found = fitted()
        if found.offload:
            self.optimizer.offload()
            found = replace(fitted(), offload=True)
        if self._budget is None and not found.fits:
            host.offload_weights(self.unet.model, (found.bytes - found.budget) / SHARE_OF_FREE_MEMORY)
            found = replace(fitted(), offload=found.offload)
        free = host.free_memory(self.unet.device)
        if self._budget is None and host.is_ram(self.unet.device) and found.bytes > free:
            raise OutOfMemoryError(
                f"latent: tuning on it takes {found.bytes / 2**30:.2f} GiB although all activations are recomputed, "
                f"and {free / 2**30:.2f} GiB of memory are free. Use fewer frames or a smaller size, set "
                "frames_per_step to fewer frames, set train_scope to middle and up, or close what else takes memory."
            )
        if not found.fits:
            needed, given = found.bytes / 2**30, max(found.budget, 0.0) / 2**30
            logging.warning(
                "Tune-A-Video: the smallest plan takes %.2f GiB, more than the %.2f available", needed, given
            )
        return found

    def _make_optimizer(self) -> AdamW:
        rate, decay = self.settings.learning_rate, self.settings.weight_decay
        offloaded = False

        def moments_to_ram() -> str:
            nonlocal offloaded
            if offloaded or not _has_own_memory(self.unet.device):
                return ""
            offloaded = True
            return "the optimiser's moments in RAM"

        return retry_on_oom(lambda: AdamW(self._parameters, rate, decay, offloaded), (moments_to_ram,), "at the start")

    def _with_relief(self, work: Any) -> Any:
        return retry_on_oom(work, self._reliefs(), f"after step {self.done}")

    def _reliefs(self) -> tuple[Any, ...]:
        """Return the ways to free memory beside activations, the cheapest first."""
        return self._drop_casts, self._offload_moments, self._offload_weights

    def _drop_casts(self) -> str:
        if not self.unet.cast_cache.keep:
            return ""
        self.unet.cast_cache.drop()
        return "weights cast again in every step"

    def _shrink_plan(self) -> str:
        if self.plan.smallest:
            return ""
        self._plan, self._planned = replace(make_plan(self.costs, self.plan.bytes / 2), offload=self.plan.offload), []
        return str(self._plan)

    def _offload_moments(self) -> str:
        if self.optimizer.offloaded or not _has_own_memory(self.unet.device):
            return ""
        self.optimizer.offload()
        return "the optimiser's moments in RAM"

    def _offload_weights(self) -> str:
        freed = host.offload_weights(self.unet.model, host.weights_on_device(self.unet.model) / 2)
        return "half of the model's weights in RAM" if freed else ""

    def _log_peak(self, peak: list[float]) -> None:
        """Log predicted against measured memory, once for each plan."""
        if not peak or str(self.plan) in self._measured:
            return
        self._measured.add(str(self.plan))
        # Casts that are kept came to be in the first step.
        predicted, measured = (self.plan.bytes + self._kept_casts) / 2**30, peak[0] / 2**30
        logging.info(
            "Tune-A-Video: predicted %.2f GiB for activations and gradients, measured %.2f", predicted, measured
        )


def _check_fixed_memory(unet: TrainingUNet, scope: TrainScope, rank: int) -> None:
    """Refuse a tuning whose weights, gradients and moments exceed the free RAM (OutOfMemoryError).

    Elsewhere an allocation fails and is answered. In RAM it succeeds, and the kernel kills the process later.
    """
    if not host.is_ram(unet.device):
        return

    def fixed(scope: TrainScope, rank: int) -> int:
        frozen = frozen_bytes(unet.module, scope, rank, unet.dtype)
        return _FIXED_COPIES * trained_bytes(unet.module, scope, rank) + frozen

    needed, free = fixed(scope, rank), host.free_memory(unet.device)
    if needed <= free:
        return
    ways = []
    if scope == "all":
        ways.append(f"set it to middle and up ({fixed('middle and up', rank) / 2**30:.2f} GiB)")
    if not rank:
        ways.append(f"set rank to {_SMALL_RANK} ({fixed(scope, _SMALL_RANK) / 2**30:.2f} GiB)")
    remedy = ", ".join([*ways, "or close"]) if ways else "close"
    raise OutOfMemoryError(
        f"train_scope: {scope} takes {needed / 2**30:.2f} GiB for the weights that learn, their gradients and AdamW's "
        f"moments, and {free / 2**30:.2f} GiB of memory are free. {remedy[0].upper() + remedy[1:]} what else takes "
        "memory."
    )


def _has_own_memory(device: torch.device) -> bool:
    """Say whether memory that moves to RAM leaves the device."""
    return device.type != "cpu"
