"""Evaluate votes: preference with its confidence interval, agreement of voters, and a picture."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dataset import results

from .answers import QUESTIONS
from .pairs import BROKEN

_DRAWS = 4000


def careful_voters(votes: Sequence[Mapping[str, Any]], least: float) -> tuple[set[str], dict[str, float]]:
    """Return the voters with a share of at least ``least`` of right answers in catch trials, and each one's share.

    A voter without catch trials counts as careful.
    """
    right: dict[str, list[bool]] = {vote["voter"]: [] for vote in votes}
    for vote in votes:
        if BROKEN in vote["methods"]:
            right[vote["voter"]] += [vote[question] != BROKEN for question in QUESTIONS]
    shares = {voter: statistics.fmean(answers) if answers else 1.0 for voter, answers in right.items()}
    return {voter for voter, share in shares.items() if share >= least}, shares


def preferences(votes: Sequence[Mapping[str, Any]], ours: str, seed: int = 0) -> list[dict[str, Any]]:
    """Return, for each other method and question, the share of votes for ``ours`` and its 95 % confidence interval.

    Voters and pairs are both drawn again (pigeonhole bootstrap, Owen 2007), since votes of one voter, or on one pair,
    are not independent. ``agreement``: Krippendorff's alpha of the voters. Catch trials are left out.
    """
    real = [vote for vote in votes if BROKEN not in vote["methods"] and ours in vote["methods"]]
    found = []
    for other in dict.fromkeys(name for vote in real for name in vote["methods"] if name != ours):
        mine = [vote for vote in real if set(vote["methods"]) == {ours, other}]
        for question in QUESTIONS:
            table = _table(mine, question, ours)
            low, high = confidence_interval(table, seed)
            head = {"ours": ours, "than": other, "question": question, "preferred": float(np.nanmean(table))}
            found.append(
                {
                    **head,
                    "low": low,
                    "high": high,
                    "votes": len(mine),
                    "voters": table.shape[0],
                    "pairs": table.shape[1],
                    "agreement": krippendorff_alpha(table),
                }
            )
    return found


def _table(votes: Sequence[Mapping[str, Any]], question: str, ours: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Lay votes out as [voters, pairs]: 1 for ours, 0 for the other, NaN where there is none."""
    voters = {voter: i for i, voter in enumerate(dict.fromkeys(vote["voter"] for vote in votes))}
    pairs = {pair: i for i, pair in enumerate(dict.fromkeys(vote["pair"] for vote in votes))}
    table = np.full((len(voters), len(pairs)), np.nan)
    for vote in votes:
        table[voters[vote["voter"]], pairs[vote["pair"]]] = vote[question] == ours
    return table


def confidence_interval(table: np.ndarray[Any, Any], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of [voters, pairs] (NaN: no vote), by drawing both again.

    The ends are widened to those of Wilson's interval for as many independent votes, which the bootstrap of a few
    voters falls short of: it gives 1 to 1 for votes that are all alike.
    """
    generator = np.random.default_rng(seed)
    there, votes = ~np.isnan(table), np.nan_to_num(table)
    voters, pairs = table.shape
    means = []
    for _ in range(_DRAWS):
        rows = np.bincount(generator.integers(voters, size=voters), minlength=voters)
        columns = np.bincount(generator.integers(pairs, size=pairs), minlength=pairs)
        count = rows @ there @ columns
        if count:
            means.append(float(rows @ votes @ columns) / float(count))
    low, high = np.quantile(means, [0.025, 0.975])
    wilson = wilson_interval(float(votes.sum()), int(there.sum()))
    return min(float(low), wilson[0]), max(float(high), wilson[1])


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of independent votes."""
    z = statistics.NormalDist().inv_cdf(0.975)
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return max(centre - half, 0.0), min(centre + half, 1.0)


def krippendorff_alpha(table: np.ndarray[Any, Any]) -> float | None:
    """Return Krippendorff's alpha of 0/1 votes [voters, pairs]: 1 agreement, 0 chance; None where nothing is shared.

    Pairs with one vote are left out.
    """
    there = ~np.isnan(table)
    shared = there.sum(0) >= 2
    counts, ones = there[:, shared].sum(0), np.nan_to_num(table)[:, shared].sum(0)
    total, total_ones = counts.sum(), ones.sum()
    if not total or total_ones in (0, total):
        return None
    observed = (2 * ones * (counts - ones) / (counts - 1)).sum() / total
    expected = 2 * total_ones * (total - total_ones) / (total * (total - 1))
    return float(1 - observed / expected)


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """Format preferences as a table."""
    rows = ["| than | question | preferred | 95 % interval | votes | voters | pairs | alpha |", "| --- " * 8 + "|"]
    for line in lines:
        alpha = "" if line["agreement"] is None else f"{line['agreement']:.2f}"
        shares = f"{line['preferred']:.1%} | {line['low']:.1%} to {line['high']:.1%}"
        counts = f"{line['votes']} | {line['voters']} | {line['pairs']}"
        rows.append(f"| {line['than']} | {line['question']} | {shares} | {counts} | {alpha} |")
    return "\n".join([*rows, ""])


def draw(lines: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the preferences with their intervals as a PNG, which appears when it is complete."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.45 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(lines))[::-1]
    shares = np.array([line["preferred"] for line in lines])
    ends = np.array([[share - line["low"], line["high"] - share] for share, line in zip(shares, lines, strict=True)])
    axes.barh(places, shares, color=["#1e5ab4" if line["question"] == "text" else "#5b9bd5" for line in lines])
    axes.errorbar(shares, places, xerr=ends.T.clip(min=0), fmt="none", ecolor="#222", capsize=4)
    axes.axvline(0.5, color="#888", linestyle="--")
    axes.set_yticks(places, [f"{line['question']}: than {line['than']}" for line in lines])
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"share of votes for {lines[0]['ours']}, with 95 % interval")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    results.write_whole(file, picture.getvalue())
