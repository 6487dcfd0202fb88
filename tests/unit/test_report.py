"""The report says what the numbers say, whatever is missing or hostile in a run directory."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import fabricate

from tailorpo.report import render, write_report
from tailorpo.report.charts import Series, line_chart, moving_average, nice_ticks, tick_text
from tailorpo.report.verdict import change, number, percent, state
from tailorpo.rundir import RunDirectory
from tailorpo.statistics import compare


def headline(folder: Path) -> str:
    page = write_report(RunDirectory(folder)).read_text()
    found = re.search(r'<h1 class="(\w+)">(.*?)</h1>', page, re.DOTALL)
    assert found
    return f"{found[1]}: {found[2]}"


@pytest.mark.parametrize(
    ("reward", "judge", "diversity", "expected"),
    [
        (1.2, 0.9, 0.95, "good: The pictures got better, and a judge that training never saw agrees."),
        (1.2, 0.9, 0.5, "caution: The pictures got better by both measures, but vary less."),
        (1.2, -0.9, 0.95, "bad: The trained reward rose, but the held-out judge finds the pictures worse."),
        (1.2, 0.02, 0.95, "caution: The trained reward rose; the held-out judge sees no clear change."),
        (1.2, None, 0.95, "caution: The trained reward rose; no independent judge was asked."),
        (0.02, 0.02, 0.95, "neutral: No clear change."),
        (0.02, -0.9, 0.95, "bad: The trained reward shows no clear change, and the held-out judge fell."),
        (-1.2, 0.9, 0.95, "bad: The trained reward fell."),
        (0.0, 0.0, 1.0, "neutral: Nothing changed: base and aligned draw the same pictures."),
    ],
)
def test_the_headline_says_no_more_than_the_intervals(
    tmp_path: Path, reward: float, judge: float | None, diversity: float, expected: str
) -> None:
    folder = fabricate(
        tmp_path, updates=3, reward_gain=reward, judge_gain=judge, diversity_ratio=diversity, pairs=False, seeds=1
    )
    assert headline(folder) == expected


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        (0.9, "good: The pictures got slightly better, and a judge that training never saw agrees."),
        (-0.9, "caution: The trained reward rose slightly; the held-out judge fell slightly."),
    ],
)
def test_a_change_that_is_small_beside_the_spread_is_called_slight(tmp_path: Path, judge: float, expected: str) -> None:
    folder = fabricate(tmp_path, updates=3, judge_gain=judge, pairs=False, seeds=1)
    evaluation = json.loads((folder / "eval.json").read_text())
    for metric in evaluation["metrics"].values():
        metric["spread"] = 20.0
    (folder / "eval.json").write_text(json.dumps(evaluation))
    assert headline(folder) == expected


def test_diversity_among_good_pictures_is_told_beside_that_of_all(tmp_path: Path) -> None:
    folder = fabricate(tmp_path, updates=3, reward_gain=1.2, judge_gain=0.9, diversity_ratio=0.5, pairs=False, seeds=1)
    evaluation = json.loads((folder / "eval.json").read_text())
    rows = evaluation["groups"]["all"]["metrics"]
    rows["distance_good"] = {**rows["distance"], "ratio": 0.97, "ratio_low": None, "ratio_high": None}
    evaluation["metrics"]["distance_good"] = evaluation["metrics"]["distance"]
    (folder / "eval.json").write_text(json.dumps(evaluation))
    page = write_report(RunDirectory(folder)).read_text()
    assert re.search(r"differ 50.% \[49.%, 50.%\] as much", page)
    assert re.search(r"Where the same noises gave both models good pictures: 97.%\.", page)


@pytest.mark.parametrize(
    ("of_it", "beyond", "headline_end"),
    [(1.04, False, "and vary less, by no more than that costs."), (0.8, True, "but vary less.")],
)
def test_diversity_is_held_against_the_base_at_the_same_judge(
    tmp_path: Path, of_it: float, beyond: bool, headline_end: str
) -> None:
    folder = fabricate(tmp_path, updates=3, reward_gain=1.2, judge_gain=0.9, diversity_ratio=0.5, pairs=False, seeds=1)
    evaluation = json.loads((folder / "eval.json").read_text())
    ends = {"low": 0.44, "high": 0.52, "of_it": of_it, "of_it_low": None, "of_it_high": None}
    evaluation["groups"]["all"]["weighted_base"] = {"share": 0.48, **ends, "effective": 2.5, "beyond": beyond}
    (folder / "eval.json").write_text(json.dumps(evaluation))
    assert headline(folder) == f"caution: The pictures got better by both measures, {headline_end}"
    page = write_report(RunDirectory(folder)).read_text()
    less = "less than " if beyond else ""
    ends = f"[{percent(0.44)}, {percent(0.52)}]"
    assert f"would keep {less}{percent(0.48)} {ends}; the aligned model keeps {percent(of_it)} of that." in page
    # A weighted base that keeps nothing gives no share.
    evaluation["groups"]["all"]["weighted_base"]["of_it"] = None
    (folder / "eval.json").write_text(json.dumps(evaluation))
    assert headline(folder) == "caution: The pictures got better by both measures, but vary less."


def test_an_interval_that_includes_zero_is_called_no_clear_change(tmp_path: Path) -> None:
    folder = fabricate(tmp_path, updates=3, reward_gain=0.02, judge_gain=0.02, pairs=False, seeds=1)
    page = write_report(RunDirectory(folder)).read_text()
    assert "The trained reward (emoji_preference) shows no clear change" in page
    assert "an interval that includes zero" in page
    row = json.loads((folder / "eval.json").read_text())["groups"]["all"]["metrics"]["reward"]
    assert row["low"] < 0 < row["high"]


def test_the_numbers_on_the_page_are_those_of_eval_json(tmp_path: Path) -> None:
    folder = fabricate(tmp_path, updates=3, pairs=False, seeds=2)
    page = write_report(RunDirectory(folder)).read_text()
    groups = json.loads((folder / "eval.json").read_text())["groups"]
    for group in ("seen", "unseen", "all"):
        for metric in ("reward", "judge"):
            assert change(groups[group]["metrics"][metric]) in page


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (([1.0, 2.0, 3.0], [2.0, 3.1, 4.0]), "up"),
        (([2.0, 3.1, 4.0], [1.0, 2.0, 3.0]), "down"),
        (([1.0, 2.0, 3.0], [1.5, 1.5, 3.1]), "flat"),
        (([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), "same"),
        (([1.0], [2.0]), "unknown"),
    ],
)
def test_states_of_intervals(values: tuple[list[float], list[float]], expected: str) -> None:
    assert state(compare(*values)) == expected


def test_numbers_are_written_for_people() -> None:
    assert number(-1234.567, digits=1, sign=True) == "\u22121,234.6"
    assert number(0.5, digits=1, sign=True) == "+0.5"
    assert number(-0.001, digits=2, sign=True) == "0.00"
    assert number(None) == number(math.nan) == "\u2013"
    row = {"base": 2.0, "difference": 0.123456, "low": 0.0912, "high": 0.1543}
    assert change(row) == "+0.123 [0.091, 0.154]"
    assert change({**row, "low": None, "high": None}) == "+0.12"  # without an interval: two digits of the level


class Outline(HTMLParser):
    """Counts what could run or reach out."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts, self.handlers, self.addresses = 0, list[str](), list[str]()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            if name.startswith("on"):
                self.handlers.append(name)
            if name in ("src", "href", "action", "data") and value and not value.startswith(("data:", "#")):
                self.addresses.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "<script>alert(1)</script><img src=http://example.org/x.png onerror=alert(2)>\"'{{ 7 * 7 }}"


def test_prompts_and_settings_are_inert(tmp_path: Path) -> None:
    folder = fabricate(tmp_path, updates=2, seen=(HOSTILE, "a cat"), unseen=(HOSTILE,), seeds=1)
    with (folder / "run.yaml").open("a") as file:
        file.write(f"# {HOSTILE}\n")
    outline = Outline()
    outline.feed(write_report(RunDirectory(folder)).read_text())
    assert (outline.scripts, outline.handlers, outline.addresses) == (1, [], [])
    assert outline.text.count(HOSTILE) >= 4  # cards, the table, the pairs, the settings: shown as it was written


def test_the_page_has_a_policy_that_forbids_the_network(tmp_path: Path) -> None:
    page = write_report(RunDirectory(fabricate(tmp_path, updates=1, seeds=1))).read_text()
    assert "default-src 'none'; img-src data:" in page
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[^\"]+|// Reads values[^\n]*", "", page))


BROKEN: dict[str, dict[str, str]] = {
    "nothing but the run file": {},
    "torn eval.json": {"eval.json": '{"schema": 1, "gro'},
    "eval.json of another version": {"eval.json": '{"schema": 99}'},
    "run.yaml that is no YAML": {"run.yaml": "a: [1, 2"},
    "torn pairs": {"samples/pairs/update-000003/pairs.json": '[{"prompt": "a'},
    "pairs of another kind": {"samples/pairs/update-000003/pairs.json": '[{"prompt": "a cat"}]'},
    "metrics with holes": {"metrics.jsonl": '{"update": 1, "loss": null, "kl": 1e999}\n{"update": 2}\n{"upda'},
}


@pytest.mark.parametrize("case", BROKEN)
def test_partial_and_damaged_runs_still_get_a_page(tmp_path: Path, case: str) -> None:
    folder = fabricate(tmp_path, updates=0, target=60, evaluated=False, pairs=False)
    for name, text in BROKEN[case].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    page = write_report(RunDirectory(folder)).read_text()
    assert "</html>" in page
    if "eval.json" in BROKEN[case]:
        assert "`" not in headline(folder)
        assert "tailorpo eval" in page


def test_lost_pictures_are_said_to_be_lost(tmp_path: Path) -> None:
    folder = fabricate(tmp_path, updates=1, seeds=2)
    base = sorted((folder / "samples" / "eval" / "base").iterdir())
    base[0].unlink()
    base[1].write_bytes(base[1].read_bytes()[:40])
    assert (
        write_report(RunDirectory(folder)).read_text().count("picture not found") == 3
    )  # the first is also at the top


def test_measures_without_a_number_are_left_out(tmp_path: Path) -> None:
    folder = fabricate(tmp_path, updates=1, seeds=1, pairs=False)
    evaluation = json.loads((folder / "eval.json").read_text())
    for group in evaluation["groups"].values():
        group["metrics"]["vendi"] = None  # one picture has no diversity
    (folder / "eval.json").write_text(json.dumps(evaluation))
    assert "Vendi" not in write_report(RunDirectory(folder)).read_text()


def test_an_interrupted_run_and_a_stale_evaluation_are_named(tmp_path: Path) -> None:
    folder = fabricate(tmp_path, updates=20, target=60, pairs=False, seeds=1)
    evaluation = json.loads((folder / "eval.json").read_text())
    (folder / "eval.json").write_text(json.dumps({**evaluation, "update": 10}))
    page = write_report(RunDirectory(folder)).read_text()
    assert "20 of 60 updates are done" in page
    assert "The evaluation is of update 10; training is at 20." in page


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    folder = fabricate(tmp_path / "run", updates=4)
    rows = RunDirectory(folder).metrics()
    assert render(folder, rows) == render(folder, rows)


def test_moving_average_against_the_definition() -> None:
    values: list[float | None] = [1.0, 5.0, None, 3.0, 7.0]
    assert moving_average(values, 3) == [3.0, 3.0, None, 5.0, 5.0]
    assert moving_average(values, 1) == values


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.just(0.0) | st.floats(1e-9, 1e6))
def test_ticks_cover_the_values_in_round_steps_and_differ(low: float, span: float) -> None:
    high = low + span
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), span)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 8
    assert len({tick_text(tick, ticks) for tick in ticks}) == len(ticks)


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


def test_a_chart_puts_values_where_its_ticks_say() -> None:
    rows = [{"update": update, "v": value} for update, value in ((1, 0.0), (2, 10.0), (3, None), (5, 5.0))]
    chart = line_chart(rows, [Series("v", "value")], title="t", smooth=False)
    assert chart
    heights = {tick.text: tick.at for tick in chart.y_ticks}
    drawn = points(chart.lines[0].raw)
    assert [y for _, y in drawn] == pytest.approx([heights["0.0"], heights["10.0"], heights["5.0"]], abs=0.06)
    steps = [b[0] - a[0] for a, b in pairwise(drawn)]
    assert steps[1] == pytest.approx(3 * steps[0], abs=0.2)  # updates 1, 2, 5
    assert chart.lines[0].raw.count("M") == 2  # a gap where there is no value
    assert line_chart([{"update": 1, "v": None}], [Series("v", "value")], title="t") is None


def test_thousands_of_updates_are_drawn_as_means() -> None:
    rows: list[dict[str, Any]] = [{"update": i, "v": float(i % 2)} for i in range(1, 4001)]
    chart = line_chart(rows, [Series("v", "value")], title="t")
    assert chart
    data = json.loads(chart.data)
    assert len(data["x"]) == 400
    assert set(data["lines"][0]["values"]) == {0.5}
