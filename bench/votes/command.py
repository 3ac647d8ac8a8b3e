"""Let people compare the edits of a study: blind pairs, the paper's two questions, on a page on this machine.

PATH is the list of edits of the study in --output (`python bench dataset`). Votes are kept as they come in
OUTPUT/votes/answers.jsonl; the same command continues. Ctrl-C ends the page and prints the result; --result prints it
alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset import command, jobs, layouts, results

from . import outcome, pairs
from .answers import Answers, read_votes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study, what is compared, and where the page is."""
    parser.add_argument("path", type=Path, metavar="PATH", help="the list of edits that the study was made from")
    parser.add_argument("--videos", type=Path, nargs="+", default=[], metavar="FOLDER", help="where clips may lie, too")
    parser.add_argument("--output", type=Path, default=command.OUTPUT, help="folder of the study")
    parser.add_argument("--ours", default=jobs.TUNED, help="the method that is compared with each other one")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME=FOLDER", help="edits of other systems")
    parser.add_argument("--catch", type=int, default=4, help="trials whose answer is known")
    parser.add_argument("--careful", type=float, default=0.75, help="least share of right answers in catch trials")
    parser.add_argument("--address", default="127.0.0.1", help="where the page is served; voters need to reach it")
    parser.add_argument("--port", type=int, default=8190)
    parser.add_argument("--result", action="store_true", help="print what the votes say and end")


def run(path: Path, videos: Sequence[Path], output: Path, **options: Any) -> dict[str, Any]:
    """Serve the page until Ctrl-C; return the result. Exits with a message where there is nothing to compare."""
    folder = output / "votes"
    if not options["result"]:
        _serve(path, videos, output, folder, options)
    return _result(folder, options["ours"], options["careful"])


def _serve(path: Path, videos: Sequence[Path], output: Path, folder: Path, options: dict[str, Any]) -> None:
    from .server import application, serve

    try:
        rows = layouts.read_dataset(path, videos).rows
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    rows = [row for row in rows if (output / "source" / results.clip_id(row)).is_dir()]
    systems = {found.name: found for found in sorted((output / "results").glob("*")) if found.is_dir()}
    systems |= dict(command.named_folder(text) for text in options["also"])
    if options["ours"] not in systems or len(systems) < 2:
        raise SystemExit(f"{output} has edits by {', '.join(systems) or 'nobody'}; two methods are needed.")
    secret = pairs.Secret(folder / "secret")
    made = pairs.make_pairs(output, rows, systems, options["ours"], options["catch"], folder / "videos")
    if not made:
        raise SystemExit("No edit was made by two methods.")
    try:
        answers = Answers(folder / "answers.jsonl")
    except (OSError, ValueError) as error:
        raise SystemExit(f"The votes cannot be opened, or another page is open on them: {error}") from error
    print(f"{len(made)} pairs, {sum(pair.is_catch for pair in made)} of them catch trials")
    print(f"http://{options['address']}:{options['port']}/  (Ctrl-C ends it)", flush=True)
    try:
        serve(application(made, answers, secret), options["address"], options["port"])
    except OSError as error:
        raise SystemExit(f"--address, --port: the page cannot be served there ({error}).") from error
    finally:
        answers.close()


def _result(folder: Path, ours: str, careful: float) -> dict[str, Any]:
    file = folder / "answers.jsonl"
    votes = read_votes(file)[0] if file.exists() else []
    kept, shares = outcome.careful_voters(votes, careful)
    lines = outcome.preferences([vote for vote in votes if vote["voter"] in kept], ours)
    report = {
        "votes": len(votes),
        "voters": len(shares),
        "careless_voters": len(shares) - len(kept),
        "preferences": lines,
    }
    print(f"{len(votes)} votes of {len(shares)} voters, {len(shares) - len(kept)} of them careless and left out")
    if lines:
        text = outcome.markdown(lines)
        print(f"\n{text}")
        results.write_whole(folder / "result.md", text)
        results.write_whole(folder / "result.json", json.dumps(report, indent=1) + "\n")
        outcome.draw(lines, folder / "result.png")
        print(f"Picture: {folder / 'result.png'}")
    return report
