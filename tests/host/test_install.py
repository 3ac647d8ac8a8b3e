"""The pack by hand, in a folder of any name: nodes, templates, help, translations; taken out, nothing is left."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

import graphs
import pytest
from host_server import HostServer

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "tune-a-video-quick-start"
NAMES = ("my tune - a video", "comfyui-tune-a-video")


def listed():
    """The files of a clone, and no more."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],  # noqa: S607
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return [name for name in names if (ROOT / name).is_file()]


def clone(target):
    for name in listed():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)


def unpack(target):
    """The registry's archive: a clone without the files that .comfyignore names."""
    left_out = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    assert all((ROOT / name).exists() for name in left_out)
    archive = target.parent / "node.zip"
    target.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in listed():
            if name.split("/")[0] not in left_out:
                packed.write(ROOT / name, name)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(target)
    archive.unlink()


def offered_subgraphs(server, name):
    """Names of the subgraphs that the host lists for the pack; None where it knows no subgraphs."""
    try:
        listed = server.get("/global_subgraphs")
    except urllib.error.HTTPError as error:
        assert error.code == 404
        return None
    ours = {key: each for key, each in listed.items() if each["info"]["node_pack"] == f"custom_nodes.{name}"}
    assert all(json.loads(server.get(f"/global_subgraphs/{key}")["data"])["nodes"] for key in ours)
    return {each["name"] for each in ours.values()}


def demo_image():
    """A picture by the model that comes with the pack: needs its weights, and code beyond nodes/ and tav_core/."""
    graph = graphs.Graph()
    model = graph.add("TAV_LoadDemoModel")
    prompt = graphs.text(graph, model[1], "a red circle")
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    sampled = graph.add(
        "KSampler", model=model[0], seed=0, steps=1, cfg=1.0, sampler_name="euler", scheduler="normal", positive=prompt,
        negative=prompt, latent_image=latent[0], denoise=1.0,
    )  # fmt: skip
    graph.add("PreviewImage", images=graph.add("VAEDecode", samples=sampled[0], vae=model[2])[0])
    return graph


@pytest.mark.parametrize(("name", "install"), [*((name, clone) for name in NAMES), ("tune-a-video", unpack)])
def test_any_folder_name_and_no_traces(comfyui, name, install):
    with tempfile.TemporaryDirectory(prefix="tune-a-video-install-") as folder:
        base = Path(folder)
        install(base / "custom_nodes" / name)
        with HostServer(comfyui, base, {}) as server:
            definitions = server.get("/object_info")
            ours = [node for node, info in definitions.items() if info["python_module"] == f"custom_nodes.{name}"]
            assert set(ours) == {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}
            assert TEMPLATE in server.get("/workflow_templates")[name]
            assert offered_subgraphs(server, name) in (None, {path.stem for path in (ROOT / "subgraphs").iterdir()})
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
            server.run(demo_image().nodes).raise_for_error()
        shutil.rmtree(base / "custom_nodes" / name)
        left = [path.name for path in base.rglob("*") if "pycache" not in path.parts]
        assert not [entry for entry in left if "tav" in entry.lower() or "tune" in entry.lower()]
