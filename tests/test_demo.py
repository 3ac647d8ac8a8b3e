"""The demo's model: its tokenizer and the record of its weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Scripts import what lies beside them by its plain name.
sys.path.append(str(ROOT / "demo"))

import tokens  # noqa: E402
from tune_a_video.tav_core.tiny_sd import model as tiny_sd  # noqa: E402


def test_the_tokenizers_files_are_what_the_code_writes(tmp_path: Path) -> None:
    tokens.write(tmp_path)
    committed = tiny_sd.FOLDER / "tokenizer"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in committed.iterdir())
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (committed / file.name).read_bytes(), file.name


def test_the_longest_caption_fits_and_unknown_words_do_too() -> None:
    tokenizer = tiny_sd.Tokenizer(tiny_sd.FOLDER / "tokenizer")
    prompt = "two red triangles with hats and two blue circles with boots on the night sky, pencil style"
    ((*ids,),) = tokenizer.tokenize_with_weights(prompt)["l"]
    numbers = [token for token, _ in ids]
    assert len(numbers) == tiny_sd.TOKENS
    # The end's token comes before the padding: nothing was cut off.
    assert numbers[0] == 0 and numbers.index(1) < tiny_sd.TOKENS - 1
    assert tokenizer.clip_l.tokenizer.decode(numbers[1 : numbers.index(1)]).replace(" ,", ",") == prompt
    for text in ("", "a zebra", "ein grünes Dreieck", "星"):
        assert all(len(section) == tiny_sd.TOKENS for section in tokenizer.tokenize_with_weights(text)["l"])


def test_the_weights_are_small_enough_for_git_and_say_where_they_come_from() -> None:
    record = json.loads((tiny_sd.FOLDER / "training.json").read_text())
    assert sum(file.stat().st_size for file in tiny_sd.FOLDER.rglob("*") if file.is_file()) <= 32 * 2**20
    assert all(run["command"].startswith("python demo train --seed ") for run in record["runs"])
    assert all(sum(run["minutes"].values()) > 0 for run in record["runs"])


def test_a_short_training_from_nothing_gives_weights_that_load(tmp_path: Path) -> None:
    sizes = "--scenes 64 --batch 8 --steps 2 --autoencoder-steps 2 --vision-steps 2".split()
    folders = ["--to", str(tmp_path / "weights"), "--scratch", str(tmp_path / "scratch")]
    command = [sys.executable, str(ROOT / "demo"), "train", "--device", "cpu", *sizes, *folders]
    subprocess.run(command, check=True, timeout=600)
    model, _, _ = tiny_sd.load(tmp_path / "weights" / "tiny-sd.safetensors")
    committed, _, _ = tiny_sd.load()
    # The trained model keeps no part of the auxiliary losses.
    assert model.model.state_dict().keys() == committed.model.state_dict().keys()
