"""Mutation testing: one small change at a time to a file of tav_core, and whether its tests notice.

`python tests/mutants --files attention,schedule --seed 0 --count 50` tries so many changes to each file (0 = every
one) and prints those that no test noticed and a line per file; exit status 0 = at least 85 % were noticed in each
file. Changes that make no difference are listed, with the reason, in `equivalent.py`; they are tried and counted too,
but apart. `--only attention:57` tries the changes to one line and shows what the tests say. Needs os.fork: Linux or
macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.machinery
import io
import os
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import ModuleType

# A forked process cannot use an accelerator that its parent has looked at.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(Path(__file__).resolve().parent)]

import engine  # noqa: E402
from changes import Change, changes_of  # noqa: E402
from equivalent import EQUIVALENT  # noqa: E402

# File of tav_core -> the tests that are about it, the quickest first.
TESTS = {
    "attention": ["test_parts.py", "test_inflate.py", "test_windows.py"],
    "schedule": ["test_schedule.py"],
    "weights": ["test_weights.py"],
    "inflate": ["test_parts.py", "test_inflate.py", "test_windows.py"],
    "norm": ["test_parts.py", "test_inflate.py"],
    "low_rank": ["test_low_rank.py"],
}
ENOUGH = 0.85
OUTCOMES = ("noticed", "timeout", "survived", "equivalent")


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module another source than the one on the disk."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.machinery.ModuleSpec(name, self, origin=str(self.path))

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.source, self.path, "exec"), module.__dict__)  # noqa: S102


def run_tests(file: str, source: str, comfyui: Path | None, seconds: int, show: bool) -> str:
    """Run a file's tests in a fork of this process, with its source changed: "passed", "noticed" or "timeout"."""
    child = os.fork()
    if not child:
        status = 99
        try:
            # Of the processor, so that a busy machine is not taken for an endless loop; the clock for one that sleeps.
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            signal.alarm(100 * seconds)
            if not show:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
            path = ROOT / "tav_core" / f"{file}.py"
            sys.meta_path.insert(0, Changed(f"{engine.PACK_NAME}.tav_core.{file}", path, source))
            status = int(_pytest(file, comfyui, "short" if show else "no"))
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
        return "timeout"
    return "noticed" if code else "passed"


def _pytest(file: str, comfyui: Path | None, traceback: str) -> int:
    import pytest

    arguments = ["-x", "-q", "--assert=plain", f"--tb={traceback}", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    arguments += [f"--comfyui={comfyui}"] if comfyui else ["--engine=pypi"]
    tests = [str(ROOT / "tests" / name) for name in TESTS[file]]
    return pytest.main([*arguments, f"--rootdir={ROOT}", f"-c{ROOT / 'pyproject.toml'}", *tests])


def _warm(comfyui: Path | None, scratch: str) -> None:
    """Import once what every test process needs, and leave the pack out again."""
    import hypothesis
    import pytest
    import torch

    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = scratch
    hypothesis.settings.register_profile("mutants", max_examples=20)
    hypothesis.settings.load_profile("mutants")
    engine.load_engine(comfyui, Path(scratch, "host"))
    engine.load_pack()
    import tune_a_video.tav_core.tuning.trainer  # noqa: F401
    import unets  # noqa: F401

    # pytest imports half of itself and its plugins only when it runs.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", os.devnull])
    for name in [name for name in sys.modules if name.partition(".")[0] == engine.PACK_NAME]:
        del sys.modules[name]
    torch.set_num_threads(1)  # a process with threads cannot be forked safely


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", default=",".join(TESTS), help=f"of {','.join(TESTS)}; default: all")
    parser.add_argument("--seed", type=int, default=0, help="which changes are drawn")
    parser.add_argument("--count", type=int, default=0, help="changes to each file; default: every one")
    parser.add_argument("--seconds", type=int, default=60, help="of the processor, for a change's tests")
    parser.add_argument("--only", metavar="FILE:LINE", help="the changes to one line, with what the tests print")
    parser.add_argument("--comfyui", help="default: $COMFYUI_PATH, else ~/comfy/ComfyUI, else the engine from PyPI")
    options = parser.parse_args()
    comfyui = engine.find_comfyui(options.comfyui)
    file, _, line = (options.only or "").partition(":")
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        _warm(comfyui, scratch)
        shares = [
            test_file(name, comfyui, options, int(line) if line else None)
            for name in ([file] if file else options.files.split(","))
        ]
    return int(min(shares) < ENOUGH)


def test_file(file: str, comfyui: Path | None, options: argparse.Namespace, line: int | None) -> float:
    """The share of changes to a file that its tests notice, those that make no difference left aside."""
    source = (ROOT / "tav_core" / f"{file}.py").read_text()
    if run_tests(file, source, comfyui, 10 * options.seconds, False) != "passed":
        sys.exit(f"{file}: its tests fail without any change; run them first: {' '.join(TESTS[file])}")
    chosen = list(changes_of(source))
    if line is not None:
        chosen = [change for change in chosen if change.line == line]
    elif options.count:
        drawn = random.Random(f"{options.seed} {file}").sample(chosen, min(options.count, len(chosen)))  # noqa: S311
        chosen = sorted(drawn, key=lambda change: change.line)
    counts: Counter[str] = Counter()
    for number, change in enumerate(chosen, 1):
        outcome = run_tests(file, change.source, comfyui, options.seconds, line is not None)
        if outcome == "passed":
            outcome = "equivalent" if _no_difference(file, change) else "survived"
        counts[outcome] += 1
        print(f"{file} {number}/{len(chosen)}: {outcome}", file=sys.stderr, flush=True)
        if outcome == "survived" or line is not None:
            print(f"{outcome} {file}:{change.line}: {change.kind}\n  {change.before}\n  {change.after}", flush=True)
    noticed, wanted = counts["noticed"] + counts["timeout"], counts.total() - counts["equivalent"]
    share = noticed / wanted if wanted else 1.0
    tally = ", ".join(f"{counts[name]} {name}" for name in OUTCOMES)
    print(f"{file}: {counts.total()} changes, {tally}: {share:.1%} noticed", flush=True)
    return share


def _no_difference(file: str, change: Change) -> bool:
    return (file, change.before, change.after) in EQUIVALENT


if __name__ == "__main__":
    if not hasattr(os, "fork"):
        sys.exit("this needs os.fork, which Windows does not have")
    sys.exit(main())
