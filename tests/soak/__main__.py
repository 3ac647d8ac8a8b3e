"""Queue random graphs on a real ComfyUI, with interrupts at random moments.

`python tests/soak --seed 0 --runs 50 --comfyui PATH` queues that many graphs on one server, several at a time: stock
images, stock images with a LoRA at changing strengths, videos from the same checkpoints inflated, inversions, and
tunings of two clips, each with either of two checkpoints. Some are interrupted, some are taken off the queue. Every
result must equal, bit for bit, that of a server started for this graph alone; its stock part must equal that of a
server on which nothing of this pack ran. Repeated tunings then measure the server's memory. In the end its folders may
hold nothing unfinished. Prints a line per kind of graph; exit status 0 = nothing broken.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(Path(__file__).resolve().parent)]

import engine  # noqa: E402

engine.load_pack()

import jobs  # noqa: E402
import tiny_checkpoint  # noqa: E402
import torch  # noqa: E402
from host_server import HostError, HostServer  # noqa: E402
from jobs import Job  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402
from tune_a_video.tav_core.media.clip import load_clip  # noqa: E402
from tune_a_video.tav_core.media.encode import save_clip  # noqa: E402

PACK = "Tune-A-Video"
OUTCOMES = ("identical", "interrupted", "off the queue", "DIFFERENT", "FAILED")
BROKEN = OUTCOMES[3:]
MOST_AT_ONCE = 4
# Seconds that a graph is expected to take, until some have been measured. Interrupts are drawn within this time.
USUAL = 4.0
POLL = 0.1
LONGEST = 1200.0
# Limit of the growth of the server's memory from the second to the last of the repeated runs.
MOST_GROWTH = 0.01


@dataclass
class Run:
    """A queued job and its outcome."""

    job: Job
    prompt_id: str
    saved: dict[str, Any]
    outcome: str = ""
    digests: dict[str, str] = field(default_factory=dict)
    said: str = ""


def write_inputs(base: Path) -> None:
    """Write two checkpoints, a LoRA for both, and two clips of a few frames."""
    layout = tiny_checkpoint.SD1_SHALLOW
    for index, name in enumerate(jobs.CHECKPOINTS):
        weights = tiny_checkpoint.checkpoint_weights(layout, seed=5 * index)
        tiny_checkpoint.save(weights, base / "models" / "checkpoints" / name)
    tiny_checkpoint.save(tiny_checkpoint.lora_weights(layout, seed=1), base / "models" / "loras" / jobs.LORA)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    (base / "input").mkdir()
    for name in jobs.CLIPS:
        frames = []
        for index in range(6):
            if name.startswith("disc"):
                shape = ((x - 12 - 6 * index) ** 2 + (y - 36) ** 2) < 120
                colours = torch.tensor([0.9, 0.3, 0.1]), torch.tensor([0.2, 0.6, 0.2])
            else:
                shape = ((x + 5 * index) % 24) < 10
                colours = torch.tensor([0.1, 0.3, 0.9]), torch.tensor([0.05, 0.05, 0.1])
            frames.append(torch.where(shape[..., None], *colours))
        save_clip(torch.stack(frames), 8.0, base / "input" / name)


def started(comfyui: Path, base: Path, shared: Path) -> HostServer:
    """Prepare a server with the models and clips of ``shared`` and its own output folder. It is not started yet."""
    base.mkdir(parents=True, exist_ok=True)
    (base / "models").mkdir()
    for folder in (shared / "models").iterdir():
        (base / "models" / folder.name).symlink_to(folder)
    shutil.copytree(shared / "input", base / "input")
    scratch = base / "scratch"
    scratch.mkdir()
    # Temporary files that programs leave behind lie where they can be counted.
    environment = {"TMPDIR": str(scratch), "OMP_WAIT_POLICY": "PASSIVE"}
    arguments = ["--preview-method", "latent2rgb"]
    return HostServer(comfyui, base, {PACK: ROOT}, environment, arguments, start_timeout=LONGEST, run_timeout=LONGEST)


def queue(server: HostServer, job: Job, salt: int) -> Run:
    """Put a job on the server's queue."""
    graph, saved = jobs.graph_of(job, salt)
    # No client listens under this id; progress and previews are still made.
    answer = server.post("/prompt", {"prompt": graph.nodes, "client_id": uuid.uuid4().hex})
    if answer["node_errors"]:
        raise HostError(f"{job} was refused in part: {answer['node_errors']}")
    return Run(job, answer["prompt_id"], saved)


def wait(server: HostServer, runs: list[Run]) -> None:
    """Wait until nothing is queued or runs, then note each run's outcome."""
    began = time.monotonic()
    while True:
        state = server.get("/queue")
        if not state["queue_running"] and not state["queue_pending"]:
            break
        if time.monotonic() - began > LONGEST * len(runs):
            raise HostError(f"{len(runs)} graphs did not end within {LONGEST * len(runs):.0f} s")
        time.sleep(POLL)
    for run in runs:
        entry = server.get(f"/history/{run.prompt_id}").get(run.prompt_id)
        if entry is None:
            run.outcome = "off the queue"
            continue
        messages = dict(entry["status"]["messages"])
        if entry["status"]["status_str"] == "success":
            run.digests = jobs.digests(entry["outputs"], run.saved, server.base)
        elif "execution_interrupted" in messages:
            run.outcome = "interrupted"
        else:
            run.outcome, run.said = "FAILED", str(messages.get("execution_error", messages))[:2000]


def disturb(server: HostServer, runs: list[Run], moments: list[tuple[float, str, int]]) -> None:
    """Interrupt runs, or take them off the queue, at the given moments."""
    began = time.monotonic()
    for moment, how, index in sorted(moments):
        time.sleep(max(0.0, began + moment - time.monotonic()))
        with suppress(OSError):  # a server that is gone is noticed elsewhere
            if how == "take off":
                server.post("/queue", {"delete": [runs[index].prompt_id]})
            else:
                server.post("/interrupt", {} if how == "interrupt any" else {"prompt_id": runs[index].prompt_id})


def busy_time(server: HostServer, rng: Random, count: int, seconds: float) -> list[Run]:
    """Run ``count`` jobs, or as many as start within ``seconds``, a few at a time, some of them disturbed."""
    done: list[Run] = []
    began = time.monotonic()
    while len(done) < count and time.monotonic() - began < seconds:
        batch = [
            queue(server, jobs.random_job(rng), len(done) + index)
            for index in range(min(rng.randint(1, MOST_AT_ONCE), count - len(done)))
        ]
        usual = (time.monotonic() - began) / len(done) if done else USUAL
        moments = [
            (
                rng.uniform(0, usual * len(batch)),
                rng.choice(("interrupt any", "interrupt one", "take off")),
                rng.randrange(len(batch)),
            )
            for _ in range(rng.choice((0, 1, 1, 2)))
        ]
        thread = threading.Thread(target=disturb, args=(server, batch, moments))
        thread.start()
        wait(server, batch)
        thread.join()
        for run in batch:
            # An undisturbed batch has no interrupted or missing runs.
            if run.outcome in ("interrupted", "off the queue") and not moments:
                run.outcome, run.said = "FAILED", f"{run.outcome} by itself"
        done += batch
        print(f"{len(done)} of {count}", file=sys.stderr, flush=True)
    return done


def judge(runs: list[Run], comfyui: Path, scratch: Path, shared: Path) -> None:
    """Compare finished runs with clean servers: one for all stock graphs, and one for each other job."""
    finished = [run for run in runs if not run.outcome]
    stock = list(dict.fromkeys(jobs.stock_of(run.job) for run in finished))
    clean = clean_digests(stock, comfyui, scratch / "clean-stock", shared) if stock else {}
    for run in finished:
        if run.job not in clean:
            clean |= clean_digests([run.job], comfyui, scratch / f"clean-{len(clean)}", shared)
        # The stock part of its graph is compared with the server on which nothing of this pack ran.
        expected = clean[run.job] | clean[jobs.stock_of(run.job)]
        different = sorted(name for name in expected if run.digests.get(name) != expected[name])
        run.outcome, run.said = ("DIFFERENT", ", ".join(different)) if different else ("identical", "")


def clean_digests(wanted: Sequence[Job], comfyui: Path, base: Path, shared: Path) -> dict[Job, dict[str, str]]:
    """Return the results of jobs on a server of their own."""
    print("clean: " + "; ".join(map(str, wanted)), file=sys.stderr, flush=True)
    with started(comfyui, base, shared) as server:
        runs = [queue(server, job, 0) for job in wanted]
        wait(server, runs)
    shutil.rmtree(base)
    for run in runs:
        if run.outcome:
            raise HostError(f"the clean run of {run.job} ended as {run.outcome}: {run.said}")
    return {run.job: run.digests for run in runs}


def memory_of(server: HostServer) -> int:
    """Return the resident bytes of the server's process."""
    return psutil.Process(server.process_id).memory_info().rss


def repeat(server: HostServer, count: int) -> list[int]:
    """Tune on the two clips in turn and return the server's memory after each tuning.

    Every tuning is computed: the server neither remembers its result nor finds it on disk.
    """
    used = []
    for index in range(count):
        for file in (server.output_folder / ".tune-a-video").glob("*"):
            file.unlink()
        run = queue(server, Job("tuned", clip=index % len(jobs.CLIPS)), 5000 + index)
        wait(server, [run])
        if run.outcome:
            raise HostError(f"a repeated run ended as {run.outcome}: {run.said}")
        used.append(memory_of(server))
        print(f"repeated run {index + 1}: {used[-1] / 2**20:.1f} MiB", file=sys.stderr, flush=True)
    return used


def left_behind(server: HostServer) -> list[str]:
    """List unfinished or unreadable files, and child processes that still run."""
    found = [f"process {child.name()}" for child in psutil.Process(server.process_id).children(recursive=True)]
    for folder in ("output", "temp", "models/tav", "scratch"):
        for path in (server.base / folder).rglob("*"):
            relative = path.relative_to(server.base).as_posix()
            # torch.distributed, which the host imports, keeps this generated module there.
            if path.is_dir() or path.name == "_remote_module_non_scriptable.py":
                continue
            if folder == "scratch" or path.name.startswith(".") or path.suffix in (".part", ".partial", ".tmp"):
                found.append(relative)
                continue
            try:
                _read(path)
            except Exception as error:
                found.append(f"{relative}: {error}")
    return found


def _read(path: Path) -> None:
    if path.suffix in (".png", ".jpg"):
        with Image.open(path) as picture:
            picture.load()
    elif path.suffix == ".mp4":
        load_clip(path, frame_count=0, width=64, height=64)
    else:
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118
                file.get_tensor(key)


def report(runs: list[Run]) -> bool:
    """Print a line per kind and return whether nothing is broken."""
    for run in runs:
        if run.outcome in BROKEN:
            print(f"BROKEN {run.outcome} {run.job}: {run.said}")
    for kind in jobs.KINDS:
        count = Counter(run.outcome for run in runs if run.job.kind == kind)
        print(f"{kind}: {count.total()} graphs, " + ", ".join(f"{count[name]} {name}" for name in OUTCOMES))
    return not any(run.outcome in BROKEN for run in runs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=50, help="graphs that are queued at random")
    parser.add_argument("--minutes", type=float, default=1e9, help="queue no further graph after this time")
    parser.add_argument("--repeats", type=int, default=20, help="tunings queued one by one, for memory; 0 = none")
    parser.add_argument("--comfyui", help="default: $COMFYUI_PATH, else ~/comfy/ComfyUI")
    options = parser.parse_args()
    comfyui = engine.find_comfyui(options.comfyui)
    if comfyui is None:
        parser.error("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI")
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        shared = Path(scratch, "shared")
        shared.mkdir()
        write_inputs(shared)
        with started(comfyui, Path(scratch, "server"), shared) as server:
            runs = busy_time(server, Random(options.seed), options.runs, 60 * options.minutes)  # noqa: S311
            used = repeat(server, options.repeats)
            left = left_behind(server)
        judge(runs, comfyui, Path(scratch), shared)
    sound = report(runs)
    if len(used) > 2:
        growth = used[-1] / used[1] - 1
        print(f"memory after 2 repeated runs: {used[1] / 2**20:.1f} MiB, after {len(used)}: {growth:+.2%}")
        sound &= growth <= MOST_GROWTH
    print(f"left behind: {', '.join(left) or 'nothing'}")
    return 0 if sound and not left else 1


if __name__ == "__main__":
    sys.exit(main())
