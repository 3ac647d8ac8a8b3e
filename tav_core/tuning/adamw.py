"""AdamW whose moments may live in RAM while the weights are on a device, for cards that cannot hold both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")

# Bytes of moments that visit the device at a time.
_VISIT = 64 * 2**20


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW with its state made at once, and moments that can be moved to RAM in mid-run.

    In RAM they still are updated on the device, by the same kernel, a few parameters at a time: weights are bit for
    bit the same either way. A step that runs out of memory has updated whole parameters only; another call of ``step``
    updates the rest.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        learning_rate: float,
        weight_decay: float,
        offloaded: bool = False,
    ) -> None:
        super().__init__(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
        self.offloaded = offloaded
        self._waiting: list[list[Tensor]] = []
        for parameter in self._parameters():
            self.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
            for name in MOMENTS:
                zeros = _in_ram if offloaded else torch.empty_like
                self.state[parameter][name] = zeros(parameter.detach()).zero_()

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def resident_bytes(self) -> int:
        """Bytes of the moments that are kept on the device."""
        return 0 if self.offloaded else sum(self.state[p][name].nbytes for p in self._parameters() for name in MOMENTS)

    def offload(self) -> None:
        """Move the moments to RAM, for good."""
        self.offloaded = True
        for parameter in self._parameters():
            for name in MOMENTS:
                self.state[parameter][name] = _in_ram(self.state[parameter][name])
        self._waiting = [part for whole in self._waiting for part in _visits(whole)]

    def settle(self) -> None:
        """Wait until what is in RAM can be read."""
        if self.offloaded:
            for device in {parameter.device for parameter in self._parameters() if parameter.device.type == "cuda"}:
                torch.cuda.synchronize(device)

    def release(self) -> None:
        """Drop the moments and give pinned memory back to the system, which PyTorch keeps otherwise."""
        self.state.clear()
        empty_cache = getattr(torch._C, "_host_emptyCache", None)
        if self.offloaded and empty_cache is not None and torch.cuda.is_available():
            empty_cache()

    def load_moments(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Copy the steps and moments of all parameters, by their number, to where they are kept now."""
        for number, parameter in enumerate(self._parameters()):
            for name, value in state[number].items():
                self.state[parameter][name].copy_(value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update, or what is left of one that ran out of memory. ``closure`` is not used."""
        (group,) = self.param_groups
        if not self._waiting:
            self._waiting = list(_visits(group["params"])) if self.offloaded else [group["params"]]
        while self._waiting:
            part = self._waiting[0]
            counts = torch.stack([self.state[parameter]["step"] for parameter in part])
            try:
                with self._visiting(part):
                    self.param_groups = [{**group, "params": part}]
                    super().step()
            except BaseException:
                # It fails, if at all, before the kernel that changes weights and moments, but after it has counted.
                for parameter, count in zip(part, counts, strict=True):
                    self.state[parameter]["step"].copy_(count)
                raise
            finally:
                self.param_groups = [group]
            self._waiting.pop(0)

    @contextmanager
    def _visiting(self, part: list[Tensor]) -> Iterator[None]:
        """Within: the moments of some parameters are on the device."""
        if not self.offloaded:
            yield
            return
        homes = [(self.state[p], name, self.state[p][name], p.device) for p in part for name in MOMENTS]
        try:
            for state, name, home, device in homes:
                state[name] = home.to(device, non_blocking=home.is_pinned(), copy=True)
            yield
            # Copies of one stream follow each other: the next visit waits for these, the host does not.
            for state, name, home, _ in homes:
                home.copy_(state[name], non_blocking=home.is_pinned())
        finally:
            for state, name, home, _ in homes:
                state[name] = home


def _in_ram(value: Tensor, pinned: bool | None = None) -> Tensor:
    """Copy to RAM: pinned if it comes from CUDA, and ordinary memory where the system pins no more."""
    if value.device.type == "cuda" if pinned is None else pinned:
        with suppress(RuntimeError):
            return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value)
    return torch.empty(value.shape, dtype=value.dtype).copy_(value)


def _visits(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    part: list[Tensor] = []
    size = 0
    for parameter in parameters:
        part.append(parameter)
        size += len(MOMENTS) * parameter.nbytes
        if size >= _VISIT:
            yield part
            part, size = [], 0
    if part:
        yield part
