"""Fill .venv with all that `make demo` and `make test` need, unless it has it already.

Everything comes from PyPI: the requirements of a real ComfyUI if there is one, else ComfyUI's engine.
"""

import sys

if sys.version_info < (3, 10):
    sys.exit(
        f"Python 3.10 or newer is needed, and {sys.executable} is {sys.version.split()[0]}.\n"
        "Name another one, for instance: make test PYTHON=python3.12"
    )

import argparse
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from engine import PACK_ROOT, find_comfyui

VENV = PACK_ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
REQUIREMENTS = PACK_ROOT / "tools" / "requirements"
TORCH = REQUIREMENTS / "torch.txt"
NOTCOMFY = REQUIREMENTS / "notcomfy.txt"


def run(step: str, *command: str | Path) -> None:
    print(f"{step} ...", flush=True)
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        sys.exit(f"This step failed: {step}. The reason is above; the same command continues from here.")


def pip(step: str, verb: str, *arguments: str | Path, python: Path = VENV_PYTHON) -> None:
    run(step, python, "-m", "pip", verb, "--quiet", "--disable-pip-version-check", *arguments)


def wanted_files(comfyui: Path | None) -> list[Path]:
    """List the requirement files that are installed together."""
    if comfyui:
        engine = [REQUIREMENTS / "host.txt", comfyui / "requirements.txt"]
    else:
        engine = [REQUIREMENTS / "pypi-engine.txt"]
    return [TORCH, *engine, PACK_ROOT / "requirements.txt", REQUIREMENTS / "dev.txt"]


def stamp_of(files: list[Path]) -> str:
    """Return a hash that names an environment with `files` installed by this Python."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {VENV}".encode())
    for file in (Path(__file__), *files):
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()


def venv_fits() -> bool:
    """Tell whether .venv works, has this Python's version, and was made where it lies now."""
    if not VENV_PYTHON.is_file():
        return False
    probe = [VENV_PYTHON, "-c", "import pip, sys; print(sys.version_info[:2], sys.prefix)"]
    answer = subprocess.run(probe, capture_output=True, text=True).stdout.strip()
    return answer == f"{sys.version_info[:2]} {VENV}"


def unpack_notcomfy(venv: Path = VENV) -> None:
    """Unpack the PyPI engine's `comfy` package, checked against its hash, into an environment's folder notcomfy."""
    with tempfile.TemporaryDirectory(dir=venv) as scratch:
        options = ("--no-deps", "--require-hashes", "-r", NOTCOMFY, "-d", scratch)
        pip("Downloading ComfyUI's engine", "download", *options, python=venv / "bin" / "python")
        unpacked = Path(scratch) / "unpacked"
        with tarfile.open(next(Path(scratch).glob("notcomfy-*.tar.gz"))) as archive:
            for member in archive:
                parts = Path(member.name).parts[1:]
                if member.isfile() and parts and parts[0] in ("comfy", "LICENSE"):
                    target = unpacked.joinpath(*parts)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    content = archive.extractfile(member)
                    assert content is not None
                    target.write_bytes(content.read())
        # Gradients do not flow through these in-place additions. ComfyUI itself replaced them later.
        attention = unpacked / "comfy" / "ldm" / "modules" / "attention.py"
        source = attention.read_text()
        attention.write_text(source.replace("x += n\n", "x = x + n\n").replace("x += x_skip\n", "x = x + x_skip\n"))
        shutil.rmtree(venv / "notcomfy", ignore_errors=True)
        unpacked.rename(venv / "notcomfy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["auto", "pypi"], default="auto", help="pypi: ignore any ComfyUI")
    comfyui = find_comfyui() if parser.parse_args().engine == "auto" else None
    files = wanted_files(comfyui)
    stamp = stamp_of(files if comfyui else [*files, NOTCOMFY])
    if STAMP.is_file() and STAMP.read_text() == stamp:
        return

    print(f"Setting up {VENV} for {f'the ComfyUI in {comfyui}' if comfyui else 'the engine from PyPI'}.")
    STAMP.unlink(missing_ok=True)
    if not venv_fits():
        run(
            "Making the environment (Debian and Ubuntu need their package python3-venv for this)",
            *(sys.executable, "-m", "venv", "--clear", VENV),
        )
    pip("Installing PyTorch (on Linux x86-64 a download of several GB; minutes)", "install", "-r", TORCH)
    # torch.txt is named again so that the other files cannot move its pinned versions.
    pip("Installing the rest", "install", *(argument for file in files for argument in ("-r", file)))
    if not comfyui:
        unpack_notcomfy()
    # mypy needs the checkout under the name that tests import it by, whatever its folder is called.
    (VENV / "pack").mkdir(exist_ok=True)
    link = VENV / "pack" / "tune_a_video"
    if not link.is_symlink():
        link.symlink_to(Path("..", ".."), target_is_directory=True)
    STAMP.write_text(stamp)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; the same command continues from here.")
