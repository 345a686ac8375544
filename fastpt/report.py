"""The report of a run as one HTML file: curves, settings, data, samples. No scripts, nothing loaded from anywhere.

Reads run.json and history.jsonl of the run's folder, so it can be made again at any time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fastpt.config import DataConfig, build, to_json
from fastpt.console import duration, size
from fastpt.errors import ModelError
from fastpt.records import read_history

POINTS = 400  # most points of a curve; a longer one is averaged in equal pieces
Curve = tuple[str, str, list[tuple[float, float]]]  # name, CSS class, points


def write(folder: str | Path) -> Path:
    """Write report.html into a run's folder and return its path.

    Raises: ModelError when the folder holds no run.json.
    """
    from jinja2 import ChainableUndefined, Environment

    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise ModelError(f"{folder} holds no run (no run.json); give the `output` folder of fastpt.train")
    about = json.loads((folder / "run.json").read_text())
    history = read_history(folder / "history.jsonl")
    template = Environment(
        autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(TEMPLATE)
    page = template.render(
        name=folder.resolve().name,
        about=about,
        when=datetime.fromtimestamp(about["started"]).strftime("%Y-%m-%d %H:%M") if about.get("started") else "",
        tiles=tiles(about),
        charts=charts(history),
        changed=changed_settings(about.get("config", {})),
        config=json.dumps(about.get("config", {}), indent=2),
        tables=[(title, readable(about.get(key) or {})) for key, title in SECTIONS],
        samples=about.get("samples") or [],
        skipped=[record for record in history if record.get("skipped")],
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


SECTIONS = (("data", "Data"), ("metrics", "Metrics"), ("model", "Model"), ("environment", "Environment"))


def tiles(about: dict[str, Any]) -> list[tuple[str, str]]:
    """The few figures that stand first."""
    metrics, model = about.get("metrics", {}), about.get("model", {})
    found = [
        ("evaluation loss", _text(metrics.get("eval_loss"))),
        ("steps", _text(metrics.get("steps"))),
        ("tokens/s", f"{metrics['tokens_per_s']:,.0f}" if metrics.get("tokens_per_s") else ""),
        ("peak memory", size(metrics["peak_bytes"]) if metrics.get("peak_bytes") else ""),
        ("time", duration(about["seconds"]) if about.get("seconds") else ""),
        ("parameters trained", _text(model.get("trained_parameters"))),
    ]
    return [(name, value) for name, value in found if value]


def changed_settings(config: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(setting, value, default) of what differs from the defaults."""
    defaults = json.loads(to_json(build({"model": "", "data": ""})))
    defaults["data"]["path"] = defaults["model"] = None
    if config.get("eval_data"):
        defaults["eval_data"] = json.loads(DataConfig.model_validate({}).model_dump_json())
    return [(name, _text(value), _text(default)) for name, value, default in _differences(config, defaults)]


def _differences(tree: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key, value in tree.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict) and default:
            yield from _differences(value, default, f"{prefix}{key}.")
        elif value != default:
            yield f"{prefix}{key}", value, default


def readable(tree: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each entry, nested ones dotted, with bytes and seconds in their units."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            rows += [(f"{key}.{name}", text) for name, text in readable(value)]
        elif key.endswith("_bytes") and value:
            rows.append((key.replace("_bytes", " memory").replace("_", " "), size(value)))
        elif value is not None and value != []:
            rows.append((key.replace("_", " "), _text(value)))
    return rows


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 300 else f"{text[:300]}… ({len(text):,} characters)"


# ---- curves ---------------------------------------------------------------------------------------------------------


def charts(history: list[dict[str, Any]]) -> list[Any]:
    """SVGs of the reward of online RL, the loss with the evaluations, the learning rate, the gradient norm and the throughput."""

    def curve(key: str) -> list[tuple[float, float]]:
        found = [(record["step"], record[key]) for record in history if isinstance(record.get(key), (int, float))]
        return averaged([(step, value) for step, value in found if math.isfinite(value)])

    loss = curve("loss")
    reach = len(loss) // 40  # neighbours on each side
    means = [(step, _mean([y for _, y in loss[max(0, i - reach) : i + reach + 1]])) for i, (step, _) in enumerate(loss)]
    smoothed: list[Curve] = [("training", "faint", loss), ("its running mean", "first", means)]
    training: list[Curve] = smoothed if reach else [("training", "first", loss)]
    wanted: list[tuple[str, list[Curve]]] = [
        ("Reward", [("answers", "first", curve("reward")), ("evaluation", "second", curve("eval_reward"))]),
        ("Loss", [*training, ("evaluation", "second", curve("eval_loss"))]),
        ("Learning rate", [("", "first", curve("lr"))]),
        ("Gradient norm", [("", "first", curve("grad_norm"))]),
        ("Tokens per second", [("", "first", curve("tokens_per_s"))]),
    ]
    return [chart(title, curves) for title, curves in wanted if any(points for _, _, points in curves)]


def averaged(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points: each the mean of as many neighbours."""
    group = math.ceil(len(points) / POINTS) if points else 1
    pieces = [points[i : i + group] for i in range(0, len(points), group)]
    return [(_mean([x for x, _ in piece]), _mean([y for _, y in piece])) for piece in pieces]


def chart(title: str, curves: Sequence[Curve]) -> Any:
    """One SVG with axes, grid and legend; curves of up to 30 points also show their points."""
    from markupsafe import Markup, escape

    left, right, top, bottom, wide, high = 52, 14, 30, 22, 480, 230
    curves = [one for one in curves if one[2]]
    xs, ys = ([point[axis] for _, _, points in curves for point in points] for axis in (0, 1))
    y_ticks = ticks(min(ys), max(ys), 5)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[str, str]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return f"{left + across * (wide - left - right):.1f}", f"{high - bottom - up * (high - top - bottom):.1f}"

    parts = [f'<text class="title" x="{left}" y="16">{escape(title)}</text>']
    for tick in y_ticks:
        height = at(x_low, tick)[1]
        parts.append(f'<path class="grid" d="M{left} {height}H{wide - right}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{height}" text-anchor="end" dy=".32em">{tick:g}</text>')
    for tick in ticks(x_low, x_high, 6):
        if x_low <= tick <= x_high and tick == int(tick):
            parts.append(
                f'<text class="tick" x="{at(tick, y_low)[0]}" y="{high - 6}" text-anchor="middle">{tick:.0f}</text>'
            )
    names = "".join(
        f'<tspan class="legend {kind}" dx="10">● {escape(name)}</tspan>' for name, kind, _ in curves if name
    )
    parts.append(f'<text x="{wide - right}" y="16" text-anchor="end">{names}</text>')
    for _, kind, points in curves:
        path = "L".join(" ".join(at(*point)) for point in points)
        parts.append(f'<path class="curve {kind}" d="M{path}"/>')
        if len(points) <= 30:
            for x, y in points:
                px, py = at(x, y)
                parts.append(
                    f'<circle class="{kind}" cx="{px}" cy="{py}" r="2.5"><title>step {x:g}: {y:.5g}</title></circle>'
                )
    label = escape(f"{title} by step")
    return Markup(f'<svg viewBox="0 0 {wide} {high}" role="img" aria-label="{label}">{"".join(map(str, parts))}</svg>')


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at or below `low` up to `high` or just over it."""
    span = high - low if high > low else abs(low) or 1.0
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, max(last, first + 1) + 1)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ name }}: fastpt run</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #68707a; --line: #dfe3e8; --paper: #fff; --card: #f6f7f9;
  --one: #1668c7; --two: #c4520e }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #98a1ab; --line: #32383f; --paper: #15181c;
  --card: #1e2227; --one: #62a8f5; --two: #f39a5b } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1000px;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
.soft, th { color: var(--soft) } th { text-align: left; font-weight: normal }
.tiles, .charts { display: grid; gap: .8rem; margin-top: 1.2rem }
.tiles { grid-template-columns: repeat(auto-fill, minmax(145px, 1fr)) } .tiles b { display: block; font-size: 1.25rem }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)) }
.tiles div, .charts svg, .sample { background: var(--card); border-radius: 8px; padding: .6rem .8rem }
.warning { border-left: 4px solid var(--two); padding-left: .8rem }
table { border-collapse: collapse; width: 100% } td:first-child { width: 17rem }
td, th { padding: .2rem 1rem .2rem 0; vertical-align: top; border-bottom: 1px solid var(--line); overflow-wrap: anywhere }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.45 ui-monospace, monospace }
.sample { margin-bottom: .8rem } .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem; margin-top: .6rem }
svg { font-size: 11px; width: 100%; box-sizing: border-box } svg .title { font-size: 13px; font-weight: 600; fill: var(--ink) }
.tick { fill: var(--soft) } .grid { stroke: var(--line) }
.curve { fill: none; stroke: var(--one); stroke-width: 1.6; stroke-linejoin: round } .legend, circle { fill: var(--one) }
.curve.faint { opacity: .35; stroke-width: 1 } .legend.faint, circle.faint { opacity: .5 }
.curve.second { stroke: var(--two) } .legend.second, circle.second { fill: var(--two) }
</style>
<h1>{{ name }}</h1>
<div class="soft">{{ about.model.source or "a model given as an object" }},
{{ about.config.objective.name or about.config.objective }} with {{ about.config.method.name }},
{{ about.status }}{% if when %}, started {{ when }}{% endif %}</div>
<div class="tiles">
{% for name, value in tiles %}
<div><span class="soft">{{ name }}</span><b>{{ value }}</b></div>
{% endfor %}
</div>
{% if skipped %}
<h2>Skipped steps</h2>
<div class="warning">In {{ skipped | length }} of the logged steps the loss or a gradient was not finite;
the weights, or those named, stayed as they were.
<table>
{% for record in skipped[:50] %}
<tr><td>step {{ record.step }}</td><td>{{ (record.rows or record.skipped_parameters or []) | join(", ")
    or "each of its rows alone is finite" }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
<div class="charts">{% for chart in charts %}{{ chart }}{% endfor %}</div>
{% if samples %}
<h2>Samples</h2>
{% for sample in samples %}
<div class="sample"><pre>{{ sample.prompt }}</pre><div class="pair">
<div><span class="soft">before</span><pre>{{ sample.before }}</pre></div>
<div><span class="soft">after</span><pre>{{ sample.after }}</pre></div></div></div>
{% endfor %}
{% endif %}
<h2>Settings that differ from the defaults</h2>
<table><tr><th>setting<th>value<th>default</tr>
{% for name, value, default in changed %}
<tr><td>{{ name }}</td><td>{{ value }}</td><td class="soft">{{ default }}</td></tr>
{% endfor %}
</table>
<details><summary>all settings</summary><pre>{{ config }}</pre></details>
{% for title, rows in tables if rows %}
<h2>{{ title }}</h2>
<table>
{% for name, value in rows %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endfor %}
</html>
"""
