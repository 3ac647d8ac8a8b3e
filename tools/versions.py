"""Run tests of the method under another Python and PyTorch, on ComfyUI's engine from PyPI.

`python tools/versions.py --python python3.10 --torch 2.4.1` makes an environment for that pair below --to (numpy,
transformers and the rest as new as fits), runs the tests, and prints a table row. Exit status 0 = all passed. Name
tests to run after `--`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from setup_env import PACK_ROOT, REQUIREMENTS, pip, run, unpack_notcomfy

# Tests that need the engine alone: no ComfyUI and no reference files.
TESTS = "frozen inflate low_rank memory parts resume schedule tune video weights windows".split()
PACKAGES = ("torch", "numpy", "transformers", "safetensors", "decord")
REPORT = """
import sys
from importlib.metadata import PackageNotFoundError, version

def found(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"

print(" | ".join([sys.version.split()[0], *map(found, sys.argv[1:])]))
"""


def make(venv: Path, python: str, torch: str) -> None:
    """Make an environment for the engine's tests, or finish one that an earlier run began."""
    done = venv / "finished"
    if done.is_file():
        return
    run("Making the environment", python, "-m", "venv", venv)
    pinned = (f"torch{torch}", "torchvision")
    files = (REQUIREMENTS / "pypi-engine.txt", PACK_ROOT / "requirements.txt")
    test_tools = ("pytest==9.2.0", "hypothesis>=6.100,<7", "aiohttp", "av>=14.2")
    options = (*pinned, *test_tools, *(part for file in files for part in ("-r", file)))
    pip("Installing", "install", *options, python=venv / "bin" / "python")
    unpack_notcomfy(venv)
    done.touch()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="an interpreter, 3.10 or newer")
    parser.add_argument("--torch", default="", metavar="VERSION", help="default: the newest")
    parser.add_argument("--to", type=Path, default=PACK_ROOT / ".venv" / "versions", metavar="FOLDER")
    parser.add_argument("tests", nargs="*", help=f"default: {' '.join(TESTS)}")
    options = parser.parse_args()
    asked = subprocess.run(
        [options.python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True
    )
    venv = options.to / f"python{asked.stdout.decode().strip()}-torch{options.torch or 'newest'}"
    make(venv, options.python, f"=={options.torch}" if options.torch else "")
    python = venv / "bin" / "python"
    report = subprocess.run([python, "-c", REPORT, *PACKAGES], capture_output=True, text=True, check=True)
    tests = options.tests or [f"tests/test_{name}.py" for name in TESTS]
    command = [python, "-m", "pytest", "--engine=pypi", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=PACK_ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr)
    print(f"| {report.stdout.strip()} | {done.stdout.strip().splitlines()[-1].strip('= ')} |")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
