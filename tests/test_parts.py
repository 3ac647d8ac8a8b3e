"""The parts that an inflation is made of, one at a time, on layers of a few numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from tune_a_video.tav_core import attention, inflate, temporal
from tune_a_video.tav_core import unet as unet_parts
from tune_a_video.tav_core.attention import SPATIAL_MODES, attend, temporal_attend
from tune_a_video.tav_core.inflate import Evaluation, Inflation, Layout, inflated_forwards
from tune_a_video.tav_core.norm import pooled_group_norm
from tune_a_video.tav_core.temporal import TemporalLayer, draw_temporal
from tune_a_video.tav_core.tuning.trainable import CastingOperations
from unets import UNETS, build_model

INNER, CHANNELS, HEADS = 8, 6, 2
BLOCK = "middle_block.1.transformer_blocks.0"


# --- attention -------------------------------------------------------------------------------------


def test_modes_are_those_of_the_nodes() -> None:
    published = ("sparse-causal", "first frame only", "full", "per frame")
    assert SPATIAL_MODES == (*published, "self, first and previous", "shuffled groups")


def test_attention_is_softmax_of_products() -> None:
    q, k, v = torch.randn(3, 4, 8), torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    expected = torch.empty(3, 4, 8)
    for part in (slice(0, 4), slice(4, 8)):
        weight = (q[..., part] @ k[..., part].mT / 4**0.5).softmax(dim=-1)
        expected[..., part] = weight @ v[..., part]
    torch.testing.assert_close(attend(q, k, v, heads=2), expected)


@pytest.mark.parametrize(
    ("dtype", "learns", "computed_in"),
    [
        (torch.bfloat16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float16, True, torch.float16),
        (torch.float32, True, torch.float32),
    ],
)
def test_bfloat16_is_attended_to_in_float32_where_a_gradient_is_wanted_of_the_cpu(
    dtype: torch.dtype, learns: bool, computed_in: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (torch.randn(2, 5, 8, dtype=dtype) for _ in "qkv")
    fused, dtypes = F.scaled_dot_product_attention, []
    expected = fused(*(x.float().unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)

    def spy(*tensors: Tensor) -> Tensor:
        dtypes.append({x.dtype for x in tensors})
        return fused(*tensors)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    out = attend(q.requires_grad_(learns), k, v, heads=2)
    assert dtypes == [{computed_in}] and out.dtype == dtype and out.requires_grad == learns
    if computed_in == torch.float32:
        assert torch.equal(out, expected.to(dtype))
    else:
        torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)


def test_a_text_that_all_frames_share_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(6, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    text = torch.randn(1, 7, 8, dtype=torch.bfloat16).expand(6, -1, -1)
    fused, sizes = F.scaled_dot_product_attention, []

    def spy(*tensors: Tensor) -> Tensor:
        sizes.append([x.untyped_storage().nbytes() for x in tensors])
        return fused(*tensors)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    shared, written_out = attend(q, text, text, heads=2), attend(q, text.contiguous(), text.contiguous(), heads=2)
    assert torch.equal(shared, written_out)
    assert sizes == [[6 * 5 * 8 * 4, 7 * 8 * 4, 7 * 8 * 4], [6 * 5 * 8 * 4, 6 * 7 * 8 * 4, 6 * 7 * 8 * 4]]


def test_temporal_attention_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code paths of graphics cards, run on any device."""
    frames, n, heads = 3, 5, 2
    q, k, v = (torch.randn(2 * frames, n, 8) for _ in range(3))
    whole = temporal_attend(q, k, v, heads, frames)
    fused, calls, given = F.scaled_dot_product_attention, [], [t.untyped_storage().data_ptr() for t in (q, k, v)]

    def spy(*tensors: Tensor) -> Tensor:
        calls.append([len(tensor) for tensor in tensors])
        assert all(tensor.untyped_storage().data_ptr() in given for tensor in tensors), "copied"
        return fused(*tensors)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    assert torch.equal(temporal_attend(q, k, v, heads, frames), whole)
    assert calls == [[n] * 3] * 2
    monkeypatch.setattr(attention, "_fused_rows", lambda device: 3)
    torch.testing.assert_close(temporal_attend(q, k, v, heads, frames), whole)
    assert calls[2:] == [[3] * 3, [2] * 3] * 2


def test_a_grid_of_cuda_has_so_many_blocks() -> None:
    assert attention._fused_rows(torch.device("cuda", 1)) == 65535
    assert attention._fused_rows(torch.device("cpu")) > 2**40


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_gathering_the_first_and_the_previous_frame_is_differentiable(frames: int, first: bool) -> None:
    tokens = torch.randn(2 * frames * 3, 4, 2, dtype=torch.float64, requires_grad=True)
    anchor = torch.randn(2, 1, 3, 4, 2, dtype=torch.float64, requires_grad=True) if first else None

    def gather(tokens: Tensor, anchor: Tensor | None) -> Tensor:
        return attention.gather_frames(tokens, frames, 2, "sparse-causal", anchor)

    assert torch.autograd.gradcheck(gather, (tokens, anchor))
    gathered = gather(tokens, anchor)
    assert gathered.untyped_storage().nbytes() == gathered.nbytes == 2 * tokens.nbytes


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_no_frame_is_attended_to_twice(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, tiles, n = 2, 3, 5
    q, k, v = (torch.randn(chunks * frames * tiles, n, 8) for _ in "qkv")
    gathered = (attention.gather_frames(t, frames, chunks, "sparse-causal") for t in (k, v))
    expected, keys = attend(q, *gathered, HEADS), []

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys.append((len(q), k.shape[1] // n))
        return attend(q, k, v, HEADS)

    def run() -> Tensor:
        keys.clear()
        return attention.sparse_causal_attend(q, k, v, frames, chunks, spy)

    whole = [(len(q), 2)]
    with torch.no_grad():
        assert torch.equal(run(), expected) and keys == whole, "too few tokens"
    monkeypatch.setattr(attention, "_TOKENS_APART", n)
    assert torch.equal(run(), expected) and keys == whole, "a tuning has to repeat bit for bit"
    with torch.no_grad():
        torch.testing.assert_close(run(), expected)
        apart = [(chunks * tiles * 2, 1), (chunks * tiles * (frames - 2), 2)]
        assert keys == (apart if frames > 2 else whole)


# --- temporal layers -------------------------------------------------------------------------------


def test_a_temporal_layer_is_norm_attention_and_projection() -> None:
    layer = TemporalLayer(CHANNELS, INNER, HEADS, torch.nn)
    x = torch.randn(2 * 3, 4, CHANNELS)
    n = F.layer_norm(x, [CHANNELS], layer.norm_temp.weight, layer.norm_temp.bias, 1e-5)
    projections = (layer.attn_temp.to_q, layer.attn_temp.to_k, layer.attn_temp.to_v)
    assert all(projection.bias is None for projection in projections)
    q, k, v = (projection(n).unflatten(0, (2, 3)).transpose(1, 2).flatten(0, 1) for projection in projections)
    out = layer.attn_temp.to_out(attend(q, k, v, HEADS)).unflatten(0, (2, 4)).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(layer(x, 3), out)
    assert {key: value.shape for key, value in layer.state_dict(prefix="a.").items()} == {
        key: value.shape for key, value in draw_temporal({"a": (INNER, CHANNELS)}, 0).items()
    }


def test_drawn_weights_are_these_on_every_machine() -> None:
    """Files of a low rank hold the difference from them."""
    drawn = draw_temporal({"other": (4, 4), BLOCK: (INNER, CHANNELS)}, 3)
    alone = draw_temporal({BLOCK: (INNER, CHANNELS)}, 3)
    assert all(torch.equal(value, drawn[key]) for key, value in alone.items())
    corner = {name: alone[f"{BLOCK}.attn_temp.to_{name}.weight"][:2, 0].tolist() for name in "qkv"}
    assert corner == {name: pytest.approx(values, abs=1e-6) for name, values in GOLDEN.items()}
    for name in "qkv":
        weight = alone[f"{BLOCK}.attn_temp.to_{name}.weight"]
        assert weight.shape == (INNER, CHANNELS) and 0.8 < float(weight.abs().max()) * CHANNELS**0.5 <= 1
    zero = [f"{BLOCK}.attn_temp.to_out.0.{leaf}" for leaf in ("weight", "bias")] + [f"{BLOCK}.norm_temp.bias"]
    assert not any(alone[key].any() for key in zero) and bool((alone[f"{BLOCK}.norm_temp.weight"] == 1).all())


GOLDEN = {"q": [0.256636, -0.144730], "k": [-0.235130, 0.069581], "v": [0.043493, 0.162052]}


@pytest.fixture(scope="module")
def unet() -> Any:
    return build_model(UNETS["tiny"]).model.diffusion_model


@pytest.mark.parametrize("operations", [torch.nn, CastingOperations])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporal_layers_lie_under_the_blocks_paths(unet: Any, operations: Any, dtype: torch.dtype) -> None:
    paths = list(unet_parts.transformer_blocks(unet))
    drawn = temporal.initial_temporal(unet, lambda path: path != paths[0], 1)
    with torch.device("meta"):  # whatever the default device is
        root = temporal.build_temporal(unet, drawn, operations, dtype)
    layers = temporal.temporal_layers(root)
    assert list(layers) == paths[1:]
    state = root.state_dict()
    assert state.keys() == drawn.keys()
    assert all(torch.equal(value, drawn[key].to(dtype)) for key, value in state.items())
    assert not any(parameter.requires_grad for parameter in root.parameters())
    assert all(layer.heads == 4 for layer in layers.values())


# --- which forwards are swapped --------------------------------------------------------------------


class Odd(torch.nn.Module):
    """Modules that look a little like those that are wanted."""

    def __init__(self) -> None:
        super().__init__()
        silu, norm = torch.nn.SiLU(), torch.nn.GroupNorm(1, 2)
        self.out = torch.nn.Linear(2, 2)
        self.inner = torch.nn.Module()
        self.inner.out = torch.nn.Sequential(norm, silu)
        self.linear = torch.nn.Module()
        self.linear.in_layers = torch.nn.Sequential(torch.nn.Linear(2, 2), silu)
        self.other = torch.nn.Module()
        self.other.in_layers = torch.nn.Sequential(torch.nn.GroupNorm(1, 2), torch.nn.Identity())
        self.list = torch.nn.Module()
        self.list.in_layers = torch.nn.ModuleList([norm, silu])
        self.wrapped = torch.nn.ModuleDict()
        for name, parts in {"one": ["attn1"], "two": ["attn2"], "whole": ["attn1", "attn2"]}.items():
            self.wrapped[name] = torch.nn.ModuleDict({part: torch.nn.Identity() for part in parts})
            for part in parts:
                setattr(self.wrapped[name], part, self.wrapped[name]._modules[part])


def test_only_whole_blocks_are_blocks() -> None:
    root = torch.nn.Module()
    root.transformer_blocks = Odd().wrapped
    assert unet_parts.transformer_blocks(root) == {}
    outer = torch.nn.Module()
    outer.a = root
    assert list(unet_parts.transformer_blocks(outer)) == ["a.transformer_blocks.whole"]


def test_pooled_norms_are_those_of_residual_blocks_and_the_head(unet: Any) -> None:
    names = {module: name for name, module in unet.named_modules()}
    found = unet_parts.pooled_norms(unet)
    blocks = [name for name, module in unet.named_modules() if type(module).__name__ == "ResBlock"]
    wanted = {f"{name}.{part}.0" for name in blocks for part in ("in_layers", "out_layers")} | {"out.0"}
    assert {names[norm] for norm in found} == wanted
    assert all(names[silu] == names[norm].removesuffix("0") + "1" for norm, silu in found.items() if silu)
    assert all(found.values())
    # Where the timestep comes between norm and activation, they are apart.
    modulated = unet.get_submodule(blocks[0])
    modulated.use_scale_shift_norm = True
    try:
        apart = [names[norm] for norm, silu in unet_parts.pooled_norms(unet).items() if silu is None]
    finally:
        modulated.use_scale_shift_norm = False
    assert apart == [f"{blocks[0]}.out_layers.0"]


def test_what_only_looks_like_a_norm_to_pool_is_not() -> None:
    odd = Odd()
    assert unet_parts.pooled_norms(odd) == {odd.other.in_layers[0]: None}


@pytest.mark.parametrize("mode", SPATIAL_MODES)
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_each_part_can_be_left_out(unet: Any, mode: Any, pooled: bool, strength: float) -> None:
    blocks = unet_parts.transformer_blocks(unet)
    with_layer, crossed = list(blocks)[1], list(blocks)[2]
    blocks[crossed].disable_self_attn = True
    try:
        layers = {with_layer: SimpleNamespace()}
        inflation, backend, evaluation = Inflation(mode, pooled, strength), SimpleNamespace(), Evaluation(Layout(2, 1))
        parts = unet_parts.parts_of(unet)
        swaps = inflated_forwards(parts, inflation, layers, evaluation, backend)  # type: ignore[arg-type]
    finally:
        blocks[crossed].disable_self_attn = False
    names = {module: name for name, module in unet.named_modules()}
    wanted = [f"{path}.attn1" for path in blocks if path != crossed] if mode != "per frame" else []
    wanted += [with_layer] if strength else []
    norms = [names[norm] for norm in unet_parts.pooled_norms(unet)] if pooled else []
    wanted += [name.removesuffix("0") + end for name in norms for end in "01"]
    assert sorted(names[module] for module, _ in swaps) == sorted(wanted)


def test_the_defaults_are_the_papers() -> None:
    assert Inflation() == Inflation("sparse-causal", True, 1.0)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_temporal_layer_is_added_at_its_strength(strength: float) -> None:
    x, residual = torch.randn(2, 6, 4, 8)
    layer: Any = lambda given, frames: residual if frames == 3 and given is doubled else None  # noqa: E731
    doubled = 2 * x

    class Block(torch.nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return doubled

    block = Block()
    forward = inflate._with_temporal(block, layer, strength, Evaluation(Layout(3, 2)))
    torch.testing.assert_close(forward(x, n=1), doubled + strength * residual)
    block.forward = lambda x, n: doubled if n == 2 else None  # type: ignore[method-assign,assignment,return-value]
    others = inflate._with_temporal(block, layer, strength, Evaluation(Layout(3, 2)))
    torch.testing.assert_close(others(x, n=2), doubled + strength * residual)


def test_spatial_attention_takes_what_the_block_gives() -> None:
    """Context and value of another pack's patch, and options for the host's attention."""
    parts = {name: torch.nn.Linear(CHANNELS, INNER) for name in ("to_q", "to_k", "to_v")}
    attn: Any = SimpleNamespace(**parts, to_out=torch.nn.Linear(INNER, 3), heads=HEADS, attn_precision="exact")
    seen: list[Any] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, heads: int, **options: Any) -> Tensor:
        seen.append((heads, options))
        return attend(q, k, v, heads)

    def first_frame(path: str, name: str, tokens: Tensor) -> Tensor:
        seen.append((path, name, tokens.shape))
        return tokens[:, 2:3]

    x, context, value = torch.randn(3, 4 * 1, 5, CHANNELS)
    evaluation = Evaluation(Layout(4, 1))
    # One forward serves all evaluations.
    forward = inflate._spatial_attention(BLOCK, attn, "first frame only", evaluation, SimpleNamespace(attend=spy))  # type: ignore[arg-type]
    both = {"context": context, "value": value}
    for given, k, v in (({}, x, x), ({"context": context}, context, context), (both, context, value)):
        for elsewhere, at in ((None, 0), (first_frame, 2)):
            seen.clear()
            with evaluation.of(Evaluation(Layout(4, 1), elsewhere)):
                out = forward(x, **given, mask="ignored", transformer_options={"a": 1})
            assert evaluation == Evaluation(Layout(4, 1))
            anchor = [parts[name](tokens[at : at + 1]).expand(4, -1, -1) for name, tokens in (("to_k", k), ("to_v", v))]
            torch.testing.assert_close(out, attn.to_out(attend(attn.to_q(x), *anchor, HEADS)))
            assert seen.pop() == (HEADS, {"attn_precision": "exact", "transformer_options": {"a": 1}})
            assert seen == [(BLOCK, name, (1, 4, 1, 5, INNER)) for name in ("k", "v") if elsewhere]


# --- pooled norms ----------------------------------------------------------------------------------


def test_pooled_norms_in_half_precision_do_not_overflow() -> None:
    """Scaled gradients times activations, summed over a video, exceed what float16 holds."""
    frames, c, groups = 3, 8, 4
    generator = torch.Generator().manual_seed(0)
    x = (8 * torch.randn(2 * frames, c, 16, 8, generator=generator) + 3).half().requires_grad_()
    weight, bias = torch.randn(2, c, generator=generator).half()
    g = (512 * torch.rand(x.shape, generator=generator)).half()
    (dx,) = torch.autograd.grad(pooled_group_norm(x, frames, groups, weight, bias, 1e-5, True), x, g)
    wide = x.detach().double().requires_grad_()
    out = pooled_group_norm(wide, frames, groups, weight.double(), bias.double(), 1e-5, True)
    (expected,) = torch.autograd.grad(out, wide, g.double())
    assert dx.dtype == torch.float16 and bool(dx.isfinite().all())
    assert float((dx.double() - expected).norm() / expected.norm()) < 0.01


def test_epsilon_keeps_an_even_picture_finite() -> None:
    x = torch.full((4, 4, 3, 3), 7.0)
    assert torch.equal(pooled_group_norm(x, 2, 2, torch.ones(4), torch.full((4,), 0.5), 1e-5), torch.full_like(x, 0.5))
    one = torch.zeros_like(x)
    one[0, 0, 0, 0] = 0.01
    expected = F.group_norm(one.unflatten(0, (2, 2)).transpose(1, 2), 2, eps=1e-5).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(pooled_group_norm(one, 2, 2, torch.ones(4), torch.zeros(4), 1e-5), expected)


def as_five_d(x: Tensor, frames: int, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """The released code's norm of a 5-D tensor."""
    video = x.unflatten(0, (-1, frames)).transpose(1, 2)
    return F.group_norm(video, groups, weight, bias, 1e-5).transpose(1, 2).flatten(0, 1)


def norm_and_gradient(norm: Any, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = norm(x)
    return y.detach().double(), torch.autograd.grad(y, x, g)[0].double()


def off(ours: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(ours - exact) / torch.linalg.vector_norm(exact))


@pytest.mark.parametrize("ratio", [0.0, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_as_exact_as_the_native_norm_at_any_mean(dtype: torch.dtype, ratio: float) -> None:
    """``ratio``: of mean and standard deviation. Mean and scale folded into one rounded shift lose up to a sixth."""
    generator, frames, groups = torch.Generator().manual_seed(0), 4, 8
    x = (torch.randn(2 * frames, 32, 8, 8, generator=generator) + ratio).to(dtype)
    weight, bias, g = (torch.randn(s, generator=generator).to(dtype) for s in ((32,), (32,), x.shape))
    wide = [t.double() for t in (weight, bias)]
    exact = norm_and_gradient(lambda x: as_five_d(x, frames, groups, *wide), x.double(), g.double())
    native = norm_and_gradient(lambda x: as_five_d(x, frames, groups, weight, bias), x, g)
    ours = norm_and_gradient(lambda x: pooled_group_norm(x, frames, groups, weight, bias, 1e-5), x, g)
    for our, their, value in zip(ours, native, exact, strict=True):
        assert off(our, value) < max(1.6 * off(their, value), 6e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 1)])
def test_norms_take_pictures_of_one_pixel(size: tuple[int, int]) -> None:
    """A clip of 64 x 64 is one pixel on the lowest level of SD 1.5; PyTorch's kernel ended the process there."""
    x, g, (weight, bias) = torch.randn(4, 8, *size), torch.randn(4, 8, *size), torch.randn(2, 8)
    ours = norm_and_gradient(lambda x: pooled_group_norm(x, 2, 2, weight, bias, 1e-5), x, g)
    theirs = norm_and_gradient(lambda x: as_five_d(x, 2, 2, weight, bias), x, g)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "neither"])
def test_norms_take_any_layout(layout: str) -> None:
    x, g = torch.randn(4, 6, 5, 3), torch.randn(4, 6, 1, 1).expand(-1, -1, 5, 3)
    weight, bias = torch.randn(2, 6)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "neither":
        x = torch.randn(4, 6, 3, 5).mT
    ours = norm_and_gradient(lambda x: pooled_group_norm(x, 2, 3, weight, bias, 1e-5), x, g)
    theirs = norm_and_gradient(lambda x: as_five_d(x, 2, 3, weight, bias), x, g)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on another kind of device."""

    device = property(lambda self: torch.device("mps"))  # type: ignore[assignment]


class OnCuda(Elsewhere):
    """And one that says it lies on a card of NVIDIA's; kernels that PyTorch has for those alone are stood in for."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = {
            torch.batch_norm_stats: batch_norm_stats,
            torch.batch_norm_backward_reduce: batch_norm_backward_reduce,
            torch.batch_norm_backward_elemt: batch_norm_backward_elemt,
        }.get(function, function)
        return super().__torch_function__(function, types, args, kwargs or {})


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.float(), dim=(0, 2), correction=0)
    return mean, (var + eps).rsqrt()


def batch_norm_backward_reduce(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: None, *wanted: bool
) -> tuple[Tensor, Tensor, None, None]:
    assert wanted == (True, False, False)
    grad, x = grad.float(), x.float() - mean.view(-1, 1, 1)
    return grad.sum((0, 2, 3)), (grad * x).sum((0, 2, 3)), None, None


def batch_norm_backward_elemt(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, sums: Tensor, sums_x: Tensor, count: Tensor
) -> Tensor:
    """As PyTorch's kernel and SyncBatchNorm, which calls it, have it."""
    mean, rstd, weight, sums, sums_x = (t.view(-1, 1, 1) for t in (mean, rstd, weight, sums, sums_x))
    share = 1 / count.sum()
    deviation = (x.float() - mean) * rstd * rstd * sums_x * share
    return ((grad.float() - sums * share - deviation) * rstd * weight).to(x.dtype)


@pytest.mark.parametrize("kind", [Elsewhere, OnCuda])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_on_other_devices_are_the_same(kind: Any, dtype: torch.dtype) -> None:
    x, g = torch.randn(2, 4, 6, 5, 3).flatten(0, 1).add(2).to(dtype), torch.randn(8, 6, 5, 3).to(dtype)
    weight, bias = torch.randn(2, 6)
    weight[2] = 0.0
    silu = [pooled_group_norm(x, 4, 3, weight, bias, 1e-5, silu=silu) for silu in (False, True)]
    assert torch.equal(F.silu(silu[0]), silu[1])
    ours = norm_and_gradient(lambda x: pooled_group_norm(x, 4, 3, weight, bias, 1e-5, True), x, g)
    theirs = norm_and_gradient(
        lambda x: pooled_group_norm(x.as_subclass(kind), 4, 3, weight, bias, 1e-5, True).as_subclass(Tensor), x, g
    )
    for our, their in zip(ours, theirs, strict=True):
        assert off(their, our) < (1e-6 if dtype == torch.float32 else 4e-3)
