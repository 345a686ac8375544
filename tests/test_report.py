"""The HTML report: complete, escaped, self-contained, and made of whatever is there."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from fastpt import report
from fastpt.config import build, to_json
from fastpt.errors import ModelError

EVIL = "<script>alert('&')</script>"


def run_folder(folder, *, steps=60, **about):
    config = build(
        {"model": "some/model", "data": "d.jsonl", "eval_data": "e.jsonl", "method.rank": 8, "optim.lr": 3e-4}
    )
    whole = {
        "config": json.loads(to_json(config)),
        "status": "finished",
        "metrics": {"eval_loss": 0.52, "tokens_per_s": 681.3, "peak_bytes": 2 << 30, "steps": steps},
        "model": {"source": "some/model", "parameters": 134515008, "trained_parameters": 4884480},
        "data": {"rows": 1400, "truncated": {"rows": 3, "tokens": 17}},
        "environment": {"torch": "2.13.0", "gpu": None},
        "started": 1.7e9,
        "seconds": 1834.2,
        **about,
    }
    (folder / "run.json").write_text(json.dumps(whole))
    records = [
        {"step": s, "loss": 3 / s, "lr": 1e-4, "grad_norm": 1.0, "tokens_per_s": 600.0} for s in range(1, steps + 1)
    ]
    records.append({"step": steps, "eval_loss": 0.5})
    (folder / "history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


class Checker(HTMLParser):
    """Tags must nest; nothing may point outside."""

    VOID = ("meta", "link", "img", "br")
    IMPLIED = ("html", "th")  # closed by the parser of a browser

    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not {"src", "href", "onload", "onclick"} & {name for name, _ in attrs}
        if tag not in (*self.VOID, *self.IMPLIED):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.IMPLIED:
            assert self.open.pop() == tag


def test_report_is_whole_and_self_contained(tmp_path):
    path = report.write(run_folder(tmp_path))
    page = path.read_text()
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert "script" not in checker.tags
    assert checker.tags.count("svg") == 4
    assert not re.search(r"https?://|url\(|@import", page)
    for text in ("0.52", "681", "2.0 GiB", "30:34", "4,884,480", "truncated.tokens", "2.13.0", "evaluation"):
        assert text in page


def test_changed_settings_only(tmp_path):
    about = json.loads((run_folder(tmp_path) / "run.json").read_text())
    changed = {name: (value, default) for name, value, default in report.changed_settings(about["config"])}
    assert changed == {
        "model": ("some/model", ""),
        "data.path": ("d.jsonl", ""),
        "eval_data.path": ("e.jsonl", ""),
        "method.rank": ("8", "16"),
        "optim.lr": ("0.0003", ""),
    }


def test_every_text_is_escaped(tmp_path):
    folder = run_folder(
        tmp_path,
        samples=[{"prompt": EVIL, "before": EVIL, "after": EVIL}],
        environment={EVIL: EVIL},
        model={"source": EVIL},
        data={"rows": EVIL},
        config={"model": EVIL, "method": {"name": EVIL}, "objective": EVIL},
        status=EVIL,
    )
    with (folder / "history.jsonl").open("a") as file:
        file.write(json.dumps({"step": 61, "loss": float("nan"), "skipped": True, "rows": [EVIL]}) + "\n")
    page = report.write(folder).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert") >= 9
    assert "step 61" in page


def test_a_bare_run_makes_a_report(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "history.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "lo'
    )  # the last line was cut by a crash
    page = report.write(tmp_path).read_text()
    assert page.count("<svg") == 1


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ModelError, match="holds no run"):
        report.write(tmp_path)


def test_curves_stay_inside_the_chart_and_skip_what_is_not_finite():
    history = [{"step": s, "loss": v} for s, v in enumerate([2.0, float("nan"), float("inf"), -1.0, 1e-9, 7.5], 1)]
    (svg,) = report.charts(history)
    assert "nan" not in svg
    assert "inf" not in svg
    coordinates = [float(y) for y in re.findall(r'c[y]="([-\d.]+)"', svg)]
    assert coordinates
    assert all(0 <= y <= 230 for y in coordinates)


def test_a_long_history_is_averaged():
    points = report.averaged([(float(s), 1.0 if s % 2 else 3.0) for s in range(10000)])
    assert len(points) <= report.POINTS
    assert points[0][0] == pytest.approx(12.0)
    assert all(1.9 < y < 2.1 for _, y in points)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.37, 2.91), (-3.0, 14.0), (5.0, 5.0), (0.0, 0.0), (1e-5, 3e-4), (1, 40000)]
)
def test_ticks_are_round_and_cover_the_range(low, high):
    found = report.ticks(low, high, 5)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 9
    steps = [b - a for a, b in pairwise(found)]
    assert max(steps) == pytest.approx(min(steps))
