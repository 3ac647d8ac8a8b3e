"""The kinds of input. Each is a function that damages one and hands it to the pack as the host would.

A ValueError that names the input is a clear error; any other exception is a fault.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import imageio_ffmpeg
import mutate
import safetensors.torch
import torch
from torch import Tensor
from tune_a_video.tav_core.media.clip import load_clip
from tune_a_video.tav_core.media.encode import FORMATS, save_clip
from tune_a_video.tav_core.media.select import RESIZE_MODES, START_UNITS
from tune_a_video.tav_core.motion.file import FORMAT, Motion, load_motion
from tune_a_video.tav_core.motion.low_rank import SEED_KEY, compress, expand

KINDS = ("video", "motion", "inputs", "tensors", "paths")
Case = Callable[[Random], None]


def kinds(names: Sequence[str], scratch: Path, shared: Path) -> dict[str, Case]:
    """Return cases by kind. ``scratch``: an empty folder; ``shared``: a folder of real clips, which may be missing.

    Motions need the host's engine. Nodes need its other modules as well, and are left out without them.
    """
    found: dict[str, Case] = {}
    clips = _clips(scratch, shared) if {"video", "inputs"} & set(names) else {}
    if "video" in names:
        found["video"] = lambda rng: video_case(rng, clips, scratch)
    if "motion" in names:
        model = _tiny_model()
        found["motion"] = lambda rng: motion_case(rng, model, scratch)
    on_host = {"inputs": inputs_case, "tensors": tensors_case, "paths": lambda rng: paths_case(rng, scratch)}
    if set(on_host) & set(names):
        try:
            import comfy_api.latest  # noqa: F401
            import folder_paths
        except ImportError:
            return found
        for folder in (folder_paths.get_input_directory(), folder_paths.get_output_directory()):
            os.makedirs(folder, exist_ok=True)
        if clips:
            Path(folder_paths.get_input_directory(), "clip.mp4").write_bytes(clips["made.mp4"])
        _calls(_tiny_model())  # imports the nodes once, before the cases fork
        found |= {kind: case for kind, case in on_host.items() if kind in names}
    return found


def _tiny_model() -> Any:
    from unets import UNETS, build_model

    return build_model(UNETS["tiny"])


# --- videos ----------------------------------------------------------------------------------------


def _clips(scratch: Path, shared: Path) -> dict[str, bytes]:
    """Whole clips, by name: real ones, and short ones in every container and codec that is likely to come."""
    frames = torch.rand(12, 48, 64, 3, generator=torch.Generator().manual_seed(0))
    sound = {"waveform": torch.rand(1, 2, 8000) - 0.5, "sample_rate": 8000}
    path = scratch / "made.mp4"
    for extension in FORMATS:
        save_clip(frames, 12.0, path.with_suffix(f".{extension}"), 50, sound, {"workflow": {"x": 1}})
    again = {
        "made.avi": ["-c:v", "mpeg4"],
        "made.mov": ["-c:v", "prores"],
        "made.ts": ["-c:v", "mpeg2video", "-r", "25"],
        "made.flv": ["-c:v", "flv"],
        "made.mkv": ["-c:v", "libx264", "-g", "5"],
        "open.mp4": ["-c:v", "libx264", "-pix_fmt", "yuv420p10le", "-g", "4"],
    }
    for name, options in again.items():
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-an", *options, scratch / name]
        if subprocess.run(command).returncode:  # a build without that encoder
            (scratch / name).unlink(missing_ok=True)
    files = [each for each in scratch.iterdir() if each.is_file()]
    files += sorted(shared.glob("*.mp4"))
    return {each.name: each.read_bytes() for each in files}


def video_case(rng: Random, clips: dict[str, bytes], scratch: Path) -> None:
    """A spoilt clip, read with any settings."""
    name, other = rng.choice(sorted(clips)), rng.choice(sorted(clips))
    spoil = rng.random()
    if spoil < 0.25 and name.endswith((".mp4", ".mov")):
        data = mutate.spoil_mp4_sizes(rng, clips[name])
    else:
        data = mutate.spoil_bytes(rng, clips[name], clips[other])
    path = scratch / f"case-{os.getpid()}{Path(name).suffix}"
    path.write_bytes(data)
    try:
        clip = load_clip(
            path,
            start=rng.choice((0.0, 0.0, 0.3, 3.0)),
            start_unit=rng.choice(START_UNITS),
            frame_count=rng.choice((0, 1, 4, 24)),
            frame_step=rng.choice((1, 1, 3)),
            width=64,
            height=64,
            resize=rng.choice(RESIZE_MODES),
        )
    finally:
        path.unlink()
    assert clip.images.ndim == 4 and clip.images.isfinite().all() and 0 < clip.fps < float("inf")


# --- motions ---------------------------------------------------------------------------------------


def motion_case(rng: Random, model: Any, scratch: Path) -> None:
    """Load a damaged motion file and put it on a model."""
    from tune_a_video.tav_core import host
    from tune_a_video.tav_core.inflate import Inflation

    with torch.inference_mode():
        motion = _motion(model)
        metadata = {"base_family": host.family(model), "prompt": "a", SEED_KEY: "0"}
        if rng.random() < 0.3:
            motion = compress(Motion(motion.tensors, metadata), rng.choice((1, 4, 64)))
            metadata = dict(motion.metadata)
        version = "2" if "rank" in metadata else "1"
        metadata = {"format": FORMAT, "format_version": version, **metadata}
        data = safetensors.torch.save(dict(motion.tensors), metadata)
        if rng.random() < 0.5:
            data = mutate.spoil_safetensors(rng, data)
        else:
            data = mutate.spoil_bytes(rng, data, data)
        path = scratch / f"case-{os.getpid()}.safetensors"
        path.write_bytes(data)
        try:
            motion = expand(load_motion(path))
        finally:
            path.unlink()
        inflated = host.inflate_model(model, Inflation(), motion)
        # The engine from PyPI has no place to keep it.
        assert host.carried_motion(inflated) is not None or not hasattr(inflated, "set_attachments")


def _motion(model: Any) -> Motion:
    from tune_a_video.tav_core import host

    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for path, shape in host.query_shapes(model).items():
        inner, channels = shape
        block, _, name = path.removesuffix(".to_q.weight").rpartition(".")
        tensors[f"{block}.{name}.to_q.diff"] = torch.randn(shape, generator=generator).half()
        for leaf in ("to_q", "to_k", "to_v"):
            tensors[f"{block}.attn_temp.{leaf}.weight"] = torch.randn(shape[:1] + (inner,), generator=generator).half()
        tensors[f"{block}.attn_temp.to_out.0.weight"] = torch.zeros(inner, inner).half()
        for leaf in ("attn_temp.to_out.0.bias", "norm_temp.weight", "norm_temp.bias"):
            tensors[f"{block}.{leaf}"] = torch.zeros(inner).half()
    return Motion(tensors)


# --- nodes -----------------------------------------------------------------------------------------


def _latent() -> dict[str, Any]:
    return {"samples": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))}


def _conditioning() -> list[Any]:
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]


def _calls(model: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return, by name, node classes and their linked inputs."""
    from tune_a_video.nodes import inflate, invert, load_video, sample, save_video, tune

    frames = {"images": torch.rand(2, 16, 16, 3)}
    latent, conditioning = {"latent": _latent()}, {"conditioning": _conditioning()}
    prompts = {"positive": _conditioning(), "negative": _conditioning()}
    return {
        "load": (load_video.LoadVideo, {}),
        "save": (save_video.SaveVideo, frames),
        "inflate": (inflate.InflateUNet, {"model": model}),
        "tune": (tune.OneShotTune, {"model": model, **latent, **conditioning}),
        "invert": (invert.DDIMInvert, {"model": model, **latent, **conditioning}),
        "sample": (sample.TAVSample, {"model": model, **prompts, **latent}),
    }


# Quick values for inputs whose defaults are slow.
_QUICK = {"steps": 2, "frame_count": 4, "width": 64, "height": 64, "file": "clip.mp4"}


def _widgets(node: Any) -> dict[str, Any]:
    """Return a node's widget values, quick ones if there are any."""
    widgets = {each.id: each for each in node.define_schema().inputs if hasattr(each, "default")}
    return {
        name: _QUICK.get(
            name, each.default if each.default is not None else (getattr(each, "options", None) or [""])[0]
        )
        for name, each in widgets.items()
        if hasattr(each, "options") or isinstance(each.default, (int, float, str))
    }


def _execute(node: Any, given: dict[str, Any]) -> None:
    from types import SimpleNamespace

    node.hidden = SimpleNamespace(prompt=None, unique_id="1", extra_pnginfo=None)
    with torch.inference_mode():
        node.execute(**given)


def inputs_case(rng: Random) -> None:
    """Give a node values past its widgets' limits, as a link can."""
    node, connected = rng.choice(list(_calls(_tiny_model()).values()))
    given = _widgets(node)
    options = {each.id: each.options for each in node.define_schema().inputs if getattr(each, "options", None)}
    for name in rng.sample(sorted(given), min(len(given), rng.randint(1, 2))):
        usual = given[name]
        if name in options:
            given[name] = mutate.odd_choice(rng, options[name])
        elif isinstance(usual, str):
            given[name] = rng.choice(mutate.TEXTS)
        else:
            given[name] = mutate.odd_number(rng, usual)
    _execute(node, {**given, **connected})


def tensors_case(rng: Random) -> None:
    """Give a node's sockets tensors of other shapes, types and values."""
    node, connected = rng.choice([call for call in _calls(_tiny_model()).values() if len(call[1]) > 0])
    names = [name for name in connected if name != "model"]
    if not names:
        _execute(node, {**_widgets(node), **connected})
        return
    name = rng.choice(names)
    value = connected[name]
    if isinstance(value, dict):
        connected[name] = {**value, "samples": _odd_tensor(rng, value["samples"])}
        if rng.random() < 0.3:
            connected[name] = {**value, "noise_mask": _odd_tensor(rng, torch.rand(2, 8, 8))}
    elif isinstance(value, list):
        embedding = _odd_tensor(rng, value[0][0])
        connected[name] = rng.choice(([], [[embedding, {}]], [[embedding, {}]] * 2, [[embedding, {"x": None}]]))
    else:
        connected[name] = _odd_tensor(rng, value)
    _execute(node, {**_widgets(node), **connected})


def _odd_tensor(rng: Random, usual: Tensor) -> Tensor:
    match rng.randrange(8):
        case 0:
            return usual[:0]
        case 1:
            return usual[0]
        case 2:
            return usual[None]
        case 3:
            return usual * rng.choice((float("nan"), float("inf"), 1e30, -1e5, 0.0))
        case 4:
            return usual.to(rng.choice((torch.float16, torch.bfloat16, torch.float64)))
        case 5:
            return usual[..., : rng.randint(0, 3)]
        case 6:
            return usual.repeat(rng.randint(1, 3), *[1] * (usual.ndim - 1))
        case _:
            return usual.transpose(-1, rng.randrange(usual.ndim))


def paths_case(rng: Random, scratch: Path) -> None:
    """Give nodes names and prefixes of all kinds. Nothing may be written outside the host's folders."""
    import folder_paths
    from tune_a_video.nodes import load_motion, load_video, save_motion, save_video

    outside = scratch / "outside"
    outside.mkdir(exist_ok=True)
    text = "".join(rng.choice(("", "../", "a/", "/", "//", "./", "~/")) for _ in range(3)) + rng.choice(mutate.TEXTS)
    before = _files(scratch)
    node = rng.choice((load_video.LoadVideo, save_video.SaveVideo, load_motion.LoadMotion, save_motion.SaveMotion))
    given: dict[str, Any] = {**_widgets(node), "file": text}
    if node in (save_video.SaveVideo, save_motion.SaveMotion):
        del given["file"]
        given["filename_prefix"] = text
    if node is save_video.SaveVideo:
        given["images"] = torch.rand(2, 16, 16, 3)
    if node is save_motion.SaveMotion:
        given["motion"] = Motion({"x": torch.zeros(1)})
    try:
        _execute(node, given)
    finally:
        allowed = [folder_paths.get_output_directory(), os.path.join(folder_paths.models_dir, "tav")]
        allowed.append(folder_paths.get_temp_directory())
        # Other cases run at the same time, with files of their own.
        new = {path for path in _files(scratch) - before if not Path(path).name.startswith("case-")}
        stray = [path for path in new if not path.startswith(tuple(allowed)) and not path.endswith(".log")]
        assert not stray, stray


def _files(folder: Path) -> set[str]:
    return {os.path.realpath(path) for path in folder.rglob("*") if path.is_file()}
