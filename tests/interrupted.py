"""Kill or cancel tuning runs at random moments, and compare their weights with an undisturbed run's.

`python tests/interrupted.py --kills 200 --cancels 200 --seed 0` prints a line for each kind. Exit status 0 = every run
ended with the weights of an undisturbed one, and no partial file was ever visible. Runs a tiny UNet on the CPU in
float32. Needs os.fork: Linux or macOS.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# A forked process cannot use an accelerator that its parent has initialised.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tools"), str(HERE / "helpers")]

import engine  # noqa: E402

STEPS = 12
# A run is killed within this many seconds; somewhat longer than a whole run takes.
LONGEST = 1.5


def tune(folder: Path | None, cancel_after: int = 0, pace: float = 0.0) -> Any:
    """Tune a tiny model, with a checkpoint every step if a folder is given."""
    import torch
    from tune_a_video.tav_core import host
    from tune_a_video.tav_core.tuning.trainer import TuneSettings
    from tuning_runs import result_of, steps_of, trainer_of
    from unets import UNETS, build_model

    # A process with threads cannot be forked safely.
    torch.set_num_threads(1)
    with torch.inference_mode():
        model = build_model(UNETS["tiny"])
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        conditioning = [[torch.randn(1, 7, host.context_width(model), generator=generator), {}]]
        settings = TuneSettings(steps=STEPS, learning_rate=1e-3, warmup_steps=5)
        with trainer_of(model, latents, conditioning, settings) as trainer:
            with steps_of(trainer, folder, interval=0.0) as steps:
                for step in steps:
                    time.sleep(pace)
                    if step.number == cancel_after:
                        raise KeyboardInterrupt
            return result_of(trainer)


def same(ours: Any, theirs: Any) -> bool:
    """Tell whether two runs ended with the same bits."""
    from tuning_runs import assert_same

    try:
        assert_same(ours, theirs)
    except AssertionError:
        return False
    return True


def visible_but_broken(folder: Path) -> list[str]:
    """List the folder's visible files that cannot be read whole."""
    from safetensors import SafetensorError, safe_open

    broken = []
    for path in folder.glob("[!.]*"):
        try:
            with safe_open(path, framework="pt") as file:
                [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
        except (OSError, SafetensorError):
            broken.append(path.name)
    return broken


def run_and_kill(folder: Path, after: float) -> bool:
    """Tune in a process of its own and kill it after ``after`` seconds. Returns whether it was still running."""
    child = os.fork()
    if not child:
        try:
            # The pace spreads the moments over writing and tuning alike on a fast machine.
            tune(folder, pace=0.02)
        finally:
            os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def killed(rng: random.Random, undisturbed: Any) -> tuple[int, list[str]]:
    """Kill a run until one attempt finishes. Returns the number of kills and the complaints."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, kills = Path(scratch), 0
        # Later each time, so that a busy machine finishes, too.
        while run_and_kill(folder, rng.uniform(0.05, LONGEST * (1 + kills / 10))):
            kills += 1
            wrong += [f"{name} can be seen and not read" for name in visible_but_broken(folder)]
        if not same(tune(folder), undisturbed):
            wrong.append("other weights")
        left = [path.name for path in folder.glob(".*")]
        if left:
            wrong.append(f"left behind: {left}")
    return kills, wrong


def cancelled(rng: random.Random, undisturbed: Any) -> tuple[int, list[str]]:
    """Cancel a run after one step or several until it finishes. Returns the number of cancels and the complaints."""
    with tempfile.TemporaryDirectory() as scratch:
        cancels, step = 0, rng.randint(1, STEPS)
        while step <= STEPS:
            try:
                tune(Path(scratch), cancel_after=step)
                return cancels, ["the step to cancel after was lost"]
            except KeyboardInterrupt:
                cancels += 1
            step += rng.randint(1, STEPS // 2)
        return cancels, [] if same(tune(Path(scratch)), undisturbed) else ["other weights"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--cancels", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--comfyui", help="default: $COMFYUI_PATH, else ~/comfy/ComfyUI, else the engine from PyPI")
    options = parser.parse_args()
    engine.load_pack()
    engine.load_engine(engine.find_comfyui(options.comfyui))
    rng = random.Random(options.seed)  # noqa: S311
    broken = False
    undisturbed = tune(None)
    for kind, wanted, disturb in (("kills", options.kills, killed), ("cancels", options.cancels, cancelled)):
        done, runs = 0, 0
        wrong: list[str] = []
        while done < wanted:
            times, complaints = disturb(rng, undisturbed)
            done, runs, wrong = done + times, runs + 1, wrong + complaints
        print(f"{kind}: {done} in {runs} runs, {len(wrong)} wrong {wrong[:5] or ''}".rstrip(), flush=True)
        broken |= bool(wrong)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
