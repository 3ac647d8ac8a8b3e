"""The demo's job: one built-in clip, one sentence for it, two edits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

FRAMES = 8
SIZE = 96
FPS = 8.0
SOURCE_PROMPT = "a red ball is bouncing on a meadow"
EDIT_PROMPTS = ("a blue ball is bouncing on a meadow", "a red ball is bouncing in the snow")
SEED = 0
TUNE_STEPS = 25
# Ten times the released rate: twenty-five steps instead of five hundred should leave a mark on the loss curve.
LEARNING_RATE = 3e-4
DDIM_STEPS = 10
# The released guidance of 12.5 is for trained weights; random ones are driven far off the clip by it.
GUIDANCE = 2.0


class Files(NamedTuple):
    """Names of what the job leaves, inside one folder."""

    clip: str = "clip.mp4"
    checkpoint: str = "untrained.safetensors"
    edits: tuple[str, ...] = ("edit-1.mp4", "edit-2.mp4")
    loss_curve: str = "loss-curve.png"
    motion: str = "motion.safetensors"
    contact_sheet: str = "contact-sheet.png"


FILES = Files()


def draw_clip() -> Tensor:
    """A red ball that bounces across a meadow once: [FRAMES, SIZE, SIZE, 3] in 0..1."""
    generator = torch.Generator().manual_seed(SEED)
    grain = torch.rand(SIZE, SIZE, generator=generator).mul(70).byte().numpy()
    background = Image.new("RGB", (SIZE, SIZE), (120, 180, 235))
    horizon = SIZE // 2
    meadow = Image.merge("RGB", [Image.fromarray(grain + shade) for shade in (20, 110, 15)])
    background.paste(meadow.crop((0, horizon, SIZE, SIZE)), (0, horizon))
    background = background.filter(ImageFilter.GaussianBlur(0.7))

    radius, ground = SIZE / 7, SIZE * 0.92
    frames = []
    for i in range(FRAMES):
        along = i / (FRAMES - 1)
        x = radius + along * (SIZE - 2 * radius)
        y = ground - radius - abs(math.cos(math.pi * along)) * SIZE * 0.55
        frame = background.copy()
        draw = ImageDraw.Draw(frame)
        draw.ellipse((x - radius, ground - radius / 3, x + radius, ground + radius / 3), fill=(30, 70, 30))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(205, 30, 30))
        draw.ellipse((x - radius / 2, y - radius / 2, x, y), fill=(240, 120, 110))
        frames.append(torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3))
    return torch.stack(frames).float() / 255
