"""Test the auxiliary losses of the demo's UNet training."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Scripts import what lies beside them by its plain name.
sys.path.append(str(ROOT / "demo"))

import auxiliary_losses  # noqa: E402
import world  # noqa: E402
from auxiliary_losses import CELLS  # noqa: E402
from tune_a_video.tav_core.tiny_sd import model as tiny_sd  # noqa: E402

CPU = torch.device("cpu")
PIXELS = tiny_sd.PIXELS_PER_LATENT


def _sprite(shape: str, colour: str, x: float, y: float, **more: object) -> world.Sprite:
    look = world.Look("light") if shape in world.PLAIN else world.Look("dark", "bar", "cyan")
    return world.Sprite(shape, colour, look, x, y, 9.0, **more)  # type: ignore[arg-type]


def _scene(*sprites: world.Sprite) -> world.Scene:
    return world.Scene(sprites, "grass", "painting")


TWO_GROUPS = _scene(
    _sprite("star", "red", 14, 14), _sprite("star", "red", 48, 14), _sprite("circle", "blue", 30, 48, accessory="hat")
)
CAPTION = "two red stars and a blue circle with a hat on the grass, painting style"

NO_COPIES = torch.zeros(1, 4, dtype=torch.bool)
QUERIES, TOKEN_KEYS = torch.zeros(1, CELLS**2, 4), torch.zeros(1, tiny_sd.TOKENS, 4)
FEATURES = torch.zeros(1, 6, CELLS, CELLS)


class _Attention(torch.nn.Module):
    """Stand in for attention: the projections return their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k = torch.nn.Identity(), torch.nn.Identity()


class _Transformer(torch.nn.Identity):
    """Stand in for a transformer of 6 channels."""

    in_channels = 6


class _UNet(torch.nn.Module):
    """Hold the modules that the losses hook, by the names that they have in a UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torch.nn.ModuleDict({"attn1": _Attention(), "attn2": _Attention()})
        self.output_blocks = torch.nn.ModuleList(
            torch.nn.ModuleList([torch.nn.Identity(), _Transformer()]) for _ in range(5)
        )

    def evaluate(
        self,
        queries: torch.Tensor = QUERIES,
        keys: torch.Tensor = TOKEN_KEYS,
        features: torch.Tensor = FEATURES,
        self_queries: torch.Tensor = QUERIES,
        self_keys: torch.Tensor = QUERIES,
    ) -> None:
        """Pass tensors through the hooked modules."""
        self.block["attn1"].to_q(self_queries)
        self.block["attn1"].to_k(self_keys)
        self.block["attn2"].to_q(queries)
        self.block["attn2"].to_k(keys)
        for block in (3, 4):
            self.output_blocks[block][1](features)


def _ids(caption: str) -> torch.Tensor:
    (section,) = tiny_sd.Tokenizer(tiny_sd.FOLDER / "tokenizer").tokenize_with_weights(caption)["l"]
    return torch.tensor([token for token, _ in section])


def _losses(unet: _UNet) -> auxiliary_losses.AuxiliaryLosses:
    nouns = [int(_ids(word)[1]) for word in (*world.SHAPES, *world.PLURALS.values())]
    return auxiliary_losses.AuxiliaryLosses(unet, nouns, int(_ids("and")[1]), int(_ids("on")[1]))


@pytest.mark.parametrize(
    ("caption", "groups"),
    [
        (CAPTION, "111.222222"),
        ("a blue circle with boots on the night sky", "11111"),
        ("the grass, pencil style", ""),
        ("", ""),
    ],
)
def test_tokens_belong_to_their_group(caption: str, groups: str) -> None:
    found = _losses(_UNet()).groups_of_tokens(_ids(caption)[None])[0].tolist()
    expected = [0, *(0 if group == "." else int(group) for group in groups)]
    assert found == expected + [0] * (tiny_sd.TOKENS - len(expected))


def test_masks_show_the_sprite_in_front() -> None:
    scene = _scene(
        _sprite("square", "red", 30, 30, depth=1.0), _sprite("circle", "blue", 38, 30), _sprite("star", "pink", 10, 52)
    )
    masks = auxiliary_losses.label([scene]).mask[0].float() / 255
    picture = torch.from_numpy(world.draw(scene).astype(np.float32))
    for mask, sprite in zip(masks[:2], scene.sprites[:2], strict=True):
        has_colour = (picture - torch.tensor(world.COLOURS[sprite.colour])).abs().sum(-1) < 60
        share = has_colour.float().unfold(0, PIXELS, PIXELS).unfold(1, PIXELS, PIXELS).mean((2, 3))
        inside = share[mask > 0.99]
        assert len(inside) >= 3 and inside.min() > 0.6
        assert share[mask == 0].max() < 0.35
    assert masks[3].max() == 0


def test_attributes_are_the_scenes() -> None:
    labels = auxiliary_losses.label([TWO_GROUPS, _scene()])
    assert labels.group.tolist() == [[1, 1, 2, 0], [0, 0, 0, 0]]
    star, circle = labels.attributes[0, 0].tolist(), labels.attributes[0, 2].tolist()
    assert [world.SHAPES[star[0]], list(world.COLOURS)[star[1]], world.NUMBERS[star[3]]] == ["star", "red", "two"]
    assert [world.PATTERNS[star[5]], list(world.SECONDS)[star[6]]] == ["bar", "cyan"]
    # The last value of a pattern and of a second colour means that a sprite is plain.
    assert circle[5] == len(world.PATTERNS) and circle[6] == len(world.SECONDS) and circle[2] == 1


def test_grounding_loss_is_larger_where_sprites_attend_to_the_other_group() -> None:
    unet = _UNet()
    losses = _losses(unet)
    labels = auxiliary_losses.label([TWO_GROUPS]).batch(torch.tensor([0]), CPU)
    captions = _ids(CAPTION)[None]
    of_cells = torch.stack([(labels.mask[0] * (labels.group[0] == group)[:, None, None]).sum(0) for group in (1, 2)])
    of_tokens = torch.stack([losses.groups_of_tokens(captions)[0] == group for group in (1, 2)]).float()

    def loss(of_queries: torch.Tensor) -> float:
        # Both heads have a channel for each group.
        queries, keys = (part.flatten(1).T.repeat(1, 2)[None] for part in (20 * of_queries, of_tokens))
        unet.evaluate(queries, keys)
        return float(losses(captions, labels, NO_COPIES).detach())

    assert loss(of_cells) < loss(of_cells.flip(0)) - 1


@pytest.mark.parametrize("scene", [TWO_GROUPS, _scene(_sprite("star", "red", 14, 14), _sprite("star", "red", 48, 14))])
def test_group_loss_is_least_where_sprites_attend_to_others_of_their_group(scene: world.Scene) -> None:
    unet = _UNet()
    losses = _losses(unet)
    labels = auxiliary_losses.label([scene]).batch(torch.tensor([0]), CPU)
    one, other = labels.mask[0, :2].flatten(1)
    background = 1 - labels.mask[0].sum(0).clamp(max=1).flatten()

    def loss(of_one: torch.Tensor, of_other: torch.Tensor) -> float:
        # The first head attends as asked. The second head attends to everything.
        queries, keys = torch.stack([one, other], 1), torch.stack([of_one, of_other], 1)
        queries, keys = (torch.cat([part, torch.zeros_like(part)], 1)[None] for part in (30 * queries, keys))
        unet.evaluate(self_queries=queries, self_keys=keys)
        return float(losses(_ids("")[None], labels, NO_COPIES).detach())

    to_group, to_background, evenly = loss(other, one), loss(background, background), loss(0 * one, 0 * one)
    assert to_group < evenly - 1 and evenly < to_background - 1
    # Attention to oneself alone is neither right nor wrong.
    assert to_group < loss(one, other) < to_background


def test_group_loss_counts_no_sprite_that_is_alone() -> None:
    unet = _UNet()
    losses = _losses(unet)
    scene = _scene(_sprite("star", "red", 14, 14), _sprite("circle", "blue", 40, 44))
    labels = auxiliary_losses.label([scene]).batch(torch.tensor([0]), CPU)
    found = []
    for scale in (0.0, 3.0):
        attention = scale * torch.randn(1, CELLS**2, 4, generator=torch.Generator().manual_seed(0))
        unet.evaluate(self_queries=attention, self_keys=attention)
        found.append(float(losses(_ids("")[None], labels, NO_COPIES).detach()))
    assert found[0] == found[1]


def test_probes_learn_from_captions_of_one_group() -> None:
    torch.manual_seed(0)
    unet = _UNet()
    losses = _losses(unet)
    labels = auxiliary_losses.label([_scene(_sprite("star", "red", 20, 20))]).batch(torch.tensor([0]), CPU)
    captions = _ids("a red star on the grass, painting style")[None]
    features = torch.randn(1, 6, CELLS, CELLS)
    optimizer = torch.optim.Adam(losses.parameters(), lr=0.1)
    found = []
    for _ in range(60):
        unet.evaluate(features=features)
        loss = losses(captions, labels, NO_COPIES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < 0.2 * found[0]


def test_looks_of_copying_sprites_count_more() -> None:
    torch.manual_seed(0)
    unet = _UNet()
    losses = _losses(unet)
    unet.evaluate(features=torch.randn(1, 6, CELLS, CELLS))
    labels = auxiliary_losses.label([TWO_GROUPS]).batch(torch.tensor([0]), CPU)
    captions, copies = _ids(CAPTION)[None], torch.tensor([[True, False, False, False]])

    def difference(sprite: int, attribute: int) -> float:
        attributes = labels.attributes.clone()
        attributes[0, sprite, attribute] += 1
        changed = labels._replace(attributes=attributes)
        return float((losses(captions, changed, copies) - losses(captions, changed, NO_COPIES)).detach())

    # The shape of the first star, the pattern of the second, and the pattern of the first.
    of_shape, of_other, of_look = difference(0, 0), difference(1, 5), difference(0, 5)
    assert of_shape == pytest.approx(of_other, rel=1e-4) and of_shape > 0
    assert abs(of_look - of_shape) > 0.01


def test_pictures_that_share_a_pattern_are_found() -> None:
    scenes = [
        TWO_GROUPS,
        _scene(_sprite("star", "red", 20, 20)),
        _scene(_sprite("circle", "red", 20, 20), _sprite("circle", "red", 44, 44)),
        _scene(_sprite("star", "red", 20, 20), _sprite("heart", "blue", 44, 44)),
        _scene(),
    ]
    assert auxiliary_losses.shares_pattern(auxiliary_losses.label(scenes)).tolist() == [True] + 4 * [False]


def test_only_others_of_a_group_have_less_noise() -> None:
    alpha_bars = torch.linspace(0.99, 0.01, 1000)
    single = _scene(_sprite("star", "red", 20, 20), _sprite("circle", "blue", 44, 44))
    labels = auxiliary_losses.label([TWO_GROUPS, single] * 40).batch(torch.arange(80), CPU)
    t = torch.full((80,), 700)
    alpha_bar, weight, copies = auxiliary_losses.mixed_noise_levels(
        t, labels, alpha_bars, torch.Generator().manual_seed(0)
    )
    assert (alpha_bar[weight > 0] == alpha_bars[700]).all()
    assert (alpha_bar >= alpha_bars[700]).all()
    mixed = (weight == 0).flatten(1).any(1)
    assert not mixed[1::2].any() and 16 <= int(mixed.sum()) <= 32
    assert (copies == mixed[:, None] * torch.tensor([True, False, False, False])).all()
    for row in mixed.nonzero().flatten().tolist():
        # The first star and the circle keep their noise, and the star counts more; the second star has less.
        for sprite, expected in enumerate((3, 0, 1)):
            assert (weight[row, 0][labels.mask[row, sprite] > 0.5] == expected).all()
