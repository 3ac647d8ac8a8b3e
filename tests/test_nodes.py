"""The nodes on small models, with ComfyUI's modules but without its server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from tune_a_video.tav_core import host
from tune_a_video.tav_core.media import pictures
from tune_a_video.tav_core.motion.file import Motion
from tune_a_video.tav_core.motion.low_rank import expand
from unets import UNETS, build_model

pytestmark = pytest.mark.comfyui

PROMPT = {
    "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a man is skiing", "clip": ["9", 1]}},
    "2": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["1", 0]}},
    "3": {"class_type": "TAV_OneShotTune", "inputs": {"conditioning": ["2", 0], "steps": 2}},
    "4": {"class_type": "Loop", "inputs": {"conditioning": ["4", 0], "other": 3}},
}


@pytest.fixture(autouse=True)
def on_the_server() -> Any:
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Any:
    import tune_a_video.nodes.tune as tune
    from tune_a_video.nodes import inflate, invert, load_motion, sample, save_motion

    hidden = SimpleNamespace(prompt=PROMPT, unique_id="3", extra_pnginfo=None)
    monkeypatch.setattr(tune.OneShotTune, "hidden", hidden)
    return SimpleNamespace(
        tune=tune.OneShotTune,
        inflate=inflate.InflateUNet,
        invert=invert.DDIMInvert,
        sample=sample.TAVSample,
        save=save_motion.SaveMotion,
        load=load_motion.LoadMotion,
    )


def clip(frames: int = 3, seed: int = 0) -> dict[str, Any]:
    return {"samples": torch.randn(frames, 4, 8, 8, generator=torch.Generator().manual_seed(seed))}


def conditioning(model: Any, seed: int = 1) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, 7, host.context_width(model), generator=generator), {}]]


def tuned(nodes: Any, model: Any, **options: Any) -> tuple[Any, Motion, Tensor]:
    arguments = {
        "steps": 2,
        "learning_rate": 1e-3,
        "seed": 0,
        "train_scope": "all",
        "precision": "auto",
        "warmup_steps": 0,
        "gradient_clip": 1.0,
        "latent": clip(),
        "conditioning": conditioning(model),
        **options,
    }
    return nodes.tune.execute(model=model, **arguments).result


def sampled(nodes: Any, model: Any, latent: dict[str, Any], **options: Any) -> dict[str, Any]:
    arguments = {"steps": 3, "guidance": 3.0, "eta": 0.0, "seed": 0, **options}
    positive, negative = conditioning(model, 5), conditioning(model, 6)
    return nodes.sample.execute(model, positive, negative, latent, **arguments).result[0]


def test_every_input_and_output_has_a_tooltip() -> None:
    from tune_a_video.nodes import TuneAVideoExtension

    listed = asyncio.run(TuneAVideoExtension().get_node_list())
    ids = {}
    for node in listed:
        schema = node.define_schema()
        ids[schema.node_id] = node.__name__
        assert schema.category.split("/")[0] == "Tune-A-Video" and schema.description
        for socket in (*schema.inputs, *schema.outputs):
            assert socket.tooltip, f"{schema.node_id}: {getattr(socket, 'id', socket)}"
    # Saved workflows depend on these ids.
    assert ids == {
        "TAV_LoadVideo": "LoadVideo",
        "TAV_InflateUNet": "InflateUNet",
        "TAV_OneShotTune": "OneShotTune",
        "TAV_DDIMInvert": "DDIMInvert",
        "TAV_Sample": "TAVSample",
        "TAV_SaveVideo": "SaveVideo",
        "TAV_SaveMotion": "SaveMotion",
        "TAV_LoadMotion": "LoadMotion",
        "TAV_EvaluateVideo": "EvaluateVideo",
        "TAV_CompareVideos": "CompareVideos",
        "TAV_LoadDemoModel": "LoadDemoModel",
        "TAV_EditPrompt": "EditPrompt",
        "TAV_EditControl": "EditControl",
        "TAV_EditGuider": "EditGuider",
        "TAV_ShowMask": "ShowMask",
    }


def test_defaults_are_the_released_settings(nodes: Any) -> None:
    def defaults(node: Any) -> dict[str, Any]:
        return {i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None}

    expected = {"steps": 500, "learning_rate": 3e-5, "train_scope": "all", "warmup_steps": 0, "gradient_clip": 1.0}
    assert expected.items() <= defaults(nodes.tune).items()
    assert defaults(nodes.invert)["steps"] == 50
    assert {"steps": 50, "guidance": 12.5, "eta": 0.0}.items() <= defaults(nodes.sample).items()


def test_tuning_gives_a_model_that_is_what_its_motion_gives(nodes: Any) -> None:
    model = build_model(UNETS["tiny"])
    out, motion, curve = tuned(nodes, model)
    again = nodes.inflate.execute(model, "sparse-causal", "over frames", 1.0, 1.0, motion).result[0]
    inverted = nodes.invert.execute(out, clip(seed=3), conditioning(model), 3).result[0]
    assert torch.equal(sampled(nodes, out, inverted)["samples"], sampled(nodes, again, inverted)["samples"])
    assert all(value.dtype == torch.float16 for value in motion.tensors.values())
    assert curve.ndim == 4 and curve.shape[-1] == 3 and 0 <= float(curve.min()) < float(curve.max()) <= 1


def test_a_cancelled_tuning_goes_on_when_it_is_queued_again(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.utils
    import folder_paths

    model = build_model(UNETS["tiny"])
    reported: list[int] = []

    class Bar:
        def __init__(self, total: int) -> None:
            reported.clear()

        def update_absolute(self, value: int, total: int) -> None:
            reported.append(value)
            if cancel and value == 2:
                raise InterruptedError

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    cancel = True
    with pytest.raises(InterruptedError):
        tuned(nodes, model, steps=4, seed=77)
    cancel = False
    _, motion, _ = tuned(nodes, model, steps=4, seed=77)
    assert reported == [3, 4]
    for path in Path(folder_paths.get_output_directory(), ".tune-a-video").iterdir():
        path.unlink()
    _, undisturbed, _ = tuned(nodes, model, steps=4, seed=77)
    assert reported == [1, 2, 3, 4]
    assert all(torch.equal(value, undisturbed.tensors[key]) for key, value in motion.tensors.items())


def test_a_motion_tells_how_it_came_about(nodes: Any) -> None:
    _, motion, _ = tuned(nodes, build_model(UNETS["tiny-v"], prediction="v"), train_scope="middle and up")
    expected = {
        "base_family": "a model of text width 32",
        "prediction_type": "v",
        "prompt": "a man is skiing",
        "frame_count": "3",
        "width": "64",
        "height": "64",
        "steps": "2",
        "seed": "0",
    }
    assert expected.items() <= motion.metadata.items()
    options = json.loads(motion.metadata["options"])
    assert options["train_scope"] == "middle and up" and options["attention"] == "sparse-causal"
    assert "frames_per_step" not in options


def test_tuning_on_windows_is_noted_in_the_motion_and_refused_before_work_where_it_shows_one_frame(nodes: Any) -> None:
    model = build_model(UNETS["tiny"])
    _, motion, _ = tuned(nodes, model, frames_per_step=2, preview_every=1)
    assert motion.metadata["frame_count"] == "3" and json.loads(motion.metadata["options"])["frames_per_step"] == 2
    _, motion, _ = tuned(nodes, model, frames_per_step=3)
    assert "frames_per_step" not in json.loads(motion.metadata["options"])
    with pytest.raises(ValueError, match="frames_per_step: with 1 a step would see the first frame alone"):
        tuned(nodes, model, frames_per_step=1)


def test_the_prompt_is_looked_for_upstream() -> None:
    from tune_a_video.nodes.support.graph import find_prompt_text

    assert find_prompt_text(PROMPT, "3", "conditioning") == "a man is skiing"
    assert find_prompt_text(PROMPT, "4", "conditioning") == ""
    assert find_prompt_text(None, None, "conditioning") == ""


def test_tuning_keeps_the_inflation_it_is_given(nodes: Any) -> None:
    model = build_model(UNETS["tiny"])
    inflated = nodes.inflate.execute(model, "first frame only", "per frame", 1.0, 1.0).result[0]
    out, motion, _ = tuned(nodes, inflated)
    kept = host.inflation_of(out)
    assert kept is not None and kept.inflation.attention == "first frame only" and not kept.inflation.pool_group_norm
    assert json.loads(motion.metadata["options"])["group_norm"] == "per frame"


def test_tuning_goes_on_from_the_motion_a_model_carries(nodes: Any) -> None:
    model = build_model(UNETS["tiny"])
    out, motion, _ = tuned(nodes, model)
    from_model, from_motion = tuned(nodes, out)[1], tuned(nodes, model, motion=motion)[1]
    assert all(torch.equal(value, from_motion.tensors[key]) for key, value in from_model.tensors.items())
    assert any(not torch.equal(value, motion.tensors[key]) for key, value in from_model.tensors.items())


def test_a_masked_edit_changes_the_masked_part_alone(nodes: Any) -> None:
    model = build_model(UNETS["tiny"])
    out, _, _ = tuned(nodes, model)
    mask = torch.zeros(3, 8, 8)
    mask[:, :, 4:] = 1.0
    source = clip()
    inverted = nodes.invert.execute(out, {**source, "noise_mask": mask}, conditioning(model), 3).result[0]
    edited = sampled(nodes, out, inverted)["samples"]
    assert torch.equal(edited[..., :4], source["samples"][..., :4])
    assert float((edited[..., 4:] - source["samples"][..., 4:]).abs().mean()) > 0.1
    with pytest.raises(ValueError, match="^latent: it has a noise mask, but not the clip"):
        sampled(nodes, out, {"samples": inverted["samples"], "noise_mask": mask})


def test_motions_are_saved_and_loaded_by_name(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths

    _, motion, _ = tuned(nodes, build_model(UNETS["tiny"]))
    first, second = (nodes.save.execute(motion, "clips/ski").result[0] for _ in range(2))
    assert first != second
    names = {f"clips/ski_0000{i}_.safetensors" for i in (1, 2)}
    assert names <= set(folder_paths.get_filename_list("tav"))
    read = nodes.load.execute("clips/ski_00001_.safetensors").result[0]
    assert read.metadata == motion.metadata
    assert all(torch.equal(value, motion.tensors[key]) for key, value in read.tensors.items())
    before = nodes.load.fingerprint_inputs("clips/ski_00001_.safetensors")
    assert before != nodes.load.fingerprint_inputs("clips/ski_00002_.safetensors")
    assert nodes.load.fingerprint_inputs("absent.safetensors") == ""
    with pytest.raises(ValueError, match="^file: absent.safetensors is not in the models folder"):
        nodes.load.execute("absent.safetensors")

    def gone(*_: Any, **__: Any) -> None:
        raise PermissionError

    # An error here would load the file again on every run.
    monkeypatch.setattr(Path, "stat", gone)
    assert nodes.load.fingerprint_inputs("clips/ski_00001_.safetensors") == ""


def test_a_motion_of_low_rank_is_saved_as_it_is_and_gives_the_same_edit(nodes: Any) -> None:
    model = build_model(UNETS["tiny"])
    out, motion, _ = tuned(nodes, model, learning_rate=1e-2, rank=4)
    saved = nodes.save.execute(motion, "thin")
    assert saved.ui == {"text": [saved.result[0]]} and "rank" in motion.metadata
    read = nodes.load.execute(Path(saved.result[0]).name).result[0]
    assert read.metadata == motion.metadata and read.tensors.keys() == motion.tensors.keys()
    inflated = nodes.inflate.execute(model, "sparse-causal", "over frames", 1.0, 1.0, read).result[0]
    ours, theirs = (
        sampled(nodes, each, nodes.invert.execute(each, clip(), conditioning(model), 3).result[0])["samples"]
        for each in (out, inflated)
    )
    assert torch.equal(ours, theirs)
    # From the file, from the model, and as a whole motion it goes on.
    from_file, from_model = tuned(nodes, model, motion=read, rank=4)[1], tuned(nodes, inflated, rank=4)[1]
    assert all(torch.equal(value, from_model.tensors[key]) for key, value in from_file.tensors.items())
    assert "rank" not in tuned(nodes, inflated)[1].metadata
    with pytest.raises(ValueError, match="^rank: a run of rank 8 cannot go on from a motion of rank 4"):
        tuned(nodes, inflated, rank=8)


@pytest.mark.parametrize("prefix", ["../motion", "/motion"])
def test_a_motion_is_not_saved_outside_its_folder(nodes: Any, prefix: str) -> None:
    with pytest.raises(Exception, match="[Ss]av"):
        nodes.save.execute(Motion({"x": torch.zeros(1)}), prefix)


@pytest.mark.parametrize(
    ("node", "given", "message"),
    [
        ("tune", {"steps": 0}, "^steps: 0 is outside 1 to 100000"),
        ("tune", {"seed": 2**64}, "^seed: .* is outside 0 to"),
        ("tune", {"learning_rate": float("nan")}, "^learning_rate: nan is outside"),
        ("tune", {"precision": "fp8"}, "^precision: 'fp8' is not one of auto, fp32, bf16, fp16"),
        ("sample", {"steps": -1}, "^steps: -1 is outside 1 to 1000"),
        ("sample", {"guidance": float("inf")}, "^guidance: inf is outside"),
    ],
)
def test_a_link_brings_no_more_than_a_widget(nodes: Any, node: str, given: dict[str, Any], message: str) -> None:
    model = build_model(UNETS["tiny"])
    with pytest.raises(ValueError, match=message):
        tuned(nodes, model, **given) if node == "tune" else sampled(nodes, model, clip(), **given)


def test_a_conditioning_of_another_shape_is_refused(nodes: Any) -> None:
    model = build_model(UNETS["tiny"])
    embedding = conditioning(model)[0][0]
    shape, value = "a text embedding of shape", "its text embedding holds NaN or infinity. Encode the prompt again"
    odd_ones = ((embedding[0], shape), (embedding[None], shape), (embedding[:, :0], shape), (embedding / 0, value))
    for odd, reason in odd_ones:
        with pytest.raises(ValueError, match=f"^conditioning: {reason}"):
            tuned(nodes, model, conditioning=[[odd, {}]])


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("a\0b", "cannot hold NUL"),
        ("x" * 300, "longer than 200 bytes"),
        ("스" * 80, "longer than 200 bytes"),
        ("a/" * 500 + "b", "longer than 200 bytes"),
        ("CON/clip", "not a name that every system takes"),
        ("\ud800", "not a name that every system takes"),
        ("../clip", "leaves the folder"),
        ("a/../../clip", "leaves the folder"),
        ("/clip", "leaves the folder"),
        ("linked/clip", "leaves the folder"),
    ],
)
def test_names_to_save_under(tmp_path: Path, prefix: str, message: str) -> None:
    from tune_a_video.nodes.support.paths import next_name

    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "linked").symlink_to(outside)
    with pytest.raises(ValueError, match=f"^filename_prefix: .*{message}.*\\. (Give a name such as|Type it again)"):
        next_name(prefix, str(root), "ski")
    assert not list(outside.iterdir()) and [path.name for path in tmp_path.rglob("*")].count("linked") == 1
    assert next_name("사람/ski", str(root), "ski") == (str(root / "사람"), "ski_00001_", "사람")


@pytest.mark.parametrize("losses", [[1.0], [0.5, 0.25], [1.0] * 500, [1 / (i + 1) for i in range(500)]])
def test_loss_curves_of_any_length(losses: list[float]) -> None:
    image = pictures.loss_curve(losses)
    assert image.shape[0] == 1 and image.isfinite().all() and float(image.std()) > 0.01


def test_several_prompts_cannot_be_tuned_on(nodes: Any) -> None:
    model = build_model(UNETS["tiny"])
    with pytest.raises(ValueError, match="^conditioning: it holds 2 prompts"):
        tuned(nodes, model, conditioning=conditioning(model) + conditioning(model, 2))


def test_a_motion_saved_at_a_rank_comes_back_nearly_whole(nodes: Any) -> None:
    model = build_model(UNETS["tiny"])
    tuned_model, motion, _ = tuned(nodes, model, steps=4, learning_rate=1e-3)
    whole = nodes.load.execute(relative(nodes.save.execute(motion, "whole").args[0])).args[0]
    assert all(torch.equal(whole.tensors[key], value) for key, value in motion.tensors.items())
    small = nodes.load.execute(relative(nodes.save.execute(motion, "small", 32).args[0])).args[0]
    assert expand(small).tensors.keys() == motion.tensors.keys()
    # The tiny model's matrices are 32 to 64 wide, so rank 32 keeps most of any change.
    assert float(small.metadata["kept"]) > 0.7
    assert "kept" not in motion.metadata and small.metadata["rank"] == "32"


def relative(path: str) -> str:
    import folder_paths

    return str(Path(path).relative_to(folder_paths.get_folder_paths("tav")[0]))


def test_the_loss_curve_is_shown_while_it_is_tuned(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.utils
    import tune_a_video.nodes.tune as tune

    shown: list[tuple[int, int, Any]] = []
    monkeypatch.setattr(tune, "_PREVIEW_SECONDS", 0.0)
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: shown.append((value, total, preview))
    )
    tuned(nodes, build_model(UNETS["tiny"]), steps=12, seed=12)
    steps = [value for value, _, preview in shown if preview is None]
    # Newer hosts leave out updates in quick succession, but never the first and the last.
    assert steps == sorted(set(steps)) and (steps[0], steps[-1]) == (1, 12)
    pictured = [(value, preview) for value, _, preview in shown if preview is not None]
    assert [value for value, _ in pictured] == [5, 10]
    kind, picture, _ = pictured[-1][1]
    assert kind == "JPEG" and np.asarray(picture).std() > 5
