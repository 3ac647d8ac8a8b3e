"""Convolutions on the CPU: one result by every kernel, and which shape gets which."""

from __future__ import annotations

from typing import Any

import comfy.ldm.modules.attention
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from tune_a_video.tav_core import convolution, host, pipeline, winograd
from tune_a_video.tav_core.convolution import conv2d
from tune_a_video.tav_core.host import inflated_model, on_cpu
from tune_a_video.tav_core.inflate import Evaluation, Inflation, Layout
from tune_a_video.tav_core.unet import transformer_blocks
from unets import UNETS, build_model

LAST = torch.channels_last


@pytest.mark.parametrize("as_product", [True, False])
@pytest.mark.parametrize(
    ("kernel", "options"), [(3, {"padding": 1}), (3, {"padding": 1, "stride": 2}), (1, {}), (3, {"dilation": 2})]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_every_kernel_gives_the_convolution(
    as_product: bool, kernel: int, options: Any, bias: bool, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "_CHANNELS_A_POSITION", 0 if as_product else 10**6)
    layer = torch.nn.Conv2d(4, 6, kernel, bias=bias, **options).requires_grad_(False)
    x = torch.randn(3, 4, 6, 7).contiguous(memory_format=layout)
    assert convolution._is_product(x, layer) == as_product
    out = conv2d(x, layer, layer.weight, layer.bias)
    torch.testing.assert_close(out, layer(x))
    assert out.shape[2:] == convolution.out_size(x, layer) and (not as_product or out.is_contiguous())
    check_gradient(x, layer)


def check_gradient(x: Tensor, layer: torch.nn.Conv2d) -> None:
    with torch.enable_grad():
        y = layer(given := x.clone().requires_grad_())
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        (expected,) = torch.autograd.grad(y, given, grad)
    out = convolution.input_gradient(grad, x.new_empty(1).expand(x.shape), layer, layer.weight)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("frames", "size", "channels"),
    [(8, (4, 4), (256, 320)), (3, (7, 9), (320, 256)), (2, (8, 64), (256, 256)), (40, (5, 16), (256, 300))],
)
@pytest.mark.parametrize("bias", [True, False])
def test_winograds_filtering_gives_the_convolution(
    frames: int, size: tuple[int, int], channels: tuple[int, int], bias: bool
) -> None:
    """Odd sides, more tiles than are transformed at a time, and more channels than a block has."""
    layer = torch.nn.Conv2d(*channels, 3, padding=1, bias=bias).requires_grad_(False)
    x = torch.randn(frames, channels[0], *size, generator=torch.Generator().manual_seed(0))
    assert convolution._is_winograd(x, layer)
    out = conv2d(x, layer, layer.weight, layer.bias)
    exact = F.conv2d(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double(), padding=1)
    assert out.is_contiguous()
    # The library errs by two to six roundings of the largest value, by the algorithm that suits the processor.
    assert (out - exact).abs().max() < 16 * torch.finfo(torch.float32).eps * exact.abs().max()
    check_gradient(x, layer)


def test_winograds_filtering_changes_weights_and_results_by_the_published_matrices() -> None:
    """In float64 on the smallest cases, down to one channel, one frame, one position."""
    for frames, height, width, inner, outer in ((1, 1, 1, 1, 1), (2, 3, 2, 3, 1), (1, 4, 5, 2, 7)):
        x, weight = torch.randn(frames, inner, height, width).double(), torch.randn(outer, inner, 3, 3).double()
        torch.testing.assert_close(winograd.conv3x3(x, weight), F.conv2d(x, weight, padding=1))


def test_winograds_filtering_serves_float32_3x3_convolutions_of_many_channels_on_the_cpu() -> None:
    def chosen(frames: int, size: int, channels: int, dtype: torch.dtype = torch.float32, **options: Any) -> bool:
        device = options.pop("device", "cpu")
        layer = torch.nn.Conv2d(
            channels, channels, options.pop("kernel", 3), device="meta", **{"padding": 1, **options}
        )
        return convolution._is_winograd(torch.empty(frames, channels, size, size, device=device, dtype=dtype), layer)

    assert chosen(8, 4, 1280) and chosen(8, 64, 320) and chosen(1, 16, 640)
    assert not chosen(4, 4, 1280) and not chosen(32, 2, 1280) and not chosen(16, 16, 128)
    assert not chosen(8, 8, 320, torch.bfloat16) and not chosen(8, 8, 320, device="meta")
    for option in ({"stride": 2}, {"padding": 0}, {"dilation": 2}, {"groups": 2}, {"kernel": 1}):
        assert not chosen(8, 8, 320, **option), option
    assert not chosen(8, 8, 320, padding_mode="circular")


def test_a_product_serves_few_positions_of_many_channels_on_the_cpu() -> None:
    def product(frames: int, size: int, channels: int, **options: Any) -> bool:
        device = options.pop("device", "cpu")
        layer = torch.nn.Conv2d(4, channels, 3, padding=1, device="meta", **options)
        return convolution._is_product(torch.empty(frames, 4, size, size, device=device), layer)

    assert product(8, 2, 1280) and product(16, 4, 1280) and product(8, 4, 640)
    assert not product(16, 4, 640) and not product(8, 8, 1280) and not product(8, 1, 4)
    assert product(16, 8, 1280, stride=2) and not product(16, 8, 1280)
    assert not product(8, 2, 1280, device="meta")
    assert not product(8, 2, 1280, groups=4) and not product(8, 2, 1280, padding_mode="circular")


@pytest.mark.parametrize("replaced", [False, True])
def test_the_gradient_of_a_seamless_layer_wraps_around(replaced: bool) -> None:
    """Packs for seamless tiles change the padding, or the function behind the layer. Weights are the host's."""
    with torch.inference_mode():
        layer = torch.nn.Conv2d(6, 5, 3, padding=1, padding_mode="zeros" if replaced else "circular")
    wrapped = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)  # noqa: E731
    if replaced:
        vars(layer)["_conv_forward"] = wrapped
    x = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(2, 5, 5, 7, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad(wrapped(given := x.requires_grad_(), layer.weight.clone(), None), given, grad)
    with torch.no_grad():
        found = convolution.input_gradient(grad, x.new_empty(1).expand(x.shape), layer, layer.weight)
    torch.testing.assert_close(found, expected)


def test_what_other_packs_make_of_a_layer_stays() -> None:
    """Packs for seamless pictures exchange the function behind a convolution."""
    layer: Any = torch.nn.Conv2d(4, 64, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, 4, 2, 2)
    assert convolution._is_product(x, layer)
    layer._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), weight, bias)
    assert torch.equal(conv2d(x, layer, layer.weight, layer.bias), layer(x))


@pytest.mark.parametrize("chosen", [None, "another pack", "the user", "the host"])
@torch.inference_mode()
def test_attention_on_the_cpu_keeps_no_scores_unless_somebody_chose_another(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = comfy.ldm.modules.attention
    assert attention.optimized_attention is attention.attention_sub_quad, "the host's choice on the CPU"
    names = []

    def noting(name: str) -> Any:
        original = getattr(attention, name)
        return lambda *args, **options: names.append(name) or original(*args, **options)

    model = build_model(UNETS["tiny"])
    x = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(attention, "attention_pytorch", noting("attention_pytorch"))
    if chosen == "another pack":
        options = model.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = lambda replaced, *args, **kwargs: replaced(*args, **kwargs)
    elif chosen == "the user":
        monkeypatch.setattr(on_cpu.args, "use_quad_cross_attention", True)
    elif chosen == "the host":
        monkeypatch.setattr(attention, "optimized_attention", attention.attention_split)
    out = pipeline.sample(host.inflate_model(model, Inflation()), x, prompt(1, rows=1), prompt(2, rows=1), 1, 3.0)
    # Hosts without a wrapper do not ask for an override, and keep their own.
    assert bool(names) == (chosen is None and hasattr(attention, "wrap_attn"))
    monkeypatch.setattr(inflated_model, "with_fused_attention", lambda options: options)
    expected = pipeline.sample(host.inflate_model(model, Inflation()), x, prompt(1, rows=1), prompt(2, rows=1), 1, 3.0)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefers", [True, False])
def test_large_bfloat16_convolutions_have_channels_last_where_the_machine_prefers_it(
    prefers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "prefers_channels_last", lambda: prefers)

    def is_last(size: int = 8, dtype: torch.dtype = torch.bfloat16, kernel: int = 3, may: bool = True) -> bool:
        layer = torch.nn.Conv2d(4, 16, kernel, padding=kernel // 2, dtype=dtype).requires_grad_(False)
        x = torch.randn(2, 4, size, size).to(dtype)
        out = conv2d(x, layer, layer.weight, layer.bias, may_reorder=may)
        torch.testing.assert_close(out, layer(x), rtol=0.02, atol=0.02)
        return out.is_contiguous(memory_format=LAST)

    assert is_last() == prefers
    assert not is_last(4) and not is_last(dtype=torch.float32) and not is_last(kernel=1) and not is_last(may=False)


@pytest.mark.parametrize(("gain", "expected"), [(0.7, False), (1.0, False), (1.1, False), (1.5, True)])
def test_the_probe_wants_a_clear_gain(gain: float, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    disturbance = iter([1.0, 3.0, 1.0, 1.0, 2.0, 1.0, 9.0, 1.0])

    def seconds(x: Tensor, weight: Tensor) -> float:
        return next(disturbance) * (1.0 if x.is_contiguous(memory_format=LAST) else gain)

    monkeypatch.setattr(convolution, "_seconds", seconds)
    assert convolution.prefers_channels_last.__wrapped__() == expected


def test_the_probe_measures_this_machine() -> None:
    assert convolution.prefers_channels_last() in (True, False)
    assert convolution._seconds(torch.ones(1, 2, 4, 4), torch.ones(2, 2, 3, 3)) >= 0


# --- in an inflated evaluation ---------------------------------------------------------------------


class Projection(torch.nn.Linear):
    """Notes how many rows it is given."""

    rows: list[int] = []  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return super().forward(x)


def test_a_text_that_frames_share_is_projected_once_a_video() -> None:
    evaluation, projection = Evaluation(Layout(3, 2)), Projection(8, 4)
    forward = on_cpu._of_text(projection, on_cpu._Texts(evaluation))
    shared = torch.randn(2, 5, 8).repeat_interleave(3, 0)
    for text, rows in ((shared, 2), (shared, 2), (torch.randn(6, 5, 8), 6), (torch.randn(4, 5, 8), 4)):
        Projection.rows.clear()
        out = forward(text)
        assert Projection.rows == [rows]
        torch.testing.assert_close(out, F.linear(text, projection.weight, projection.bias))
    with evaluation.of(Evaluation(Layout(2, 3))):
        Projection.rows.clear()
        forward(torch.randn(3, 5, 8).repeat_interleave(2, 0))
        assert Projection.rows == [3]


def prompt(seed: int, rows: int) -> list[Any]:
    return [[torch.randn(rows, 7, 32, generator=torch.Generator().manual_seed(seed)), {}]]


@torch.inference_mode()
def test_an_evaluation_is_the_same_with_the_hosts_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(UNETS["tiny"])
    unet, x = host.unet_of(model), torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    texts = prompt(1, rows=1), prompt(2, rows=3)

    def sampled(text: Any) -> Tensor:
        return pipeline.sample(host.inflate_model(model, Inflation()), x, text, prompt(3, rows=1), 1, 3.0)

    ours = [sampled(text) for text in texts]
    block = next(iter(transformer_blocks(unet).values()))
    calls: list[int] = []
    theirs = {layer: type(layer).forward for layer in (block.attn2.to_k, unet.input_blocks[0][0])}
    for layer, forward in theirs.items():
        layer.forward = lambda x, layer=layer, forward=forward: calls.append(len(x)) or forward(layer, x)
    patched = [sampled(text) for text in texts]
    assert calls and set(calls) == {6}, "another pack's forwards are called, with every row"
    for layer in theirs:
        del layer.forward
    monkeypatch.setattr(inflated_model, "cpu_forwards", lambda *_: [])
    for our, other, expected in zip(ours, patched, map(sampled, texts), strict=True):
        torch.testing.assert_close(our, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(ours[0], ours[1])
