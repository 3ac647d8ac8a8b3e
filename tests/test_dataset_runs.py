"""Studies that are killed, interrupted and resumed; scores, tables and the layouts that are written."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tune_a_video.tav_core.media.encode import save_clip

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "bench"), str(ROOT / "demo")]

from dataset import jobs, layouts, local, page, results, scoring, sources  # noqa: E402

SETTINGS = jobs.Settings(frames=2, width=16, height=16)
# Makes pictures from the job's text in a tenth of a second, and writes down each edit that it finished. Sentences can
# ask it to fail or to end itself.
STAND_IN = f"""
import json, os, sys, time, hashlib, threading
sys.path.insert(0, {str(ROOT / "bench")!r})
import numpy as np
from pathlib import Path
from dataset import results
json.loads(sys.stdin.readline())
print(json.dumps({{"ready": True}}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if job["edit"] == "kill me":
        os.kill(os.getpid(), 9)
    if job["edit"] == "fail":
        print(json.dumps({{"error": "ValueError: no"}}), flush=True)
        continue
    time.sleep(0.1)
    seed = int(hashlib.sha256((job["clip"] + job["method"] + job["edit"]).encode()).hexdigest()[:8], 16)
    frames = np.random.default_rng(seed).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    results.write_frames(Path(job["result"]), frames)
    with open(Path(job["work"]).parent / "made.txt", "a") as log:
        log.write(job["result"] + "\\n")
    print(json.dumps({{"ok": True}}), flush=True)
"""


def stand_ins(folder: Path, count: int) -> list[local.LocalWorker]:
    program = (sys.executable, "-c", STAND_IN)
    return [local.LocalWorker(f"worker-{i}", SETTINGS, folder / "logs", 1, None, None, program) for i in range(count)]


def some_jobs(folder: Path, clips: int = 4, edits: int = 4) -> list[jobs.Job]:
    (folder / "work").mkdir(parents=True, exist_ok=True)
    return [
        jobs.Job(f"clip {c}", jobs.TUNED, "a dog", f"edit {e}", folder, folder / "work" / str(c), folder / f"{c}-{e}")
        for c in range(clips)
        for e in range(edits)
    ]


def pixels(todo: list[jobs.Job]) -> list[bytes]:
    return [results.read_frames(job.result).tobytes() for job in todo]


def quiet(worker: str, job: jobs.Job, event: str) -> None:
    """Print nothing."""


def test_workers_that_are_killed_cost_the_edit_in_their_hands_only(tmp_path: Path) -> None:
    calm, rough = some_jobs(tmp_path / "calm"), some_jobs(tmp_path / "rough", clips=8)
    assert jobs.share(calm, stand_ins(tmp_path / "calm", 2), True, quiet).made == len(calm)
    workers, choice, killed = stand_ins(tmp_path / "rough", 2), np.random.default_rng(5), 0

    def kill() -> None:
        nonlocal killed
        while killed < 3:  # a slow machine may lose one edit to every kill; the fourth would give it up
            time.sleep(choice.uniform(0.2, 0.5))
            if process := workers[int(choice.integers(2))].process_id:
                os.kill(process, signal.SIGKILL)
                killed += 1

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    outcome = jobs.share(rough, workers, True, quiet)
    killer.join(10)
    assert killed == 3 and 1 <= outcome.deaths <= 3
    assert outcome.made == len(rough) and not outcome.failed and not outcome.left
    assert pixels(rough)[: len(calm)] == pixels(calm)
    made = (tmp_path / "rough" / "work" / "made.txt").read_text().split("\n")[:-1]
    assert len(made) == len(set(made))  # none was finished twice
    assert not list(tmp_path.rglob(".unfinished-*")) or results.remove_unfinished(tmp_path) is None
    assert not list(tmp_path.rglob(".unfinished-*"))


def test_one_deadly_and_one_failing_edit_cost_no_other(tmp_path: Path) -> None:
    todo = some_jobs(tmp_path, clips=2)
    todo[1] = jobs.Job(**{**vars(todo[1]), "edit": "kill me"})
    todo[2] = jobs.Job(**{**vars(todo[2]), "edit": "fail"})
    outcome = jobs.share(todo, stand_ins(tmp_path, 2), True, quiet)
    assert outcome.made == len(todo) - 2 and outcome.deaths == 4
    assert {job.edit: reason for job, reason in outcome.failed}["fail"] == "ValueError: no"
    assert "SIGKILL" in {job.edit: reason for job, reason in outcome.failed}["kill me"]
    assert not todo[1].result.exists() and not todo[2].result.exists()


def test_a_worker_that_does_not_start_is_left_out_at_once(tmp_path: Path) -> None:
    program = (sys.executable, "-c", "raise SystemExit('no such checkpoint')")
    worker = local.LocalWorker("worker-0", SETTINGS, tmp_path / "logs", 1, None, None, program)
    outcome = jobs.share(some_jobs(tmp_path, 4), [worker], True, quiet)
    assert (outcome.made, outcome.deaths, outcome.failed, outcome.left) == (0, 1, [], 16)
    assert outcome.lost["worker-0"].startswith("it does not start (exit status 1)")


class Scripted:
    """A worker that notes its jobs and does what it is told."""

    def __init__(self, name: str, seconds: float = 0.0, dies_after: int = 10**6) -> None:
        self.name, self.seconds, self.dies_after = name, seconds, dies_after
        self.had: list[str] = []

    def edit(self, job: jobs.Job) -> None:
        time.sleep(self.seconds)
        if len(self.had) >= self.dies_after:
            raise jobs.WorkerDied("gone")
        self.had.append(job.clip)
        job.result.mkdir(parents=True)

    def revive(self) -> bool:
        return False

    def close(self) -> None:
        pass


def test_a_clip_is_tuned_by_one_worker_and_helped_with_when_its_tuning_is_there(tmp_path: Path) -> None:
    slow, fast = Scripted("slow", 0.1), Scripted("fast", 0.01)
    todo = some_jobs(tmp_path, clips=2, edits=6)
    assert jobs.share(todo, [slow, fast], True, quiet).made == 12
    # Both clips were begun by one worker each, and the fast one helped with the other's.
    assert set(fast.had) == {"clip 0", "clip 1"} and set(slow.had) == {"clip 0"}


def test_servers_do_not_share_tunings_until_one_is_gone(tmp_path: Path) -> None:
    slow, fast = Scripted("slow", 0.05), Scripted("fast", 0.01)
    assert jobs.share(some_jobs(tmp_path / "a", 2), [slow, fast], False, quiet).made == 8
    assert set(slow.had) == {"clip 0"} and set(fast.had) == {"clip 1"}
    dying, living = Scripted("dying", 0.01, dies_after=2), Scripted("living", 0.01)
    outcome = jobs.share(some_jobs(tmp_path / "b", 2), [dying, living], False, quiet)
    assert (outcome.made, outcome.deaths, outcome.left) == (8, 1, 0)
    assert living.had.count("clip 0") == 2
    nobody = jobs.share(some_jobs(tmp_path / "c", 2), [Scripted("dying", 0, 3)], False, quiet)
    assert (nobody.made, nobody.left) == (3, 5)


INTERRUPTED = """
import sys, pathlib
sys.path.insert(0, {tests!r})
import test_dataset_runs as t
todo = t.some_jobs(pathlib.Path({folder!r}), 40)
workers = t.stand_ins(pathlib.Path({folder!r}), 2)
print("go", flush=True)
t.jobs.share(todo, workers, True, lambda *_: print(*[w.process_id for w in workers], flush=True))
"""


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Tests that a shell starts in the background ignore Ctrl-C, and so would the programs that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_end_from_outside_ends_all_workers_within_seconds(tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C ends them; a kill leaves them an input that has ended."""
    # Engine and pack are imported as the tests have them.
    script = f"sys_path = {sys.path!r}\nimport sys\nsys.path[:] = sys_path\nimport engine\nengine.load_pack()\n"
    script += INTERRUPTED.format(tests=str(ROOT / "tests"), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    # Until both work, and some edits are made.
    for line in map(str.split, process.stdout):
        children = [int(number) for number in line if number != "0"]
        if len(children) == 2 and len(list(tmp_path.glob("[0-9]*-*"))) > 2:  # whole ones, which .unfinished-* are not
            break
    process.send_signal(how)
    started = time.monotonic()
    process.wait(timeout=5)
    while any(map(is_running, children)) and time.monotonic() - started < 5:
        time.sleep(0.05)
    assert len(children) == 2 and not any(map(is_running, children))
    # Every edit on disk is whole, except for pictures that a later run removes.
    results.remove_unfinished(tmp_path)
    folders = [path for path in tmp_path.iterdir() if "-" in path.name]
    assert 3 <= len(folders) < 160 and all(len(list(folder.iterdir())) == 2 for folder in folders)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def drawn(folder: Path, split: str = "DAVIS_480p") -> list[layouts.Row]:
    """Write a clip of four frames with two edits in LOVEU-TGVE's layout, and read it."""
    clip = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), dtype=np.uint8)
    results.write_frames(folder / "data" / split / "dog", clip, ".png")
    (folder / "configs" / split).mkdir(parents=True)
    (folder / "configs" / split / "dog.yaml").write_text(
        f"train_data: {{video_path: ./data/{split}/dog, prompt: a dog}}\n"
        "validation_data: {prompts: {style: 'a dog, <b>oil</b> & ink', object: a cat}}\n"
    )
    return layouts.read_dataset(folder).rows


def study(folder: Path) -> tuple[Path, list[layouts.Row]]:
    """Lay down the sources of a study and edits that are the source but for a part."""
    rows, output = drawn(folder), folder / "out"
    for row in rows:
        sources.keep(output, row, 4, (16, 16))
        frames = results.read_frames(output / "source" / results.clip_id(row)).copy()
        frames[:, :4, :4] = 255
        results.write_frames(results.edit_folder(output, jobs.TUNED, row), frames)
    return output, rows


def test_the_submission_is_as_loveu_tgve_describes_it(tmp_path: Path) -> None:
    output, rows = study(tmp_path)
    # YOUR-TEAM-NAME_videos/DAVIS_480p/stunt/style/00000.jpg, read as the official scorer does.
    team = output / "results" / jobs.TUNED
    found = sorted(path.relative_to(team).as_posix() for path in team.rglob("*"))
    files = [f"DAVIS_480p/dog/{name}/{i:05d}.jpg" for name in ("object", "style") for i in range(4)]
    folders = ["DAVIS_480p", "DAVIS_480p/dog", "DAVIS_480p/dog/object", "DAVIS_480p/dog/style"]
    assert found == sorted(files + folders)


def test_editboards_list_names_folders_of_as_many_frames(tmp_path: Path) -> None:
    output, rows = study(tmp_path)
    results.write_frames(tmp_path / "mask", np.zeros((4, 16, 16), np.uint8), ".png")
    rows = [dataclasses.replace(rows[0], mask=tmp_path / "mask"), rows[1]]
    sources.keep(output, rows[0], 4, (16, 16))
    results.write_editboard(output, jobs.TUNED, rows)
    with (output / f"editboard-{jobs.TUNED}.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == [
        "original_video_path",
        "edited_video_path",
        "semantic_mask_path",
        "source_prompt",
        "target_prompt",
    ]
    for line in table:
        counts = {len(list((output / line[column]).iterdir())) for column in list(line)[:3] if line[column]}
        assert counts == {4}
    # Each edit has its own mask, or none.
    assert [bool(line["semantic_mask_path"]) for line in table] == [True, False]
    assert [line["target_prompt"] for line in table] == ["a dog, <b>oil</b> & ink", "a cat"]
    # The reader of that layout takes it.
    reading = layouts.read_dataset(output / f"editboard-{jobs.TUNED}.csv")
    assert len(reading.rows) == 2 and not reading.broken


def test_masks_and_frames_are_cut_alike(tmp_path: Path) -> None:
    wide = np.zeros((1, 20, 60, 3), np.uint8)
    wide[:, :, 20:40] = 255
    results.write_frames(tmp_path / "clip", wide, ".png")
    results.write_frames(tmp_path / "mask", wide[..., 0], ".png")
    assert sources.load(tmp_path / "clip", 0, 1, 0, (16, 16)).min() > 240
    mask = sources.load(tmp_path / "mask", 0, 1, 0, (16, 16), mask=True)
    assert mask.shape == (1, 16, 16) and mask.min() == 255


def test_other_systems_are_scored_by_the_same_evaluator(tmp_path: Path) -> None:
    output, rows = study(tmp_path)
    own, other = output / "results" / jobs.TUNED, tmp_path / "other"
    source = results.read_frames(output / "source" / results.clip_id(rows[0]))
    # One edit as a video of twice the size, one that is too short.
    (other / "DAVIS_480p" / "dog").mkdir(parents=True)
    large = torch.from_numpy(source.repeat(2, 1).repeat(2, 2)).float() / 255
    save_clip(large, 8, other / "DAVIS_480p" / "dog" / "style.mp4", quality=100)
    results.write_frames(other / "DAVIS_480p" / "dog" / "object", source[:3])
    systems = {jobs.TUNED: own, "other": other, "nothing": tmp_path / "nothing"}
    scored, missing = scoring.score_all(output, systems, rows, None, lambda line: None)
    assert [(each.method, each.row.name) for each in scored] == [
        (jobs.TUNED, "style"),
        (jobs.TUNED, "object"),
        ("other", "style"),
    ]
    assert missing[0] == "other: DAVIS_480p/dog/object: it has 3 frames, the source 4"
    assert sum("is not there" in line for line in missing) == 2
    by_method = {each.method: each.figures for each in scored}
    assert by_method["other"].keys() == by_method[jobs.TUNED].keys()
    # Kept scores are reused, and computed again when a picture changes.
    kept = output / "scores" / jobs.TUNED / "DAVIS_480p" / "dog" / "style.json"
    value = json.loads(kept.read_text())
    value["figures"]["WarpSSIM"] = 7.0
    kept.write_text(json.dumps(value))
    assert scoring.score_all(output, systems, rows, None, lambda line: None)[0][0].figures["WarpSSIM"] == 7
    (own / "DAVIS_480p" / "dog" / "style" / "00000.jpg").write_bytes(
        (own / "DAVIS_480p" / "dog" / "style" / "00001.jpg").read_bytes()
    )
    assert scoring.score_all(output, systems, rows, None, lambda line: None)[0][0].figures["WarpSSIM"] < 1
    text = scoring.write_tables(output, scored, {"settings": {}})
    assert f"| figure | {jobs.TUNED} | other |" in text and "| edits | 2 | 1 |" in text and "## style" in text
    with (output / "table.csv").open(newline="") as file:
        assert [line["name"] for line in csv.DictReader(file)] == ["style", "object", "style"]
    assert json.loads((output / "table.json").read_text())["summary"][0]["edits"] == 2
    with (output / "summary.csv").open(newline="") as file:
        means = list(csv.DictReader(file))
    assert {line["kind"] for line in means} == {"all", "style", "object"}
    assert set(means[0]) == {"method", "kind", "figure", "mean", "spread", "edits", "clips"}
    html = page.write(output, systems, rows, scored).read_text()
    assert "a dog, &lt;b&gt;oil&lt;/b&gt; &amp; ink" in html and "<b>" not in html
    videos = set((output / "pages" / "DAVIS_480p" / "dog").iterdir())
    for video in videos:
        assert f'src="{video.relative_to(output).as_posix()}"' in html
    # Edits may be older than the videos that they are missing in.
    alone = {jobs.TUNED: systems[jobs.TUNED]}
    page.write(output, alone, rows, [each for each in scored if each.method == jobs.TUNED])
    assert not videos & set((output / "pages" / "DAVIS_480p" / "dog").iterdir())


def scored(method: str, clip: str, kind: str, **figures: float) -> scoring.Scored:
    row = layouts.Row("s", clip, kind, kind, Path(), "source", f"{clip} {kind}")
    return scoring.Scored(method, clip, row, figures)


def test_spread_is_over_clips_since_edits_of_one_are_not_independent() -> None:
    table = scoring.summary(
        [
            scored("a", "one", "style", x=1.0, y=float("inf")),
            scored("a", "one", "object", x=3.0),
            scored("a", "two", "style", x=5.0, y=2.0),
            scored("a", "two", "object", x=7.0),
        ]
    )
    everything = next(line for line in table if line["kind"] == "all" and line["figure"] == "x")
    assert (everything["mean"], everything["edits"], everything["clips"]) == (4, 4, 2)
    assert everything["spread"] == pytest.approx(np.std([2, 6], ddof=1))
    style = next(line for line in table if line["kind"] == "style" and line["figure"] == "x")
    assert (style["mean"], style["edits"]) == (3, 2)
    endless = next(line for line in table if line["kind"] == "all" and line["figure"] == "y")
    assert (endless["mean"], endless["edits"]) == (2, 1) and np.isnan(endless["spread"])


def test_labels_of_one_edit_are_averaged_and_a_bad_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("method,video,edit,label\nm,dog,a cat,4\nm,dog,a cat,5\nm,dog,a fox,x\n")
    with pytest.raises(ValueError, match="labels.csv:4: it needs"):
        scoring.read_labels(tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_text("method,video,edit,label\nm,dog,a cat,4\nm,dog,a cat,5\n")
    assert scoring.read_labels(tmp_path / "labels.csv") == {("m", "dog", "a cat"): 4.5}


def test_rank_correlation_with_people_on_made_data() -> None:
    random_numbers = np.random.default_rng(1)
    people = {("m", f"clip{i}", f"clip{i} style"): float(i) for i in range(30)}
    made = [
        scored("m", f"clip{i}", "style", good=i**3, bad=-i, noise=random_numbers.random(), flat=1.0) for i in range(30)
    ]
    found = scoring.rank_correlation([*made, scored("m", "unknown", "style", good=0.0)], people)
    assert found["good"] == pytest.approx(1) and found["bad"] == pytest.approx(-1)
    assert abs(found["noise"]) < 0.5 and "flat" not in found


def test_tem_con_and_fram_acc_of_known_embeddings() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 3.0]])
    assert scoring.temporal_consistency(images) == pytest.approx(0.5)
    source, edit = torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0]])
    assert scoring.frame_accuracy(images, source, edit) == pytest.approx(2 / 3)


def run_study(*given: Any) -> dict[str, Any]:
    """Run the command in this process."""
    from dataset import command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(**vars(parser.parse_args([*map(str, given)])))


@pytest.mark.parametrize(
    "given",
    [
        ("--clip", "there"),
        ("--clip", "nowhere", "--clip-vision", "there"),
        ("--labels", "nowhere"),
        ("--labels", "there"),
        ("--checkpoint", "nowhere"),
        ("--also", "other=nowhere"),
        ("--also", "tune-a-video=."),
    ],
)
def test_what_is_needed_after_hours_is_asked_for_before(tmp_path: Path, given: tuple[str, ...]) -> None:
    drawn(tmp_path / "set")
    (tmp_path / "there").write_text("method,video\nm,v\n")
    there = str(tmp_path / "there")
    values = [there if value == "there" else value for value in given]
    with pytest.raises(SystemExit, match=given[0]):
        run_study(tmp_path / "set", "--output", tmp_path / "out", *values)
    assert not (tmp_path / "out" / "source").exists()


def test_an_edit_whose_sentence_has_changed_is_made_again_and_no_other(tmp_path: Path) -> None:
    from dataset import command

    output, rows = study(tmp_path)
    command._remove_changed(output, [jobs.TUNED], rows)
    assert all(results.edit_folder(output, jobs.TUNED, row).is_dir() for row in rows)
    changed = [rows[0], dataclasses.replace(rows[1], edit="a wolf")]
    command._remove_changed(output, [jobs.TUNED], changed)
    assert [results.edit_folder(output, jobs.TUNED, row).is_dir() for row in rows] == [True, False]
    command._remove_changed(output, [jobs.TUNED], changed)
    assert results.edit_folder(output, jobs.TUNED, rows[0]).is_dir()


def test_lists_that_share_a_clip_share_its_tuning_and_edits_of_one_clip_have_their_own_masks(tmp_path: Path) -> None:
    output, (row, _) = study(tmp_path)
    elsewhere = dataclasses.replace(row, split="attribute", video="dog-2", name="other")
    assert results.clip_id(elsewhere) == results.clip_id(row)
    assert results.clip_id(dataclasses.replace(row, source="a wolf")) != results.clip_id(row)
    masked = []
    for level in (0, 255):
        mask = tmp_path / f"mask-{level}"
        results.write_frames(mask, np.full((1, 16, 16), level, np.uint8), ".png")
        masked.append(dataclasses.replace(row, mask=mask, name=f"masked-{level}"))
        sources.keep(output, masked[-1], 4, (16, 16))
        frames = results.read_frames(results.edit_folder(output, jobs.TUNED, row))
        results.write_frames(results.edit_folder(output, jobs.TUNED, masked[-1]), frames)
    systems = {jobs.TUNED: output / "results" / jobs.TUNED}
    scored, missing = scoring.score_all(output, systems, [row, *masked], None, lambda line: None)
    # Only the mask that leaves something outside has figures of what lies outside.
    assert not missing and len(scored) == 3
    assert len(scored[1].figures) > len(scored[0].figures) == len(scored[2].figures)


def bench(*arguments: Any) -> list[str]:
    return [sys.executable, "-u", str(ROOT / "bench"), "dataset", *map(str, arguments)]


@pytest.mark.usefixtures("interruptible")
def test_a_study_of_the_demos_model_that_is_interrupted_ends_as_one_that_is_not(tmp_path: Path) -> None:
    """The real thing, with the fewest steps: Ctrl-C after the first edit, then the same command."""
    from dataset import drawn as drawn_clips
    from dataset.editor import Editor

    drawn_clips.write(tmp_path / "set")
    few = ("--clips", 1, "--steps", 2, "--ddim-steps", 2, "--frames", 4, "--methods", jobs.TUNED, "--threads", 1)
    whole = bench(tmp_path / "set", "--output", tmp_path / "out", *few)
    process = subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    seen = ""
    while ": made" not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    while "Interrupted" not in line:
        line = process.stdout.readline()
        assert line
    # All workers have ended by then; this process's own end is the interpreter's, which a busy machine makes slow.
    assert time.monotonic() - started < 5
    assert process.wait(timeout=60) != 0
    there = len(list((tmp_path / "out" / "results").rglob("00003.jpg")))
    assert 1 <= there < 4
    again = subprocess.run(whole, capture_output=True, text=True, check=True)
    assert f"{4 - there} edits to make, {there} are there" in again.stdout
    report = json.loads((tmp_path / "out" / "table.json").read_text())
    assert report["edits_made"] == 4 - there and not report["failed"] and not report["missing"]
    assert {line["figure"] for line in report["summary"]} >= {"frame consistency", "Fram-Acc", "WarpSSIM", "FF-beta"}
    # Another set of steps is another study.
    other = subprocess.run([*whole, "--seed", "1"], capture_output=True, text=True)
    assert other.returncode != 0 and "another folder" in other.stderr

    (row, *_), settings = layouts.read_dataset(tmp_path / "set").rows, jobs.Settings(**report["settings"])
    clip = results.clip_id(row)
    here = tmp_path / "here"
    job = jobs.Job(
        clip, jobs.TUNED, row.source, row.edit, tmp_path / "out" / "source" / clip, here / "work", here / "x"
    )
    torch.set_num_threads(1)
    Editor(settings).edit(job)
    mine, theirs = (
        results.read_frames(folder) for folder in (here / "x", results.edit_folder(tmp_path / "out", jobs.TUNED, row))
    )
    assert np.array_equal(mine, theirs)
