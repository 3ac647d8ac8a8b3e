"""From rows of measured edits to means, differences, what repeats, and tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import paired
import study
from paired import Repeats
from study import MEASURES

Row = Mapping[str, Any]
FULL = study.FULL.name
# (ablation, method, measures in which the ablation must be worse), from the paper's section 5.3 and figure 8.
Claim = tuple[str, str, tuple[str, ...]]
_LOOKS, _MOTION = ("look agreement", "look distance"), ("path, px off", "minus end-point error, px")
CLAIMS: tuple[Claim, ...] = (
    ("without ST-Attn", FULL, _LOOKS),
    ("neither inversion nor ST-Attn", "without inversion", _LOOKS),
    ("without inversion", FULL, _MOTION),
    ("without tuning", FULL, (*_MOTION, "all right")),
    ("frame by frame", FULL, _LOOKS),
)
# Looked at where nothing is claimed beforehand; each one more costs power.
LOOKED_AT = (
    "edit right",
    "all right",
    "look agreement",
    "look distance",
    "path, px off",
    "background loss, dB",
    "minus end-point error, px",
    "warp error",
)
# Measure of the full method, its kind of edits or "" for all, the side on which there is something to gain, the bound.
_HEADROOM = (
    ("background loss, dB", "", "at least", 3.0),
    ("look agreement", "", "at most", 0.9),
    ("only one of two", "", "at most", 0.7),
    ("opposite hue", "", "at most", 0.95),
    ("occlusion kept", "", "at most", 0.95),
    ("edit right", "accessory", "at most", 0.95),
    ("edit right", "remove", "at most", 0.95),
)
_PRESET = "preset: "
_SUITING_PRESET = "preset of the kind"


def with_all_seeds(rows: Sequence[Row], unseeded: set[str], seeds: int) -> list[Row]:
    """Repeat the rows of methods that draw nothing for every seed, and sum up the presets as one method."""
    same = [row for row in rows if row["method"] in unseeded]
    every = [*rows, *({**row, "seed": seed} for seed in range(1, seeds) for row in same)]
    return every + [{**row, "method": _SUITING_PRESET} for row in every if row["method"].startswith(_PRESET)]


def by_clip(rows: Sequence[Row], method: str, measure: str) -> dict[str, float]:
    """Return a method's mean of each clip, over its edits and seeds that have the measure."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["method"] == method and row[measure] is not None:
            found.setdefault(row["clip"], []).append(row[measure])
    return {clip: statistics.fmean(values) for clip, values in found.items()}


def summary(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Return, by method and measure, mean and standard error over the clips, and their number."""
    found: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        found[method] = {}
        for measure in MEASURES:
            values = list(by_clip(rows, method, measure).values())
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            mean = statistics.fmean(values) if values else None
            found[method][measure] = {"mean": mean, "error": error, "n": len(values)}
    return found


def claims(rows: Sequence[Row], claimed: Sequence[Claim] = CLAIMS) -> list[dict[str, Any]]:
    """Test what is claimed: by how much each ablation is worse than the method that it is held against, one-sided."""
    asked = [(*pair, measure) for *pair, measures in claimed for measure in measures]
    tested = [(one, than, measure, _differences(rows, than, one, measure)) for one, than, measure in asked]
    return _corrected(tested, "greater")


def explore(rows: Sequence[Row], measures: Sequence[str] = LOOKED_AT) -> list[dict[str, Any]]:
    """Hold every method against the full one, two-sided: "by" above 0 where the full method is better."""
    others = [method for method in dict.fromkeys(row["method"] for row in rows) if method != FULL]
    tested = [(one, FULL, measure, _differences(rows, FULL, one, measure)) for one in others for measure in measures]
    plain, injected = (FULL, "without ST-Attn"), [method.name for method in study.INJECTED]
    if {*plain, *injected} <= set(others) | {FULL}:
        for measure in measures:
            gain, gain_without = (
                _differences(rows, injected[index], plain[index], measure) for index in range(len(plain))
            )
            both = {clip: gain[clip] - gain_without[clip] for clip in gain.keys() & gain_without.keys()}
            tested.append(("injection's gain without ST-Attn", "its gain with ST-Attn", measure, both))
    return _corrected(tested, "two-sided")


def _differences(rows: Sequence[Row], better: str, worse: str, measure: str) -> dict[str, float]:
    """Return the mean difference of each clip, above 0 where ``better`` is; of rows that both methods have."""
    sign = 1.0 if MEASURES[measure] == "larger" else -1.0
    values: dict[str, dict[tuple[int, str], float]] = {better: {}, worse: {}}
    clips: dict[str, list[float]] = {}
    for row in rows:
        if row["method"] in values and row[measure] is not None:
            values[row["method"]][row["clip"], row["seed"], row["edit"]] = row[measure]
    for place in values[better].keys() & values[worse].keys():
        clips.setdefault(place[0], []).append(sign * (values[better][place] - values[worse][place]))
    return {clip: statistics.fmean(found) for clip, found in sorted(clips.items())}


def _corrected(tested: Sequence[tuple[str, str, str, dict[str, float]]], side: paired.Side) -> list[dict[str, Any]]:
    """Test differences, and correct for all of them together. One that no clip has is left out."""
    known = [(*names, paired.difference(list(values.values()), side)) for *names, values in tested if values]
    corrected = paired.holm([found.p for *_, found in known])
    return [
        {
            "method": one,
            "than": than,
            "measure": measure,
            "by": found.mean,
            "standard_error": found.error,
            "n": found.n,
            "p": found.p,
            "p_corrected": p,
            "significant": p is not None and p <= paired.LEVEL,
        }
        for (one, than, measure, found), p in zip(known, corrected, strict=True)
    ]


def failed(found: Sequence[Mapping[str, Any]], claimed: Sequence[Claim]) -> list[str]:
    """Return the claims that do not hold: not significant, or without a measurement on enough clips."""
    held = {(one["method"], one["measure"]) for one in found if one["significant"] and one["by"] > 0}
    return [
        f"{one} is not worse than {than} in {measure}"
        for one, than, measures in claimed
        for measure in measures
        if (one, measure) not in held
    ]


def repeats(rows: Sequence[Row]) -> dict[str, Repeats]:
    """Return for each measure how well the order of all methods agrees between halves of the clips."""
    methods = list(dict.fromkeys(row["method"] for row in rows if not row["method"].startswith(_PRESET)))
    found = {m: paired.repeats({method: by_clip(rows, method, m) for method in methods}) for m in MEASURES}
    return {measure: tau for measure, tau in found.items() if tau is not None}


def headroom(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Say where the full method leaves something to gain."""
    found = []
    for measure, kind, side, bound in _HEADROOM:
        values = by_clip([row for row in rows if kind in ("", row["edit"])], FULL, measure)
        if values:
            mean = statistics.fmean(values.values())
            left = mean >= bound if side == "at least" else mean <= bound
            name = f"{measure} ({kind})" if kind else measure
            found.append(
                {"measure": name, "mean": mean, "n": len(values), "asked": f"{side} {bound:g}", "is there": left}
            )
    return found


def table(report: Mapping[str, Any]) -> str:
    """Return a report as Markdown."""
    clips, kinds, settings = report["clips"], report["kinds"], report["settings"]
    lines = [
        f"{len(clips)} clips ({', '.join(clips)}) x {report['seeds']} seeds; edits: {', '.join(kinds)}.",
        ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in settings.items()) + ".",
        "Mean (standard error over clips).",
        "",
        *_summary_lines(report["summary"]),
        "",
        "Edit right, by kind of edit.",
        "",
        *markdown_table(
            ["method", *kinds], [[name, *_kind_cells(by_kind, kinds)] for name, by_kind in report["by_kind"]]
        ),
    ]
    if report["differences"]:
        head = ["method", "than", "is worse in", "by (standard error)", "clips", "p", "p corrected", "significant"]
        lines += [
            "",
            f"Paired t-test over clips, {report['side']}; Holm's correction over the "
            f"{sum(one['p'] is not None for one in report['differences'])} differences of this table.",
            "",
            *markdown_table(head, [_difference_cells(one) for one in report["differences"]]),
        ]
    if report["repeats"]:
        found = [[name, f"{tau.mean:.2f}", f"{tau.least:.2f}"] for name, tau in report["repeats"].items()]
        halvings = next(iter(report["repeats"].values())).halvings
        head = ["order of the methods by", "mean", "least"]
        lines += [
            "",
            f"Kendall's tau between two halves of the clips, {halvings} halvings.",
            "",
            *markdown_table(head, found),
        ]
    if report["headroom"]:
        cells = [
            [one["measure"], _number(one["mean"]), one["n"], one["asked"], "yes" if one["is there"] else "no"]
            for one in report["headroom"]
        ]
        lines += ["", f"What the {FULL} leaves to gain.", ""]
        lines += markdown_table(["measure", "mean", "clips", "asked", "is there"], cells)
    return "\n".join(lines) + "\n"


def _summary_lines(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    names = [name for name in MEASURES if any(values[name]["n"] for values in found.values())]
    counts = {name: max(values[name]["n"] for values in found.values()) for name in names}
    head = ["method", *(f"{name} (n = {counts[name]})" for name in names)]
    cells = [[method, *(_mean_cell(values[name]) for name in names)] for method, values in found.items()]
    return markdown_table(head, cells)


def _mean_cell(found: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return ""
    return _number(found["mean"]) + ("" if found["error"] is None else f" ({_number(found['error'])})")


def _kind_cells(by_kind: Mapping[str, float | None], kinds: Sequence[str]) -> list[str]:
    values = [by_kind.get(kind) for kind in kinds]
    return ["" if value is None else _number(value) for value in values]


def _difference_cells(found: Mapping[str, Any]) -> list[str]:
    error = "" if found["standard_error"] is None else f" ({_number(found['standard_error'])})"
    p, corrected = ("" if value is None else f"{value:.2g}" for value in (found["p"], found["p_corrected"]))
    verdict = "too few clips" if found["p"] is None else ("yes" if found["significant"] else "no")
    names = [found["method"], found["than"], found["measure"]]
    return [*names, _number(found["by"]) + error, str(found["n"]), p, corrected, verdict]


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def markdown_table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    rule = ["---"] * len(head)
    return [f"| {' | '.join(map(str, cells))} |" for cells in (head, rule, *rows)]


def by_kind(rows: Sequence[Row], measure: str = "edit right") -> list[tuple[str, dict[str, float | None]]]:
    """Return each method's mean of a measure by kind of edit."""

    def mean(method: str, kind: str) -> float | None:
        values = by_clip([row for row in rows if row["edit"] == kind], method, measure)
        return statistics.fmean(values.values()) if values else None

    kinds = dict.fromkeys(row["edit"] for row in rows)
    methods = dict.fromkeys(row["method"] for row in rows)
    return [(method, {kind: mean(method, kind) for kind in kinds}) for method in methods]
