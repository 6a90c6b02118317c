"""One HTML page a day: results, training curves, code usage, rows, durations; and the results
as rows.

Everything is read from what the jobs published or noted. Knows nothing of how any of it was made.
"""

from __future__ import annotations

import datetime as dt
import io
import json
from pathlib import Path
from typing import Any

import jinja2

from leadre_lib import facts
from leadre_lib.contracts import tables
from leadre_lib.lake import Lake
from leadre_lib.release import Releases
from leadre_lib.settings import Settings

METRIC_ORDER = ("HR@1", "HR@3", "HR@5", "HR@10", "NDCG@3", "NDCG@5", "NDCG@10")


def results_table(settings: Settings, ds: dt.date, split: str = "test") -> list[dict[str, Any]]:
    """The results of a day, one row a method, our own first; empty where nothing was evaluated.

    Keys are `method`, the metrics as fractions, and `cases`.
    """
    lake = Lake(settings.lake)
    if not lake.has("metrics", ds):
        return []
    methods: dict[str, dict[str, Any]] = {}
    for row in lake.read("metrics", ds).to_pylist():
        if row["split"] == split:
            entry = methods.setdefault(row["method"], {"cases": row["cases"]})
            entry[row["metric"]] = row["value"]
    found = {metric for entry in methods.values() for metric in entry} - {"cases"}
    columns = [m for m in METRIC_ORDER if m in found] + sorted(found - set(METRIC_ORDER))
    ordered = sorted(methods, key=lambda name: (not name.startswith("leadre"), name))
    return [
        {
            "method": name,
            **{metric: methods[name].get(metric) for metric in columns},
            "cases": methods[name]["cases"],
        }
        for name in ordered
    ]


def training_curves(settings: Settings, ds: dt.date) -> str:
    """The day's losses, and HR@10 on the validation cases with the weights that were kept marked.

    Inline SVG; empty text where nothing was trained.
    """
    losses = {stage: _curve(settings, ds, stage, "loss") for stage in ("sft", "dpo")}
    panels = [(f"{stage.upper()} loss", "loss", curve) for stage, curve in losses.items() if curve]
    if not panels:
        return ""
    if validation := _curve(settings, ds, "sft", "validation"):
        panels.insert(1, ("SFT validation", "HR@10", validation))
    figure = _figure(4.2 * len(panels), 2.8)
    for place, (title, what, curve) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        steps, values = [p["step"] for p in curve], [p[what] for p in curve]
        axes.plot(steps, values, color="#2f6f9f", linewidth=1.4)
        for point in (point for point in curve if point.get("kept")):
            axes.plot(point["step"], point[what], "o", color="#a33b00")
            axes.axvline(point["step"], color="#a33b00", linewidth=0.8, linestyle="--")
        axes.set(title=title, xlabel="step", ylabel=what)
        axes.grid(alpha=0.25)
    return _svg(figure)


def kept_weights(settings: Settings, ds: dt.date) -> dict[str, Any] | None:
    """Which validated SFT weights were kept: `step`, `HR@10`, `NDCG@10`, and `validations`."""
    curve = _curve(settings, ds, "sft", "validation")
    kept = next((point for point in curve if point.get("kept")), None)
    return None if kept is None else {**kept, "validations": len(curve)}


def _curve(settings: Settings, ds: dt.date, stage: str, name: str) -> list[dict[str, Any]]:
    """What a training noted step by step; nothing where there was none."""
    path = settings.work(ds) / stage / f"{name}.json"
    points: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    return points


def code_usage_picture(usage: dict[str, Any]) -> str:
    """Used codes of each level of the Semantic IDs, as inline SVG."""
    figure = _figure(4.2, 2.4)
    axes = figure.add_subplot()
    names = [level["level"] for level in usage["levels"]]
    shares = [level["used_share"] for level in usage["levels"]]
    bars = axes.bar(names, shares, color="#2f6f9f")
    axes.bar_label(bars, [f"{lv['used']} of {lv['size']}" for lv in usage["levels"]], fontsize=8)
    axes.set(ylim=(0, 1.15), ylabel="share of codes used", xlabel="level")
    return _svg(figure)


def durations_picture(runs: dict[str, dict[str, Any]]) -> str:
    """Seconds of each job as inline SVG."""
    figure = _figure(6.4, 0.28 * len(runs) + 0.8)
    axes = figure.add_subplot()
    names = sorted(runs, key=lambda name: runs[name]["seconds"])
    bars = axes.barh(names, [runs[name]["seconds"] for name in names], color="#2f6f9f")
    axes.bar_label(bars, [f"{runs[name]['seconds']} s" for name in names], fontsize=8, padding=3)
    axes.margins(x=0.15)
    axes.set(xlabel="seconds")
    return _svg(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # half a second that only the report needs

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    sink = io.StringIO()
    # A fixed salt and no date: the same figures give the same page.
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "leadre", "svg.fonttype": "none"}):
        figure.savefig(sink, format="svg", metadata={"Date": None})
    text = sink.getvalue()
    return text[text.index("<svg") :]


def table_rows(settings: Settings, ds: dt.date) -> list[dict[str, Any]]:
    """Rows, digest and changed inputs of every table of the day."""
    lake = Lake(settings.lake)
    found = [lake.partition(name, ds) for name in tables() if lake.has(name, ds)]
    return [
        {
            "table": partition.table,
            "rows": partition.rows,
            "digest": partition.digest[:12],
            "stale": ", ".join(lake.changed_inputs(partition)),
        }
        for partition in found
    ]


def write_report(settings: Settings, ds: dt.date, notes: list[str]) -> Path:
    """Write the day's page; the path of it.

    Args:
        notes: sentences about the source, such as what is made up in it.
    """
    known, runs = facts.recorded(settings, ds), facts.runs(settings, ds)
    champion = Releases(settings.releases).champion_entry()
    folder = settings.reports(ds)
    page = _TEMPLATE.render(
        ds=ds,
        settings=settings,
        notes=notes,
        facts=known,
        runs=dict(sorted(runs.items())),
        results=results_table(settings, ds),
        valid=results_table(settings, ds, "valid"),
        champion=champion,
        tables=table_rows(settings, ds),
        curves=training_curves(settings, ds),
        kept=kept_weights(settings, ds),
        usage=code_usage_picture(known["semantic_ids"]) if "semantic_ids" in known else "",
        durations=durations_picture(runs) if runs else "",
        data_docs=_relative(settings.data_docs / "index.html", folder),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _relative(path: Path, folder: Path) -> str:
    import os

    return os.path.relpath(path, folder)


_ENVIRONMENT = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters["fraction"] = lambda v: "" if v is None else f"{v:.4f}"
_TEMPLATE = _ENVIRONMENT.from_string(
    """\
{% macro results_of(rows) %}
<table><tr>{% for head in rows[0] %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr{% if row.method.startswith("leadre") %} class="ours"{% endif %}>
{% for head, value in row.items() %}
<td>{% if head in ("method", "cases") %}{{ value }}{% else %}{{ value|fraction }}{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</table>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>LEADRE {{ settings.source }} {{ ds }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2730; max-width: 70rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block;
        overflow-x: auto; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid #dde3e8; }
th:first-child, td:first-child { text-align: left; }
th { color: #55636f; font-weight: 600; } tr.ours td { background: #eaf3fa; font-weight: 600; }
.muted { color: #55636f; } .warn { color: #a33b00; } svg { max-width: 100%; height: auto; }
code { background: #f1f4f6; padding: 0 .25rem; }
</style>
</head>
<body>
<h1>LEADRE, {{ settings.source }}, {{ ds }}</h1>
<p class="muted">engine {{ settings.engine }}, profile {{ settings.profile }};
champion of today: {{ champion.release if champion else "none yet" }};
<a href="{{ data_docs }}">Data Docs</a></p>
{% if facts.promote and facts.promote.release is defined %}
<p>Release <code>{{ facts.promote.release }}</code>
{{ "was promoted" if facts.promote.promoted else "was not promoted" }}:
{{ facts.promote.reason }}.</p>
{% else %}
<p>No model was trained on this day.</p>
{% endif %}
{% for job, fact in facts.items() if fact.failure is defined %}
<p class="warn">{{ job }} failed: {{ fact.failure }}</p>
{% endfor %}
{% for job, fact in facts.items() if fact.skipped is defined %}
<p class="warn">{{ job }} was skipped: {{ fact.skipped }}.</p>
{% endfor %}
{% if results %}
<h2>Results, test cases</h2>
{{ results_of(results) }}
<p class="muted">Fractions. Every method ranks all active marketing objects for the same cases.</p>
{% endif %}
{% if valid %}
<h2>Validation cases, which choose the champion</h2>
{{ results_of(valid) }}
{% endif %}
{% if curves %}
<h2>Training</h2>
{{ curves|safe }}
{% if kept %}
<p class="muted">SFT was validated {{ kept.validations }} times by decoding; the weights of step
{{ kept.step }} (marked) were kept: HR@10 {{ kept["HR@10"]|fraction }}, NDCG@10
{{ kept["NDCG@10"]|fraction }}.</p>
{% endif %}
{% endif %}
{% if usage %}
<h2>Semantic IDs</h2>
{{ usage|safe }}
<p>{{ facts.semantic_ids.objects }} marketing objects, {{ facts.semantic_ids.new_objects }} new,
codebook <code>{{ facts.semantic_ids.codebook }}</code>.
{{ facts.semantic_ids.collision_rate|fraction }} of them collide before the last token, at most
{{ facts.semantic_ids.largest_collision }} share their codes. Their reconstruction error is
{{ facts.semantic_ids.error }} times what it was when the codebook came into use.</p>
{% for reason in facts.semantic_ids.drift %}
<p class="warn">The codebook has drifted: {{ reason }}. The next index rebuild refreshes it.</p>
{% endfor %}
{% endif %}
<h2>Data</h2>
{% if facts.curate %}
<p>{{ facts.curate.events }} raw events: {{ facts.curate.repeated }} repeated an event id and were
dropped; quarantined: {% for reason, count in facts.curate.quarantined.items() %}
{{ count }} {{ reason }}{{ ", " if not loop.last }}{% else %}none{% endfor %}.</p>
{% endif %}
{% for failed in (facts.gate_raw or {}).get("failed", []) %}
<p class="warn">{{ failed }}</p>
{% endfor %}
<table><tr><th>table</th><th>rows</th><th>digest of the rows</th><th>inputs changed since</th></tr>
{% for row in tables %}
<tr><td>{{ row.table }}</td><td>{{ row.rows }}</td><td><code>{{ row.digest }}</code></td>
<td class="warn">{{ row.stale }}</td></tr>
{% endfor %}
</table>
{% if runs %}
<h2>Durations</h2>
{{ durations|safe }}
<table><tr><th>job</th><th>seconds</th><th>peak MiB of one process</th></tr>
{% for job, run in runs.items() %}
<tr><td>{{ job }}</td><td>{{ run.seconds }}</td><td>{{ run.peak_mib }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% if notes %}
<h2>About the data</h2>
<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
{% endif %}
</body>
</html>
"""
)
