"""The page itself: candidates in, HTML out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from bitwright.evaluation.report import charts
from bitwright.evaluation.report.collect import layer_and_kind


@dataclass
class Candidate:
    """One checkpoint: numbers, and what there is to draw. Everything is plain JSON.

    ``row``: bits_per_weight, bytes and the measurements, as `bitwright compare` writes them.
    ``report``: quantization_report.json; ``run``: seconds, memory, command and versions;
    ``details``: what `collect` and `tokens` found. Each may be empty.
    """

    name: str
    row: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The report's lines, one per Linear."""
        rows: list[dict[str, Any]] = self.report.get("layers", [])
        return rows


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (size, loss): whether no other is at least as good in both and better in one."""
    return [
        not any(
            (a <= x and b <= y) and (a < x or b < y) for a, b in points
        )
        for x, y in points
    ]  # fmt: skip


def render(
    title: str,
    candidates: Sequence[Candidate],
    *,
    failures: Sequence[Mapping[str, Any]] = (),
    reference: Mapping[str, Any] | None = None,
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """The whole page. ``reference``: the original's bytes, perplexity and name.

    ``facts``: (name, value) pairs for the last section: command, versions, machine.
    """
    return _template().render(
        title=title,
        candidates=[_view(candidate, index) for index, candidate in enumerate(candidates)],
        overview=_overview(candidates, reference),
        positions=_positions(candidates),
        failures=failures,
        reference=reference,
        facts=facts,
        number=charts.number,
    )


@cache
def _template() -> Template:
    loader = PackageLoader("bitwright.evaluation.report", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.jinja")


def write(path: Path, page: str) -> None:
    """Write the page in one step."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def _overview(
    candidates: Sequence[Candidate], reference: Mapping[str, Any] | None
) -> Markup | None:
    points = [
        (c.name, float(c.row["bytes"]) / 1e6, float(c.row["perplexity"]))
        for c in candidates
        if c.row.get("perplexity") is not None
    ]
    if reference is not None and reference.get("perplexity") is not None:
        points.append(("16 bits", reference["bytes"] / 1e6, float(reference["perplexity"])))
    if not points:
        return None
    front = pareto([(size, loss) for _, size, loss in points])
    named = [(*point, best) for point, best in zip(points, front, strict=True)]
    return Markup(charts.scatter("pareto", named, "size, MB", "perplexity"))


def _positions(candidates: Sequence[Candidate]) -> Markup | None:
    series = [
        (c.name, [((p["first"] + p["last"]) / 2, p["mean"]) for p in c.details["positions"]])
        for c in candidates
        if c.details.get("positions")
    ]
    if not series:
        return None
    log = len(series) > 1
    return Markup(
        charts.lines("kl-position", series, "position in the window", "KL divergence", log_y=log)
    )


def _view(candidate: Candidate, index: int) -> dict[str, Any]:
    rows = candidate.rows
    measured = [row for row in rows if row.get("error") is not None]
    return {
        "id": f"candidate-{index}",
        "name": candidate.name,
        "row": candidate.row,
        "run": candidate.run,
        "plan": candidate.report.get("plan", {}),
        "notes": candidate.report.get("notes", []),
        "linears": candidate.report.get("linears", {}),
        "heat": _heat(measured, index),
        "widths": _widths(rows, index),
        "allocation": candidate.report.get("plan", {}).get("options", {}).get("allocation"),
        "measured": sorted({row["measured"] for row in measured}),
        "worst": sorted(measured, key=lambda row: -row["error"])[:8],
        "weights": [
            (w, Markup(_weight_chart(w, f"weights-{index}-{i}")))
            for i, w in enumerate(candidate.details.get("weights", []))
        ],
        "inputs": [
            (a, Markup(_input_chart(a, f"inputs-{index}-{i}")))
            for i, a in enumerate(candidate.details.get("inputs", {}).get("histograms", []))
        ],
        "outliers": _outliers(candidate, index),
        "tokens": candidate.details.get("tokens", []),
        "fallbacks": [row for row in rows if row.get("fallback")],
        "ignored": [row for row in rows if row.get("ignored")],
        "cost": _cost(candidate, index),
        "training": _training(candidate, index),
    }


def _heat(rows: Sequence[Mapping[str, Any]], index: int) -> Markup | None:
    return _per_layer(f"heat-{index}", rows, "error", "relative error")


def _widths(rows: Sequence[Mapping[str, Any]], index: int) -> Markup | None:
    """Bits per weight of every Linear, where they are not all the same."""
    known = [row for row in rows if not row.get("ignored") or row["ignored"].startswith("16 bits")]
    if len({round(row["bits_per_weight"]) for row in known}) < 2:
        return None
    return _per_layer(f"bits-{index}", known, "bits_per_weight", "bits per weight")


def _per_layer(name: str, rows: Sequence[Mapping[str, Any]], key: str, what: str) -> Markup | None:
    values: dict[tuple[str, str], float] = {}
    for row in rows:
        place = layer_and_kind(row["name"])
        values[place] = max(float(row[key]), values.get(place, 0.0))  # experts: the worst one
    if not values:
        return None
    lines = sorted({layer for layer, _ in values}, key=lambda x: int(x) if x.isdigit() else -1)
    kinds = list(dict.fromkeys(kind for _, kind in values))
    return Markup(charts.heat_map(name, lines, kinds, values, what))


def _weight_chart(weight: Mapping[str, Any], name: str) -> str:
    label = "weight in units of its scale"
    return charts.histogram(name, weight["edges"], weight["counts"], weight["grid"], label)


def _input_chart(inputs: Mapping[str, Any], name: str) -> str:
    label = "input in units of its scale" if inputs["rounded"] else "input, kept in 16 bits"
    return charts.histogram(name, inputs["edges"], inputs["counts"], inputs["grid"], label)


def _outliers(candidate: Candidate, index: int) -> dict[str, Any] | None:
    found = candidate.details.get("inputs", {}).get("outliers")
    if not found:
        return None
    series = [
        (when, [(i + 1.0, value) for i, value in enumerate(found[when])])
        for when in ("before", "after")
    ]
    chart = charts.lines(
        f"outliers-{index}", series, "channels, largest first", "largest input / median", log_y=True
    )
    return {**found, "chart": Markup(chart)}


def _training(candidate: Candidate, index: int) -> Markup | None:
    curve = candidate.report.get("training", {}).get("curve")
    if not curve:
        return None
    series = [
        ("training windows", [(float(step), loss) for step, loss, _ in curve]),
        ("held-out windows", [(float(step), held) for step, _, held in curve]),
    ]
    return Markup(charts.lines(f"training-{index}", series, "step", "KL divergence, nats"))


def _cost(candidate: Candidate, index: int) -> dict[str, Markup] | None:
    blocks = candidate.run.get("blocks")
    if not blocks:
        return None
    seconds = [(f"block {i}", float(b["seconds"])) for i, b in enumerate(blocks)]
    memory = [(float(i), b["peak_rss_bytes"] / 1e6) for i, b in enumerate(blocks)]
    return {
        "seconds": Markup(charts.bars(f"seconds-{index}", seconds, "block", "seconds")),
        "memory": Markup(
            charts.lines(f"memory-{index}", [("peak memory", memory)], "block", "peak so far, MB")
        ),
    }
