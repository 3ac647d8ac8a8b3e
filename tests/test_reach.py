"""The pack uses no network, no program but ffmpeg and its own decoder, no code from data, and writes no stray file.

Checked in the source, and by the interpreter's audit events while every node runs.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    ROOT / "__init__.py",
    *sorted((ROOT / "tav_core").rglob("*.py")),
    *sorted((ROOT / "nodes").rglob("*.py")),
]
MODULES = set(
    "_pickle aiohttp asyncio cloudpickle code codeop ctypes dill ftplib http httpx imaplib importlib joblib marshal "
    "multiprocessing pickle poplib pty requests runpy shelve smtplib socket socketserver ssl telnetlib urllib "
    "webbrowser websocket websockets xmlrpc".split()
)
ALLOWED_IMPORTS = {
    # To check whether decord and comfy_api are installed without importing them.
    ("tav_core/media/decode.py", "importlib.util"),
    ("__init__.py", "importlib.util"),
    # To answer requests to the host's own server, and to quote the pack's folder name as it does.
    *((f"nodes/support/{name}.py", f"aiohttp{part}") for name in ("stop", "routes") for part in ("", ".web")),
    ("nodes/support/routes.py", "urllib.parse"),
}
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
ATTRIBUTES = {
    "torch.load", "torch.save", "torch.hub", "torch.jit", "np.load", "numpy.load", "os.system", "os.popen",
    "os.startfile", "os.fork", "os.forkpty", "importlib.import_module", "builtins.eval", "builtins.exec",
}  # fmt: skip
STARTING = ("os.exec", "os.spawn", "os.posix_spawn")
# The files that start programs, with lists of arguments: the reader of clips in a process of its own, and ffmpeg.
STARTS = {ROOT / "tav_core" / "media" / name for name in ("process.py", "encode.py")}


def name_of(node: ast.AST) -> str:
    """ "a.b.c" of an attribute of a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def reaches(path: Path, source: str) -> list[str]:
    """Return what a module does that the pack must not do."""
    found = []
    place = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(source)):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        for name in imported:
            if name.split(".")[0] in MODULES and (place, name) not in ALLOWED_IMPORTS:
                found.append(f"imports {name}")
            if name.split(".")[0] == "subprocess" and path not in STARTS:
                found.append("imports subprocess")
            if name in ATTRIBUTES or name.startswith(STARTING):
                found.append(f"imports {name}")
        if isinstance(node, ast.Attribute):
            name = name_of(node)
            if name in ATTRIBUTES or name.startswith(STARTING):
                found.append(name)
        if isinstance(node, ast.Call):
            name = name_of(node.func)
            if name in CALLS:
                found.append(f"calls {name}")
            if name.startswith("subprocess.") and not isinstance(node.args[0], (ast.Name, ast.List)):
                found.append(f"{name} of something that is not a list")
            found += [
                f"{keyword.arg}={ast.unparse(keyword.value)}"
                for keyword in node.keywords
                if keyword.arg in ("shell", "executable", "preexec_fn")
                or (keyword.arg in ("allow_pickle", "trust_remote_code") and ast.unparse(keyword.value) != "False")
            ]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_reaches_for_more_than_it_may(path: Path) -> None:
    assert reaches(path, path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import socket", "from urllib.request import urlopen", "import pickle as p", "import torch\ntorch.load('x')",
        "eval('1')", "import os\nos.system('x')", "import subprocess", "from os import system",
        "f(shell=True)", "import numpy as np\nnp.load('x', allow_pickle=True)", "import importlib",
        "from importlib import import_module", "os.execv('x', [])", "__import__('socket')",
    ],
)  # fmt: skip
def test_what_would_be_found(source: str) -> None:
    assert reaches(ROOT / "tav_core" / "schedule.py", source)


WATCHED = """
import json, os, sys, tempfile
from pathlib import Path
root, comfyui, base = map(Path, sys.argv[1:4])
sys.path.insert(0, str(root / "tools"))
import engine
engine.load_pack()
engine.load_engine(comfyui, base)
from types import SimpleNamespace
import torch
from unets import UNETS, build_model
from tune_a_video.nodes import demo_model as loader
from tune_a_video.nodes import compare_videos
from tune_a_video.nodes import evaluate_video
from tune_a_video.nodes import load_motion
from tune_a_video.nodes import load_video
from tune_a_video.nodes import inflate
from tune_a_video.nodes import invert
from tune_a_video.nodes import sample
from tune_a_video.nodes import save_motion
from tune_a_video.nodes import save_video
from tune_a_video.nodes import tune
import folder_paths
for folder in ("input", "output", "temp"):
    (base / folder).mkdir(parents=True, exist_ok=True)
tempfile.tempdir = str(base / "scratch")
os.mkdir(tempfile.tempdir)

def run(node, *args):
    hidden = SimpleNamespace(prompt=None, unique_id="1", extra_pnginfo={"workflow": {"x": 1}})
    return type(node.__name__, (node,), {"hidden": hidden}).execute(*args).result

def everything(turn):
    frames = torch.rand(3, 64, 64, 3)
    saved = [run(save_video.SaveVideo, frames, 8.0, f"clips/{turn}", kind, 80)[1] for kind in ("mp4", "webm", "gif")]
    os.replace(saved[0], base / "input" / "clip.mp4")
    run(load_video.LoadVideo, "clip.mp4", 0.0, "seconds", 3, 1, 64, 64, "stretch")
    model = build_model(UNETS["tiny"])
    latent = {"samples": torch.randn(3, 4, 8, 8)}
    prompt = [[torch.randn(1, 7, 32), {}]]
    tuned, learnt, _ = run(tune.OneShotTune, model, latent, prompt, 6, 1e-3, turn, "all", "auto", 0, 1.0)
    path = run(save_motion.SaveMotion, learnt, f"runs/{turn}", 4)[0]
    again = run(load_motion.LoadMotion, os.path.relpath(path, folder_paths.get_folder_paths("tav")[0]))[0]
    inflated = run(inflate.InflateUNet, model, "sparse-causal", "over frames", 1.0, 1.0, again)[0]
    inverted = run(invert.DDIMInvert, inflated, latent, prompt, 2)[0]
    run(sample.TAVSample, inflated, prompt, prompt, inverted, 2, 3.0, 0.5, 0)
    run(evaluate_video.EvaluateVideo, frames, frames)
    run(compare_videos.CompareVideos, frames, frames)

seen = []
def hook(event, args):
    if not watching:
        return
    if event.startswith(("socket.", "urllib.", "ftplib.", "smtplib.", "http.", "pickle.", "os.exec", "os.system",
                         "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "ctypes.dlopen", "code.")):
        seen.append([event, str(args)[:300]])
    elif event == "subprocess.Popen":
        seen.append([event, [str(args[0]), [str(each) for each in args[1]]]])
    elif event == "open" and isinstance(args[0], (str, bytes)):
        mode, flags = args[1] or "", args[2] or 0
        if set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen.append(["write", os.path.realpath(os.fsdecode(args[0]))])
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.symlink", "os.link", "shutil.rmtree"):
        if event == "os.remove" and args[1] != -1:
            return  # a name inside a folder that shutil.rmtree has reported
        path = args[1] if event in ("os.rename", "os.symlink") else args[0]
        seen.append([event, os.path.realpath(os.fsdecode(path))])

watching = False
sys.addaudithook(hook)
with torch.inference_mode():
    everything(0)  # libraries initialise themselves at their first use
    watching = True
    everything(1)
    run(loader.LoadDemoModel)
    watching = False
Path(sys.argv[4]).write_text(json.dumps(seen))
"""


@pytest.mark.comfyui
def test_nothing_is_reached_for_while_everything_runs(comfyui: Path, tmp_path: Path) -> None:
    import imageio_ffmpeg

    base, told = tmp_path / "base", tmp_path / "seen.json"
    (base / "models" / "tav").mkdir(parents=True)
    command = [sys.executable, "-c", WATCHED, ROOT, comfyui, base, told]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(told.read_text())
    programs = [argument for event, argument in seen if event == "subprocess.Popen"]
    ffmpeg, reader = imageio_ffmpeg.get_ffmpeg_exe(), str(ROOT / "tav_core" / "media" / "reader.py")
    for program, arguments in programs:
        assert program == ffmpeg or arguments[:3] == [sys.executable, "-I", reader], arguments
    assert any(program == ffmpeg for program, _ in programs)
    allowed = [str(base / folder) for folder in ("output", "temp", "models/tav", "scratch")]
    changed = ("write", "os.rename", "os.remove", "os.mkdir", "os.symlink", "os.link", "shutil.rmtree")
    touched = [path for event, path in seen if event in changed]
    assert any(path.startswith(allowed[2]) for path in touched), "nothing was watched"
    stray = [path for path in touched if not path.startswith(tuple(allowed)) and path != "/dev/null"]
    # The test moves its own clip into the input folder.
    assert {Path(path) for path in stray} <= {base / "input" / "clip.mp4"}, stray
    assert not [event for event in seen if event[0] not in ("subprocess.Popen", *changed)]
