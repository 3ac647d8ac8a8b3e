"""Give the pack damaged files and inputs, each case in a process of its own.

`python tests/fuzz --seed 0 --count 1000` prints a line per kind of input; exit status 0 = nothing broken. A case is
broken if its process crashes, runs longer than --seconds, takes more than --gib of memory (with its child processes),
or fails with anything but an error that names the input. `--only KIND:NUMBER` runs one case again and shows its output.
Needs os.fork: Linux or macOS.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psutil

# A forked process cannot use an accelerator that its parent has initialised.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(Path(__file__).resolve().parent)]

import engine  # noqa: E402

engine.load_pack()

import cases  # noqa: E402
import torch  # noqa: E402

OUTCOMES = ("ok", "clear error", "unclear error", "crash", "hang", "memory")
BROKEN = OUTCOMES[2:]
# "input: the reason"; also the host's message about a path that leaves its folder.
CLEAR = re.compile(r"^([a-z_0-9 ]+: .{15,}|The loss stopped being a finite number.*Lower learning_rate)", re.S)
POLL = 0.05  # seconds
OWN_ERROR = 3  # exit status of a case that failed with a clear error, and ...
STRAY_ERROR = 4  # ... with any other

Case = Callable[[Random], None]


@dataclass
class Running:
    """A case under way."""

    name: str
    process: int
    began: float
    log: Path


def start(name: str, case: Case, rng: Random, log: Path) -> Running:
    """Run a case in a fork of this process, with its output in the log."""
    child = os.fork()
    if child:
        return Running(name, child, time.monotonic(), log)
    status = STRAY_ERROR
    try:
        os.setsid()  # so that its children can be killed with it
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        case(rng)
        status = 0
    except (ValueError, RuntimeError) as error:
        traceback.print_exc()
        status = OWN_ERROR if CLEAR.match(str(error)) else STRAY_ERROR
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def memory_of(process: int) -> int:
    """Return the resident bytes of a process and its children."""
    try:
        parent = psutil.Process(process)
        return sum(each.memory_info().rss for each in (parent, *parent.children(recursive=True)))
    except psutil.Error:
        return 0


def outcome(running: Running, seconds: float, limit: float) -> str | None:
    """Return how a case ended, None while it runs. Kills a case over its limit of time or memory."""
    done, status = os.waitpid(running.process, os.WNOHANG)
    if done:
        code = os.waitstatus_to_exitcode(status)
        return {0: "ok", OWN_ERROR: "clear error", STRAY_ERROR: "unclear error"}.get(code, "crash")
    verdict = None
    if time.monotonic() - running.began > seconds:
        verdict = "hang"
    elif memory_of(running.process) > limit:
        verdict = "memory"
    if verdict:
        os.killpg(running.process, signal.SIGKILL)
        os.waitpid(running.process, 0)
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300, help="cases in all, shared by the kinds")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of a case")
    parser.add_argument(
        "--gib", type=float, default=3.0, help="memory limit of a case, beside the memory it starts with"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kinds", help=f"of {','.join(cases.KINDS)}; default: all", default=",".join(cases.KINDS))
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one case of this seed, with its output")
    parser.add_argument("--comfyui", help="default: $COMFYUI_PATH, else ~/comfy/ComfyUI, else the engine from PyPI")
    options = parser.parse_args()
    wanted = [options.only.partition(":")[0]] if options.only else options.kinds.split(",")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        if wanted != ["video"]:
            engine.load_engine(engine.find_comfyui(options.comfyui), Path(scratch, "host"))
        torch.set_num_threads(1)  # a process with threads cannot be forked safely
        kinds = cases.kinds(wanted, Path(scratch), ROOT.parent / "shared" / "videos")
        if options.only:
            kind, _, number = options.only.partition(":")
            kinds[kind](Random(f"{options.seed} {kind} {number}"))  # noqa: S311
            return 0
        return run_all(kinds, options, Path(scratch))


def run_all(kinds: dict[str, Case], options: argparse.Namespace, scratch: Path) -> int:
    """Run all cases, several at a time, and print the outcomes. Returns the exit status."""
    names = [f"{kind}:{number}" for number in range(-(-options.count // len(kinds))) for kind in kinds]
    waiting = names[: options.count][::-1]
    limit = memory_of(os.getpid()) + options.gib * 2**30
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    running: list[Running] = []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name = waiting.pop()
            kind = name.partition(":")[0]
            rng = Random(f"{options.seed} {name.replace(':', ' ')}")  # noqa: S311
            running.append(start(name, kinds[kind], rng, scratch / f"{name.replace(':', '-')}.log"))
        time.sleep(POLL)
        for each in list(running):
            ended = outcome(each, options.seconds, limit)
            if ended is None:
                continue
            running.remove(each)
            counts[each.name.partition(":")[0]][ended] += 1
            if ended in BROKEN:
                last = each.log.read_text(errors="replace").strip().splitlines()[-1:] if each.log.is_file() else []
                print(f"BROKEN {each.name}: {ended} {last}", flush=True)
            each.log.unlink(missing_ok=True)
    for kind, count in counts.items():
        print(f"{kind}: {count.total()} cases, " + ", ".join(f"{count[name]} {name}" for name in OUTCOMES))
    return int(any(count[name] for count in counts.values() for name in BROKEN))


if __name__ == "__main__":
    if not hasattr(os, "fork"):
        sys.exit("this needs os.fork, which Windows does not have")
    sys.exit(main())
