"""What the demo's training teaches beside the noise: demo/lessons.py."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Scripts import what lies beside them by its plain name.
sys.path.append(str(ROOT / "demo"))

import lessons  # noqa: E402
import world  # noqa: E402
from tune_a_video.tav_core.tiny_sd import model as tiny_sd  # noqa: E402

CELL = world.SIZE // lessons.CELLS


def _sprite(shape: str, colour: str, x: float, y: float, **more: object) -> world.Sprite:
    look = world.Look("light") if shape in world.PLAIN else world.Look("dark", "bar", "cyan")
    return world.Sprite(shape, colour, look, x, y, 9.0, **more)  # type: ignore[arg-type]


def _scene(*sprites: world.Sprite) -> world.Scene:
    return world.Scene(sprites, "grass", "painting")


TWO_KINDS = _scene(
    _sprite("star", "red", 14, 14), _sprite("star", "red", 48, 14), _sprite("circle", "blue", 30, 48, accessory="hat")
)


class _Attention(torch.nn.Module):
    """Cross-attention's projections, which pass on what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k = torch.nn.Identity(), torch.nn.Identity()


class _Features(torch.nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class _UNet(torch.nn.Module):
    """The modules that lessons look for, by the names of a UNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torch.nn.ModuleDict({"attn2": _Attention()})
        self.output_blocks = torch.nn.ModuleList(
            torch.nn.ModuleList([torch.nn.Identity(), _Features(6)]) for _ in range(5)
        )


def _ids(caption: str) -> torch.Tensor:
    (section,) = tiny_sd.Tokenizer(tiny_sd.FOLDER / "tokenizer").tokenize_with_weights(caption)["l"]
    return torch.tensor([token for token, _ in section])


def _lessons(unet: _UNet) -> lessons.Lessons:
    nouns = [int(_ids(word)[1]) for word in (*world.SHAPES, *world.PLURALS.values())]
    return lessons.Lessons(unet, nouns, int(_ids("and")[1]), int(_ids("on")[1]))


@pytest.mark.parametrize(
    ("caption", "kinds"),
    [
        ("two red stars and a blue circle with a hat on the grass, painting style", "111.222222"),
        ("a blue circle with boots on the night sky", "11111"),
        ("the grass, pencil style", ""),
        ("", ""),
    ],
)
def test_each_word_is_of_its_kind_of_sprites(caption: str, kinds: str) -> None:
    found = _lessons(_UNet()).kind_of_words(_ids(caption)[None])[0].tolist()
    wanted = [0, *(int(kind) if kind != "." else 0 for kind in kinds)]
    assert found == wanted + [0] * (tiny_sd.TOKENS - len(wanted))


def test_cells_show_the_sprite_that_is_in_front() -> None:
    scene = _scene(
        _sprite("square", "red", 30, 30, depth=1.0), _sprite("circle", "blue", 38, 30), _sprite("star", "pink", 10, 52)
    )
    cover = lessons.drawn([scene]).cover[0].float() / 255
    nearest = torch.from_numpy(world.draw(scene).astype(np.float32))
    for index, sprite in enumerate(scene.sprites[:2]):
        away = (nearest - torch.tensor(world.COLOURS[sprite.colour])).abs().sum(-1) < 60
        cells = away.float().unfold(0, CELL, CELL).unfold(1, CELL, CELL).mean((2, 3))
        both = cells[(cover[index] > 0.99)]
        assert len(both) >= 3 and both.min() > 0.6
        assert cells[cover[index] == 0].max() < 0.35
    assert cover[3].max() == 0


def test_what_is_told_is_what_the_scene_has() -> None:
    found = lessons.drawn([TWO_KINDS, _scene()])
    assert found.kind.tolist() == [[1, 1, 2, 0], [0, 0, 0, 0]]
    star, circle = found.facts[0, 0].tolist(), found.facts[0, 2].tolist()
    assert [world.SHAPES[star[0]], list(world.COLOURS)[star[1]], world.NUMBERS[star[3]]] == ["star", "red", "two"]
    assert [world.PATTERNS[star[5]], list(world.SECONDS)[star[6]]] == ["bar", "cyan"]
    # A plain sprite has no pattern and no second colour, which are values of their own.
    assert circle[5] == len(world.PATTERNS) and circle[6] == len(world.SECONDS) and circle[2] == 1


def test_the_binding_is_wrong_where_a_sprite_looks_at_the_others_words() -> None:
    unet = _UNet()
    taught = _lessons(unet)
    shown = lessons.drawn([TWO_KINDS]).rows(torch.tensor([0]), torch.device("cpu"))
    captions = _ids("two red stars and a blue circle with a hat on the grass, painting style")[None]
    kind = taught.kind_of_words(captions)[0]
    cells = torch.stack([(shown.cover[0] * (shown.kind[0] == of)[:, None, None]).sum(0) for of in (1, 2)]).flatten(1)

    def error(swapped: bool) -> float:
        words = torch.stack([kind == of for of in (1, 2)]).float()
        queries = 20 * (cells.flip(0) if swapped else cells)
        attention = unet.block["attn2"]
        # Two heads of the same two channels: a cell's query is what it shows.
        attention.to_q(queries.T.repeat(1, 2)[None])
        attention.to_k(words.T.repeat(1, 2)[None])
        for block in (3, 4):
            unet.output_blocks[block][1](torch.zeros(1, 6, 8, 8))
        return float(taught(captions, shown).detach())

    assert error(swapped=False) < error(swapped=True) - 1


def test_a_caption_of_one_kind_teaches_no_binding_and_its_features_learn() -> None:
    torch.manual_seed(0)
    unet = _UNet()
    taught = _lessons(unet)
    scene = _scene(_sprite("star", "red", 20, 20), _sprite("star", "red", 44, 44))
    shown = lessons.drawn([scene]).rows(torch.tensor([0]), torch.device("cpu"))
    captions = _ids("two red stars on the grass, painting style")[None]
    features = torch.randn(1, 6, lessons.CELLS, lessons.CELLS)
    optimizer = torch.optim.Adam(taught.parameters(), lr=0.1)
    errors = []
    for _ in range(60):
        unet.block["attn2"].to_q(torch.zeros(1, 256, 4))
        unet.block["attn2"].to_k(torch.zeros(1, tiny_sd.TOKENS, 4))
        for block in (3, 4):
            unet.output_blocks[block][1](features)
        error = taught(captions, shown)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.2 * errors[0]


def test_only_others_of_a_kind_are_less_noisy_and_the_rest_is_as_the_timestep_says() -> None:
    alpha_bars = torch.linspace(0.99, 0.01, 1000)
    lone = _scene(_sprite("star", "red", 20, 20), _sprite("circle", "blue", 44, 44))
    shown = lessons.drawn([TWO_KINDS, lone] * 40).rows(torch.arange(80), torch.device("cpu"))
    t = torch.full((80,), 700)
    kept = alpha_bars[t][:, None, None, None]
    each, usual = lessons.uneven(kept, shown, t, alpha_bars, torch.Generator().manual_seed(0))
    assert torch.equal(each[usual == 1], kept.expand_as(each)[usual == 1])
    assert (each >= kept).all()
    changed = (usual == 0).flatten(1).any(1)
    assert not changed[1::2].any() and 4 <= int(changed.sum()) <= 24
    for row in changed.nonzero().flatten().tolist():
        second = shown.cover[row, 1] > 0.5
        assert (usual[row, 0][second] == 0).all()
        for other in (0, 2):
            assert (usual[row, 0][shown.cover[row, other] > 0.5] == 1).all()
