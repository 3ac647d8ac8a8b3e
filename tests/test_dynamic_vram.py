"""Hosts with dynamic VRAM: every weight that is fetched is given back, and nothing reads it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core import host, pipeline
from tune_a_video.tav_core.inflate import Inflation
from tune_a_video.tav_core.tuning.checkpoint import fingerprint
from tune_a_video.tav_core.tuning.trainer import SHARE_OF_FREE_MEMORY, TuneSettings
from tuning_runs import trainer_of
from unets import UNETS, build_model

# The host loads layers up to this size at once, and the others as they are used: most of this UNet's.
LOADED_AT_ONCE = 16 * 1024
WIDE = {**UNETS["tiny"], "model_channels": 64}
HAS_PAGES = hasattr(comfy.ops, "uncast_bias_weight")


class Pages:
    """A VRAM allocator that evicts a page as soon as nothing pins it: whoever still reads it then gets NaN."""

    def __init__(self) -> None:
        self.faults = self.unpins = 0

    def fault(self, page: Any) -> list[int]:
        self.faults += 1
        page.pins += 1
        return [page.contents]

    def unpin(self, page: Any) -> None:
        if page is None:
            return
        self.unpins += 1
        page.pins -= 1
        assert page.pins >= 0, "unpinned more often than pinned"
        if not page.pins:
            page.data.fill_(0xFF)
            page.contents += 1


class Page:
    """A part of VRAM, with its allocator, offset and size by number as newer hosts read them."""

    def __init__(self, size: int) -> None:
        self.data = torch.full((size,), 0xFF, dtype=torch.uint8)
        self.pins = self.contents = 0

    def __getitem__(self, number: int) -> Any:
        return (self, 0, len(self.data))[number]


class Bar:
    """Stands for comfy_aimdo's ModelVBAR."""

    def __init__(self, size: int, device: int) -> None:
        self.size = 0

    def alloc(self, size: int) -> Page:
        self.size += size
        return Page(size)

    def loaded_size(self) -> int:
        return self.size

    def prioritize(self) -> None:
        pass

    def free_memory(self, size: float) -> int:
        return 0


class InFile(torch.nn.Parameter):
    """A weight that lies somewhere else than on the device, here in a mapped file."""

    device = property(lambda self: torch.device("meta"))


def plain_model(config: Any, **options: Any) -> Any:
    """Build a model that lies in memory. With dynamic VRAM newer hosts leave its weights to the file that is loaded."""
    if not HAS_PAGES:
        return build_model(config, **options)
    from comfy import memory_management

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_management, "aimdo_enabled", False)
        return build_model(config, **options)


def dynamic_model(config: Any, **options: Any) -> Any:
    """Build a model as a loader does on a host with dynamic VRAM."""
    model = plain_model(config, **options)
    with torch.inference_mode():
        for layer in model.model.diffusion_model.modules():
            own = dict(layer.named_parameters(recurse=False))
            if sum(value.nbytes for value in own.values()) > LOADED_AT_ONCE:
                for name, value in own.items():
                    setattr(layer, name, InFile(value.data, requires_grad=False))
    device = torch.device("cpu", 0)  # which is not equal to "cpu", so that the host takes it for a card
    return comfy.model_patcher.CoreModelPatcher(model.model, device, torch.device("cpu"))


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pages]:
    """Dynamic VRAM on this machine's CPU; on hosts without it the same functions with the newer signatures."""
    allocator = Pages()
    if not HAS_PAGES:
        cast = comfy.ops.cast_bias_weight

        def cast_bias_weight(layer: Any, x: Any = None, *args: Any, offloadable: bool = False, **kwargs: Any) -> Any:
            weight, bias = cast(layer, x, *args, **kwargs)
            if not offloadable:
                return weight, bias
            allocator.faults += 1
            weight, bias = weight.clone(), None if bias is None else bias.clone()
            return weight, bias, (None, weight, bias)

        def uncast_bias_weight(layer: Any, weight: Tensor, bias: Tensor | None, stream: Any) -> None:
            allocator.unpins += 1
            for lent in stream[1:]:
                if lent is not None:
                    lent.fill_(torch.nan)

        monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast_bias_weight)
        monkeypatch.setattr(comfy.ops, "uncast_bias_weight", uncast_bias_weight, raising=False)
        monkeypatch.setattr(host.lend, "_TAKES_BACK", True)
        yield allocator
        return
    from comfy import memory_management
    from comfy_aimdo import host_buffer, model_vbar
    from comfy_aimdo import torch as aimdo_torch

    monkeypatch.setattr(model_vbar, "ModelVBAR", Bar)
    monkeypatch.setattr(model_vbar, "vbar_fault", allocator.fault)
    monkeypatch.setattr(model_vbar, "vbar_unpin", allocator.unpin)
    monkeypatch.setattr(model_vbar, "vbar_signature_compare", lambda a, b: a is not None and a == b)
    monkeypatch.setattr(model_vbar, "vbars_analyze", lambda device=None: 0)
    monkeypatch.setattr(aimdo_torch, "aimdo_to_tensor", lambda page, device: page.data)
    monkeypatch.setattr(host_buffer, "HostBuffer", lambda *_: SimpleNamespace(size=0))
    monkeypatch.setattr(memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    yield allocator
    comfy.model_management.current_loaded_models.clear()


def model_of(config: Any, **options: Any) -> Any:
    return dynamic_model(config, **options) if HAS_PAGES else build_model(config, **options)


LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
COND = [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]
SETTINGS = TuneSettings(steps=3, learning_rate=1e-3)


def whole_job(model: Any, after: Any = lambda: None) -> list[Any]:
    """Tune, invert, sample; ``after`` is called after each."""
    motion, losses = pipeline.tune(model, LATENTS, COND, SETTINGS)
    after()
    with torch.inference_mode():
        tuned = host.inflate_model(model, Inflation(), motion)
        noise = pipeline.invert(tuned, LATENTS, COND, 4)
        after()
        edited = pipeline.sample(tuned, noise, COND, COND, 4, 3.0)
    after()
    return [losses, noise, edited]


def test_a_tuning_an_inversion_and_a_sampling_leave_no_page_pinned(pages: Pages) -> None:
    counts: list[tuple[int, int]] = []
    ours = whole_job(model_of(WIDE), lambda: counts.append((pages.faults, pages.unpins)))
    assert all(faults == unpins for faults, unpins in counts), counts
    assert 100 < counts[0][0] and counts[0][0] <= counts[1][0] <= counts[2][0]
    if HAS_PAGES:
        assert counts[0][0] < counts[1][0] < counts[2][0]
    expected = whole_job(plain_model(WIDE))
    # The pages are read by nobody after their loan: one NaN would be everywhere by now.
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_failing_step_gives_its_pages_back(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    with trainer_of(model_of(WIDE), LATENTS, COND, SETTINGS) as trainer:
        assert trainer.plan  # made now, so that its probes are not what fails
        monkeypatch.setattr(torch.nn.functional, "linear", _failing_after(20, torch.nn.functional.linear))
        with pytest.raises(ZeroDivisionError):
            next(iter(trainer))
    assert pages.faults == pages.unpins > 0


def _failing_after(calls: int, original: Any) -> Any:
    def linear(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise ZeroDivisionError
        return original(*args, **kwargs)

    return linear


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_converted_weights_that_are_kept_are_copies(stored: torch.dtype, pages: Pages) -> None:
    """Stored in another dtype than computed in, they are kept between steps, and outlive their page."""
    losses = {}
    for budget in (1.0, 1e12):
        model = model_of(WIDE, dtype=stored, compute_dtype=torch.bfloat16)
        with trainer_of(model, LATENTS, COND, SETTINGS, torch.bfloat16, memory_budget=budget) as trainer:
            kept = trainer.plan is not None and trainer.unet.cast_cache.keep
            assert kept == (budget > 1)
            for _ in trainer:
                pass
            losses[budget] = trainer.losses
    assert losses[1.0] == losses[1e12]


def test_pages_of_other_models_count_as_free(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the budget of a tuning; the model's own pages do not."""
    with trainer_of(model_of(WIDE), LATENTS, COND, SETTINGS) as trainer:
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 1000)
        assert host.evictable_memory(trainer.unet.model) == 0
        alone = trainer._given()
        if not HAS_PAGES:
            return
        from comfy_aimdo import model_vbar

        own = host.weights_on_device(trainer.unet.model)
        monkeypatch.setattr(model_vbar, "vbars_analyze", lambda device=None: own + 700)
        assert host.evictable_memory(trainer.unet.model) == 700
        assert trainer._given() == pytest.approx(alone + SHARE_OF_FREE_MEMORY * 700)


@pytest.mark.comfyui
def test_temporal_layers_load_as_the_hosts_own_models_do(pages: Pages) -> None:
    model = model_of(WIDE)
    motion, _ = pipeline.tune(model, LATENTS, COND, TuneSettings(steps=1))
    temporal = host.inflate_model(model, Inflation(), motion).get_additional_models_with_key("tune-a-video")
    assert type(temporal[0]) is type(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_run_with_a_lora_keeps_its_key_wherever_the_weights_lie(dtype: torch.dtype) -> None:
    """Loaded whole, a patched weight is rounded at random; applied as it is used, it is not rounded at all."""

    @torch.inference_mode()
    def key(strength: float, offload: bool) -> str:
        model = build_model(UNETS["tiny"], dtype=dtype, compute_dtype=torch.float32)
        patch = torch.full((64, 64, 3, 3), 0.013)
        model.add_patches({"diffusion_model.middle_block.0.in_layers.2.weight": ("diff", (patch,))}, strength)
        with trainer_of(model, LATENTS, COND, SETTINGS) as trainer:
            if offload:
                assert model.partially_unload(model.offload_device, 1e12)
            return fingerprint(trainer.decisive, trainer.decisive_tensors())

    assert key(1.0, False) == key(1.0, True)
    assert key(1.0, False) != key(0.5, False)
