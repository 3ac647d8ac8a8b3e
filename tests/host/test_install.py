"""The pack by hand, in a folder of any name: nodes, templates, help, translations; taken out, nothing is left."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from host_server import HostServer

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "tune-a-video-quick-start"
NAMES = ("my tune - a video", "comfyui-tune-a-video")


def copy_pack(target):
    """What a clone holds, and no more."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],  # noqa: S607
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


@pytest.mark.parametrize("name", NAMES)
def test_any_folder_name_and_no_traces(comfyui, name):
    with tempfile.TemporaryDirectory(prefix="tune-a-video-install-") as folder:
        base = Path(folder)
        copy_pack(base / "custom_nodes" / name)
        with HostServer(comfyui, base, {}) as server:
            definitions = server.get("/object_info")
            ours = [node for node, info in definitions.items() if info["python_module"] == f"custom_nodes.{name}"]
            assert len(ours) == 11 and all(node.startswith("TAV_") for node in ours)
            assert TEMPLATE in server.get("/workflow_templates")[name]
            assert server.get("/i18n")["ko"]["nodeDefs"].keys() == set(ours)
            scripts = [path for path in server.get("/extensions") if urllib.parse.quote(name) in path]
            assert len(scripts) == len(list((ROOT / "web").rglob("*.js")))
            quoted = urllib.parse.quote(name)
            for path in (
                *scripts,
                f"/extensions/{quoted}/docs/TAV_Sample.md",
                f"/api/workflow_templates/{quoted}/{TEMPLATE}.json",
                f"/api/workflow_templates/{quoted}/{TEMPLATE}.jpg",
            ):
                with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}") as answer:  # noqa: S310
                    assert answer.read()
        shutil.rmtree(base / "custom_nodes" / name)
        left = [path.name for path in base.rglob("*") if "pycache" not in path.parts]
        assert not [entry for entry in left if "tav" in entry.lower() or "tune" in entry.lower()]
