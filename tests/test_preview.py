"""Previews in a node: moving pictures, the loss curve with the clip below it, and the stop request."""

from __future__ import annotations

import functools
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from tune_a_video.tav_core.media import pictures
from tune_a_video.tav_core.tuning.trainer import Trainer, TuneStep
from unets import UNETS, build_model

pytestmark = pytest.mark.comfyui


class Registry:
    """Replaces the host's progress registry: records what the preview thread sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int, int, Any]] = []
        self.enough = threading.Event()

    def update_progress(self, node: str, value: int, total: int, image: Any) -> None:
        assert threading.current_thread().name == "tune-a-video-preview"
        self.sent.append((node, value, total, image[1]))
        if len(self.sent) >= 5:
            self.enough.set()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Record what the progress bar and the preview thread send within node 7."""
    import comfy.utils
    import tune_a_video.nodes.support.preview as preview

    registry, bar = Registry(), []
    monkeypatch.setattr(preview, "get_progress_state", lambda: registry)
    monkeypatch.setattr(preview, "get_executing_context", lambda: SimpleNamespace(node_id="7"))
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, image, **_: bar.append((value, total, image))
    )
    return SimpleNamespace(bar=bar, registry=registry, module=preview)


def frames(count: int) -> list[Any]:
    return [("JPEG", Image.new("L", (4, 4), index), 512) for index in range(count)]


def colour(picture: Image.Image) -> Any:
    return picture.getpixel((0, 0))


def test_pictures_take_turns_until_the_node_is_done(shown: Any) -> None:
    with shown.module.MovingPreview(10, 100.0) as preview:
        preview.show(1, frames(3))
        assert shown.registry.enough.wait(10)
        preview.update(10)
    sent = [colour(picture) for *_, picture in shown.registry.sent]
    assert all(later == (earlier + 1) % 3 for earlier, later in zip(sent, sent[1:], strict=False))
    values = [value for _, value, *_ in shown.registry.sent]
    assert values == sorted(values) and {node for node, *_ in shown.registry.sent} == {"7"}
    assert shown.bar[0][0] == 1 and shown.bar[0][2] is not None and shown.bar[-1] == (10, 10, None)
    assert not [thread for thread in threading.enumerate() if thread.name == "tune-a-video-preview"]


def test_a_cancelled_node_leaves_no_thread(shown: Any) -> None:
    with pytest.raises(InterruptedError), shown.module.MovingPreview(10, 100.0) as preview:
        preview.show(1, frames(2))
        raise InterruptedError
    assert not [thread for thread in threading.enumerate() if thread.name == "tune-a-video-preview"]


@pytest.mark.parametrize("count", [0, 1])
def test_what_does_not_move_needs_no_thread(shown: Any, count: int) -> None:
    with shown.module.MovingPreview(10, 1000.0) as preview:
        preview.show(3, frames(count))
        assert not [thread for thread in threading.enumerate() if thread.name == "tune-a-video-preview"]
    assert len(shown.bar) == 1 and (shown.bar[0][2] is not None) == (count == 1)


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets the host's preview method."""
    from comfy.cli_args import LatentPreviewMethod, args

    def choose(name: str) -> None:
        monkeypatch.setattr(args, "preview_method", LatentPreviewMethod(name))

    return choose


def test_every_frame_is_shown_in_its_order(method: Any, shown: Any) -> None:
    method("latent2rgb")
    model = build_model(UNETS["tiny"])
    clip = torch.linspace(-2, 2, 5).view(5, 1, 1, 1).expand(5, 4, 8, 8)
    preview = shown.module.LatentFrames(model)
    light = [sum(colour(picture)) for _, picture, _ in preview.all(clip)]
    assert len(set(light)) == 5 and light in (sorted(light), sorted(light, reverse=True))
    # At least one frame is decoded at each step, and all of them in the end.
    counts = [len(preview.refreshed(clip)) for _ in range(5)]
    assert counts[0] >= 1 and counts == sorted(counts) and counts[-1] == 5
    assert [sum(colour(picture)) for _, picture, _ in preview.refreshed(clip)] == light


def test_nothing_is_shown_to_those_who_want_no_previews(method: Any, shown: Any) -> None:
    method("none")
    model = build_model(UNETS["tiny"])
    with shown.module.MovingPreview(2) as preview:
        shown.module.sampling_callback(model, preview)(0, torch.zeros(3, 4, 8, 8), torch.zeros(3, 4, 8, 8), 2)
    assert shown.bar == [(1, 2, None)]
    # A reconstruction is shown even then, because the user asked for its steps.
    assert len(shown.module.LatentFrames(model, anyway=True).all(torch.zeros(3, 4, 8, 8))) == 3


def test_the_clip_and_its_reconstruction_lie_below_the_curve() -> None:
    curve = pictures.loss_curve([1.0, 0.5])
    alone = pictures.curve_with_frames(curve, [])
    assert alone.size == (curve.shape[2], curve.shape[1])
    pair = pictures.curve_with_frames(
        curve, [("clip", Image.new("RGB", (8, 8), "red")), ("now", Image.new("RGB", (8, 4), "blue"))]
    )
    assert pair.width == alone.width and pair.height > alone.height
    assert pair.crop((0, 0, *alone.size)).tobytes() == alone.tobytes()
    colours = {pixel for _, pixel in pair.getcolors(1_000_000)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours


class Context:
    """Runs One-Shot Tune in inference mode, as the server does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import tune_a_video.nodes.tune as tune

        self.module = tune
        hidden = SimpleNamespace(prompt={}, unique_id="4:3", extra_pnginfo=None)
        monkeypatch.setattr(tune.OneShotTune, "hidden", hidden)

    def tune(self, seed: int, **options: Any) -> tuple[Any, Any, Tensor]:
        generator = torch.Generator().manual_seed(0)
        clip = {"samples": torch.randn(2, 4, 8, 8, generator=generator)}
        prompt = [[torch.randn(1, 7, 32, generator=generator), {}]]
        fixed = {"train_scope": "all", "precision": "auto", "warmup_steps": 0, "gradient_clip": 1.0}
        arguments = {"steps": 12, "learning_rate": 1e-3, "seed": seed, **fixed, **options}
        with torch.inference_mode():
            return self.module.OneShotTune.execute(build_model(UNETS["tiny"]), clip, prompt, **arguments).result


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Context:
    return Context(monkeypatch)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record the lines that are shown, as if node 7 ran on a server."""
    import tune_a_video.nodes.support.said as said

    lines: list[tuple[str, str]] = []
    instance = SimpleNamespace(send_progress_text=lambda text, node: lines.append((text, node)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    monkeypatch.setattr(said, "get_executing_context", lambda: SimpleNamespace(node_id="7"))
    return lines


def test_a_tuning_says_what_it_takes_before_its_first_step(
    node: Context, server: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    train_step = Trainer.train_step

    def counted(trainer: Trainer, *drawn: Any) -> TuneStep:
        done.append(len(server))
        return train_step(trainer, *drawn)

    monkeypatch.setattr(Trainer, "train_step", counted)
    node.tune(seed=77)
    ((text, where),) = server
    assert where == "7" and text.startswith("12 steps, ") and "GiB planned" in text
    assert done[0] == 1
    # The second run finds its result on disk and has nothing to announce.
    node.tune(seed=77)
    assert len(server) == 1


def test_a_tuning_warns_of_a_small_clip_in_the_node(
    node: Context, server: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_a_video.tav_core.host.inputs.family", lambda model: "SD1")
    node.tune(seed=78, steps=1)
    ((text, _),) = server
    assert text.startswith("the clip is 64 x 64, and SD1 was trained at 512 x 512") and "\n1 steps, " in text


def test_control_says_what_it_adds_after_the_first_step(method: Any, shown: Any, server: list[tuple[str, str]]) -> None:
    method("none")
    with shown.module.MovingPreview(2) as preview:
        callback = shown.module.sampling_callback(build_model(UNETS["tiny"]), preview, lambda: "it keeps 5 MB")
        for step in range(2):
            callback(step, torch.zeros(3, 4, 8, 8), torch.zeros(3, 4, 8, 8), 2)
    assert server == [("it keeps 5 MB", "7")]


def test_the_node_shows_the_clip_as_it_is_reconstructed(
    node: Context, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node.module, "_PREVIEW_SECONDS", 0.0)
    node.tune(31, preview_every=6)
    heights = [picture[1].height for _, _, picture in shown.bar if picture is not None]
    # The curve after 5 steps, then with the frames of step 6.
    assert len(heights) == 2 and heights[0] < heights[1]


def test_a_tuning_is_stopped_by_its_nodes_number(node: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    from tune_a_video.nodes.support import stop

    asked: list[Any] = []

    class Stopping(Trainer):
        def update(self, loss: Tensor) -> TuneStep:
            step = super().update(loss)
            if step.number == 3:
                asked.extend([stop.request_stop("5"), stop.request_stop("4"), stop.request_stop("3")])
            return step

    monkeypatch.setattr(node.module, "Trainer", Stopping)
    _, motion, curve = node.tune(33)
    # Node 3 of the subgraph that is node 4 of the graph: "4" asks what runs in it, "3" is another node.
    assert asked == [[], ["4:3"], []]
    assert motion.metadata["steps"] == "3" and curve.isfinite().all()
    assert stop.request_stop(None) == []


def test_a_previewer_that_shows_frames_by_itself_gets_all_of_them(shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As VideoHelperSuite's animated previews, which return no picture."""
    given: list[int] = []

    class Animation:
        def decode_latent_to_preview_image(self, preview_format: str, x0: Tensor) -> None:
            given.append(len(x0))

    monkeypatch.setattr(shown.module.latent_preview, "get_previewer", lambda *args: Animation())
    model, x0 = build_model(UNETS["tiny"]), torch.zeros(3, 4, 8, 8)
    sampled = shown.module.LatentFrames(model)
    assert [sampled.refreshed(x0), sampled.refreshed(x0)] == [[], []]
    # From the first call on: the animation is announced with as many frames as that call has.
    assert given == [3, 3]
    assert len(shown.module.LatentFrames(model, anyway=True).all(x0)) == 3


def test_a_reconstruction_is_decoded_by_the_hosts_own_previewer(
    method: Any, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack that shows frames by itself is not asked: its animation would take the place of the loss curve."""
    given: list[int] = []

    class Animation:
        def decode_latent_to_preview_image(self, preview_format: str, x0: Tensor) -> None:
            given.append(len(x0))

    hosts_own = shown.module.latent_preview.get_previewer
    around = functools.update_wrapper(lambda *args: Animation(), hosts_own)
    monkeypatch.setattr(shown.module.latent_preview, "get_previewer", around)
    method("latent2rgb")
    model, x0 = build_model(UNETS["tiny"]), torch.zeros(3, 4, 8, 8)
    assert len(shown.module.LatentFrames(model, anyway=True).all(x0)) == 3
    assert given == []
