"""Tables and figures: numbers unchanged, words that must stand beside them, HTML that parses, no global state."""

import importlib
import io
import json
import math
import shutil
import subprocess
from base64 import b64decode
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robustclip import report
from robustclip.report import figures, words
from robustclip.study.claims import Claim, Condition, judge, verdict_table
from robustclip.study.evaluate import COLUMNS
from robustclip.study.reported import reported
from robustclip.study.statistics import Estimate, wilson

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VOID = ("br", "img", "meta")


class Page(HTMLParser):
    """Reads HTML into a list of (tag, attributes, text) and fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.elements = [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag):
        return [element for element in self.elements if element[0] == tag]

    def one(self, tag):
        (element,) = self.all(tag)
        return element


def result(model="clip", dataset="CIFAR10", attack="PGD-20", correct=100, n=200, **changes):
    """One row of `evaluate`."""
    clean = attack == "clean"
    accuracy, low, high = wilson(correct, n)
    played = "" if clean else "PGD(eps=0.01568627450980392, steps=10)"
    row = {"scale": "quick", "model": model, "role": dataset.lower(), "dataset": dataset, "source": "tinyworld"}
    row |= {"attack": attack, "played_by": played, "attacker": "none" if clean else "blind", "defense": "none"}
    row |= {"task": "classify", "metric": "accuracy", "eps": 0.0 if clean else 4 / 255, "n": n, "seed": 0}
    row |= {
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "distinct": np.nan,
        "prompts": np.nan,
        "seconds": 1.5,
        "forward": 2400,
    }
    row |= {"backward": 2000, "stale": False, "origin": "measured", "flags": "" if clean else "not audited"}
    row |= {"checkpoint": "a", "data": "b", "device": "cpu", "date": "2025-01-01", "commit": "d", "key": "e"}
    return row | changes


@pytest.fixture
def frame():
    """Two models on two sets, clean and attacked."""
    counts = iter((160, 8, 150, 10, 130, 90, 140, 90))
    return pd.DataFrame(
        [
            result(model, dataset, attack, next(counts))
            for model in ("clip", "TeCoA")
            for dataset in ("CIFAR10", "CIFAR100")
            for attack in ("clean", "PGD-20")
        ]
    )


def text_of(table):
    """All notes of a table in one string, the folded ones last."""
    return " ".join([*table.note.splitlines(), *table.notes]).strip()


def test_fixture_has_the_columns_of_evaluate(frame):
    assert set(frame.columns) == set(COLUMNS)


def test_intervals_say_what_stands_behind_them():
    assert words.trained(1, "9 images").endswith("over 9 images and say nothing about other trainings.")
    assert words.trained(3, "9 images") == "Intervals are a bootstrap over 3 seeds of training and 9 images."


def test_audits_counts_what_was_looked_at_and_lists_every_flag():
    frame = pd.DataFrame({"dataset": "CIFAR10", "model": ["a", "b", "c", "d"], "attack": "PGD-100"})
    frame["flags"] = ["passed", "not audited", "square; noise", ""]
    said = words.audits(frame)
    assert said.splitlines() == [
        "The audit looked at 2 of 4 attacked numbers and raised flags on 1.", "", "- CIFAR10, c, PGD-100: square, noise"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "mark", "words"),
    [
        ("passed", "", "Audit: 4 of 4 audited numbers passed."),
        ("not audited", "", "Audit: not audited."),
        ("gradients; square", " ⚑", "Audit: 0 of 4 audited numbers passed, ⚑ flagged: gradients, square."),
        ("blind; not audited", " ⚑", "Audit: not audited, ⚑ flagged: blind."),
    ],
)
def test_flags_stand_beside_the_numbers_and_in_a_note(frame, flags, mark, words):
    attacked = frame["attack"] != "clean"
    shown = report.table(frame.assign(flags=frame["flags"].where(~attacked, flags)))
    assert words in text_of(shown)
    for row in shown.rows:
        for entry in row[2:]:
            assert entry.text.endswith("]" + (mark if row[1].text != "clean" else ""))


def test_clean_numbers_need_no_audit(frame):
    assert "Audit" not in text_of(report.table(frame[frame["attack"] == "clean"]))


# --- tables -----------------------------------------------------------------------------------------------------------


def test_table_holds_the_numbers_of_the_frame(frame):
    table = report.table(frame)
    assert table.heads == ("model", "attack", "CIFAR10", "CIFAR100")
    for row in table.rows:
        for dataset, entry in zip(table.heads[2:], row[2:], strict=True):
            query = (frame["model"] == row[0].text) & (frame["attack"] == row[1].text) & (frame["dataset"] == dataset)
            record = frame[query].iloc[0]
            assert entry.sort == record["accuracy"]
            assert entry.text == f"{record['accuracy']:.1f} [{record['low']:.1f}, {record['high']:.1f}]"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=12), st.sampled_from(["range", "half", "none"]))
def test_table_of_any_counts(counts, interval):
    rows = [result(f"m{i // 3}", f"set{i % 3}", correct=count, n=100) for i, count in enumerate(counts)]
    table = report.table(pd.DataFrame(rows), rows="model", interval=interval)
    shown = [entry.sort for row in table.rows for entry in row[1:] if entry.text != "–"]
    assert shown == counts
    assert sum(len(row) - 1 for row in table.rows) - len(counts) == sum(
        entry.sort == "" for row in table.rows for entry in row
    )
    Page(table._repr_html_())


def test_table_html_is_semantic_and_escaped(frame):
    frame["model"] = frame["model"].replace("clip", '<b>&"clip"')
    page = Page(report.table(frame, caption="A < B")._repr_html_())
    assert page.one("div")[1]["class"] == "robustclip-table-wrap"
    assert [place[1]["data-label"] for place in page.all("td")[:2]] == ["CIFAR10", "CIFAR100"]
    assert "Wilson" in page.one("details")[2]
    assert page.one("summary")[2] == "Data, attack, audit"
    assert "robustclip-table" in page.one("table")[1]["class"].split()
    assert page.one("caption")[2] == "A < B (scale: quick)"
    assert [head[1]["scope"] for head in page.all("th")] == ["col"] * 4 + ["row"] * 8
    assert page.all("th")[4][2] == '<b>&"clip"'
    assert float(page.all("td")[0][1]["data-sort"]) == frame["accuracy"].iloc[0]
    assert not page.all("b")
    assert not page.all("script")


def test_table_as_text_is_markdown(frame):
    frame["model"] = frame["model"].replace("clip", "a|b")
    lines = repr(report.table(frame, best="model")).splitlines()
    assert lines[0] == "Results (scale: quick)"
    assert lines[2].startswith("| model")
    assert set(lines[3]) == {"|", "-", " "}
    assert lines[4].startswith("| a\\|b")
    assert len({len(line) for line in lines[2:8]}) == 1
    assert "**80.0 [73.9, 85.0]**" in lines[4]


def test_intervals_and_other_values(frame):
    half = report.table(frame, interval="half").rows[0][2]
    assert half.text == "80.0 ± 5.5"
    assert report.table(frame, interval="none").rows[0][2].text == "80.0"
    assert report.table(frame, value="seconds").rows[0][2].text == "1.5"
    passes = report.table(frame[frame["dataset"] == "CIFAR10"], columns=(), value="forward")
    assert passes.heads == ("model", "attack", "images forward")
    assert passes.rows[0][2].text == "2,400"
    assert passes.notes[0] == "Images forward, n = 200."


def test_best_compares_only_rivals_and_keeps_ties(frame):
    table = report.table(frame, best="model")
    assert [[entry.best for entry in row[2:]] for row in table.rows] == [
        [True, True],
        [False, False],
        [False, False],
        [True, True],
    ]
    frame.loc[frame["attack"] == "PGD-20", "accuracy"] = 30.01, 30.0, 30.04, 29.0
    best = [[entry.best for entry in row[2:]] for row in report.table(frame, best="model").rows]
    assert best[1] == [True, True]
    assert best[3] == [True, False]
    single = report.table(frame[:1], rows="model", columns=(), best="model")
    assert single.rows[0][1].best


def test_missing_results_and_missing_numbers_are_dashes(frame):
    frame.loc[0, "accuracy"] = np.nan
    table = report.table(frame.drop(index=5))
    dashes = [
        (*(entry.text for entry in row[:2]), row.index(entry))
        for row in table.rows
        for entry in row
        if not entry[0][1:]
    ]
    assert dashes == [("clip", "clean", 2), ("TeCoA", "PGD-20", 2)]


def test_stale_numbers_have_a_dagger_and_a_footnote(frame):
    assert not any("†" in entry.text for row in report.table(frame).rows for entry in row)
    frame.loc[3, "stale"] = True
    table = report.table(frame)
    assert [entry.text.endswith(" †") for row in table.rows for entry in row].count(True) == 1
    assert table.rows[1][3].text.endswith("†")
    assert table.notes[-1].startswith("† Measured with an older version")


def test_eps_is_written_in_255ths(frame):
    table = report.table(frame, rows=("attack", "eps", "model"))
    assert {row[1].text for row in table.rows} == {"0", "4/255"}
    assert table.rows[1][1].sort == 4 / 255
    assert words.text_of("eps", 0.5 / 255) == "0.5/255"
    assert words.text_of("eps", 2 / 3 / 255) == "0.6667/255"
    assert words.text_of("eps", 0.5) == "0.5"
    assert words.text_of("eps", np.nan) == "–"
    assert words.text_of("eps", "2/255") == "2/255"


def test_note_says_who_played_each_role_and_attack(frame):
    frame.loc[frame["dataset"] == "CIFAR100", "source"] = "hub:org/set"
    notes = text_of(report.table(frame, note="Mine."))
    assert notes.startswith("Mine. PGD, 10 steps, plays PGD-20. Accuracy (%) with 95 % Wilson intervals, n = 200.")
    assert "hub:org/set plays CIFAR100" in notes
    assert "Data: tinyworld plays CIFAR10;" in notes
    assert "PGD(eps=4/255, steps=10) plays PGD-20." in notes
    assert "PGD(eps=eps, steps=10)" in text_of(report.table(frame, rows=("model", "attack", "eps")))
    assert "Data: what plays the papers' names is not recorded." in text_of(report.table(frame.drop(columns="source")))
    frame.loc[0, "n"] = 1000
    assert "n = 200 to 1,000." in text_of(report.table(frame))


def test_note_says_what_the_attacker_knew(frame):
    assert "blind and aware are the same" in text_of(report.table(frame))
    assert "Attacker" not in text_of(report.table(frame[frame["attack"] == "clean"]))
    frame["defense"] = "TTC"
    assert "Attacker: blind (sees only the undefended model)." in text_of(report.table(frame))
    assert "not recorded" in text_of(report.table(frame.drop(columns="attacker")))
    frame.loc[frame["model"] == "TeCoA", "attacker"] = "aware"
    shown = text_of(report.table(frame, rows=("model", "attack", "attacker")))
    assert "aware (sees the defended model); blind (sees" in shown
    with pytest.raises(ValueError, match="aware and blind; show the column 'attacker'"):
        report.table(frame)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": "models"}, "unknown column 'models'"),
        ({"value": "recall"}, "unknown column 'recall'"),
        ({"interval": "std"}, "unknown interval 'std'"),
        ({"best": "dataset"}, "unknown best 'dataset'"),
        ({"rows": "model"}, "2 results for .*they differ in attack, attacker, eps; show that too"),
    ],
)
def test_wrong_options_are_named(frame, options, message):
    with pytest.raises(ValueError, match=message):
        report.table(frame, **options)


def test_a_number_never_stands_without_its_scale(frame):
    with pytest.raises(ValueError, match="without a column 'scale' is not allowed"):
        report.table(frame.drop(columns="scale"))
    frame.loc[frame["model"] == "clip", "scale"] = "full"
    with pytest.raises(ValueError, match="full, quick; show the column 'scale'"):
        report.table(frame)
    assert report.table(frame, rows=("scale", "model", "attack")).caption.endswith("(scale: full, quick)")
    with pytest.raises(ValueError, match="drop duplicates, or filter"):
        report.table(pd.concat([frame[:1], frame[:1]]))


@pytest.fixture
def attacked():
    """Rows of Table I, measured at scale quick on the first set only, and a larger reference."""
    played = {"PGD-100": "PGD(eps=6/255, steps=20)", "BERT-Attack": "robustclip.BertAttack(offset='shifted')"}
    run = [
        result("clip", "CIFAR10", name, count, scale="quick", eps=eps, n=100, played_by=played.get(name, ""))
        for name, count, eps in (("clean", 90, 0.0), ("PGD-100", 4, 6 / 255), ("BERT-Attack", 30, 0.0))
    ]
    run = pd.DataFrame(run).assign(distinct=[np.nan, np.nan, 7], prompts=[np.nan, np.nan, 10])
    large = run.assign(scale="full", n=300, accuracy=[91.0, 3.0, 33.0], stale=[False, True, False])
    small = large.assign(n=20, accuracy=50.0)
    other = large.assign(eps=large["eps"] / 2)[1:2].assign(accuracy=60.0)  # at half the budget: another question
    return run, pd.concat([small, other, large], ignore_index=True)


def texts(table, *names):
    """The places of the row with these names, the lines below in brackets."""
    (row,) = [row for row in table.rows if [field.text for field in row[: table.labels]] == list(names)]
    return [" ".join([field.text, *(f"({line})" for line in field.small)]) for field in row[table.labels :]]


def test_comparison_has_a_column_for_each_number(attacked):
    run, full = attacked
    printed = reported("mmcoa", "I").query("dataset == 'CIFAR10' and metric == 'accuracy'")
    references = {"photo": full.iloc[:0], "full": full}
    table = report.comparison(printed, run, references, methods={"clip": "CLIP"}, caption="Table I", note="Mine.")
    assert table.caption == "Table I, in %"
    assert report.comparison(printed, run, caption="Gaps", unit="points").caption == "Gaps, in points"
    assert table.heads == (
        *("method", "attack", "dataset", "paper", "photo", "Tinyworld (full), n = 300", "this run (quick), n = 100"),
    )
    pgd = texts(table, "CLIP", "PGD-100", "CIFAR10")
    assert pgd == ["9.32 (eps 1/255)", "due", "3.0 † ([1.6, 9.8])", "4.0 ([1.6, 9.8])"]
    assert texts(table, "CLIP", "BERT-Attack", "CIFAR10")[2].endswith("(7 of 10 texts distinct)")
    assert texts(table, "MMCoA", "clean", "CIFAR10")[1:] == ["–"] * 3  # nobody measures it
    assert table.note.splitlines()[0] == "Mine."
    assert "this run (quick): PGD, 20 steps, plays PGD-100; BertAttack, plays BERT-Attack." in table.note
    assert "tinyworld plays CIFAR10." in text_of(table)
    pages = Page(table._repr_html_()).all("td")
    assert [float(place[1]["data-sort"]) for place in pages if place[1]["data-label"] == "paper"] == list(
        printed["value"]
    )


def test_comparison_takes_the_same_cells_on_the_most_images(attacked):
    run, full = attacked
    printed = reported("mmcoa", "I").query("dataset == 'CIFAR10' and method == 'CLIP'")
    of_other_scale = {"photo": full.assign(scale="photo", eps=full["eps"] / 3)}  # its usual budget is 2/255
    for references in ({"full": full}, of_other_scale):
        table = report.comparison(printed, run, references, methods={"clip": "CLIP"})
        assert [row[4].sort for row in table.rows if row[4].text != "–"] == [3.0, 33.0, 91.0]
    both = pd.concat([run, run.assign(seed=1)])
    with pytest.raises(ValueError, match="they differ in seed"):
        report.comparison(printed, both, methods={"clip": "CLIP"})


def test_comparison_shows_what_a_reference_has_of_rows_that_the_run_has_not(attacked):
    run, full = attacked
    printed = reported("mmcoa", "I").query("method == 'MMCoA' or method == 'CLIP'")
    elsewhere = full.assign(model="tuned", role="imagenet", dataset="ImageNet", accuracy=70.0 + full.index)
    twice = full[full["attack"] == "clean"].assign(model=["tuned", "again"], role="imagenet", dataset="TinyImageNet")
    references = {"full": pd.concat([full, elsewhere, twice])}
    methods = {"clip": "CLIP", "tuned": "MMCoA", "again": "MMCoA"}
    table = report.comparison(printed, run, references, methods=methods)
    assert texts(table, "CLIP", "PGD-100", "CIFAR10")[1:] == ["3.0 † ([1.6, 9.8])", "4.0 ([1.6, 9.8])"]
    full_budget = "75.0 † ([1.6, 9.8])"
    assert texts(table, "MMCoA", "PGD-100", "ImageNet")[1:] == [full_budget, "–"]
    assert texts(table, "MMCoA", "clean", "TinyImageNet")[1] == "–"  # two cells claim the row
    assert texts(table, "MMCoA", "PGD-100+BERT-Attack", "ImageNet")[1] == "–"


def test_charts_are_drawn_from_the_first_scale_that_has_the_cells(attacked):
    run, full = attacked
    references = {"photo": full.iloc[:0], "full": full}
    found = report.counterparts(references, run)
    assert set(found["scale"]) == {"full"}
    assert len(found) == len(found.drop_duplicates(["model", "attack"])) == len(run)
    assert report.counterparts(references, run.assign(model="another")).empty
    assert list(report.counterparts({}, run).columns) == list(run.columns)


def test_comparison_knows_no_budget_of_a_scale_of_ones_own_but_the_most_frequent(attacked):
    run, full = attacked
    printed = reported("mmcoa", "I").query("dataset == 'CIFAR10' and metric == 'accuracy'")
    table = report.comparison(printed, run.assign(scale="course"), {"full": full}, methods={"clip": "CLIP"})
    usual = report.comparison(printed, run, {"full": full}, methods={"clip": "CLIP"})
    names = ("CLIP", "PGD-100", "CIFAR10")
    assert texts(table, *names) == texts(usual, *names)


def test_comparison_prints_the_best_in_bold_and_grades(attacked):
    run, _ = attacked
    printed = reported("mmcoa", "I").query("dataset == 'CIFAR10' and attack == 'clean'").assign(grade="secondary")
    printed.loc[printed.index[0], "value"] = 80.0
    table = report.comparison(printed, run, methods={"clip": "CLIP"}, best="method")
    tops = {row[0].text: row[3].best for row in table.rows if row[1].text == "clean"}
    highest = printed.loc[printed["value"].idxmax(), "method"]
    assert [name for name, best in tops.items() if best] == [highest]
    assert table.rows[0][3].text == "80.0"
    assert all("(secondary)" in row[3].small for row in table.rows if row[3].text != "–")


def test_numbers_on_logarithmic_axes_are_plain():
    figure = mpl.figure.Figure()
    figure.subplots().loglog([1, 10, 1000], [0.01, 1, 10])
    svg = report.show(figure, "a line that rises").svg
    assert ">1,000<" in svg
    assert "mathdefault" not in svg


def test_settings_say_once_what_is_the_same_at_all_scales():
    told = {("PGD", "steps"): ("100", "unknown"), ("PGD", "start"): ("–", "random")}
    same = {("PGD", "start"): "random"}
    here = {"quick": same | {("PGD", "steps"): "20"}, "full": same | {("PGD", "steps"): "100"}, "photo": same}
    here["photo"] = same | {("PGD", "steps"): "100"}
    table = report.settings(told, here, "Settings")
    rows = [[field.text for field in row] for row in table.rows]
    assert table.labels == 2
    assert rows[0] == ["PGD", "steps", "100", "unknown", "20 (Tinyworld (quick)); 100 (Tinyworld (full), photo)"]
    assert rows[1][2:] == ["–", "random", "random"]
    with pytest.raises(KeyError):
        report.settings(told, {"quick": same})


def test_listing_shows_any_frame():
    table = report.listing(pd.DataFrame({"scale": ["quick"], "n": [3]}), "Scales")
    assert table.heads == ("scale", "n")
    assert [field.sort for field in table.rows[0]] == ["quick", 3]
    assert not Page(table._repr_html_()).all("details")


def test_filters_are_marked_at_their_headings_and_have_to_be_columns():
    frame = pd.DataFrame({"paper": ["SCC"], "verdict": ["open"], "n": [3]})
    page = Page(report.listing(frame, filters=["verdict"])._repr_html_())
    assert [head[2] for head in page.all("th") if "data-filter" in head[1]] == ["verdict"]
    with pytest.raises(ValueError, match="unknown filters 'modality'; choose one of: paper, verdict, n"):
        report.listing(frame, filters=["modality"])


@pytest.mark.skipif(not CHROMIUM, reason="no browser: what the script does is not seen")
def test_select_boxes_and_text_show_the_rows_that_pass_all(tmp_path):
    frame = pd.DataFrame({"paper": ["SCC", "SCC", "COLA"], "verdict": ["open", "mixed", "open"], "n": [1, 12, 3]})
    act = """addEventListener("load", () => {
      const [paper, verdict] = document.querySelectorAll("select");
      const search = document.querySelector("input");
      const options = [...paper.options].map((one) => one.text).join();
      const said = [];
      for (const [box, value] of [[paper, "SCC"], [verdict, "open"], [paper, ""], [search, "3"], [search, ""]]) {
        box.value = value;
        box.dispatchEvent(new Event("input", { bubbles: true }));
        const left = [...document.querySelectorAll("tbody tr")].filter((row) => !row.hidden);
        said.push(left.map((row) => row.cells[2].textContent).join());
      }
      document.body.textContent = `${options} | ${said.join(" ")} | `;
    })"""
    script = (Path(__file__).parents[1] / "book/_static/tables.js").read_text(encoding="utf-8")
    table = report.listing(frame, filters=["paper", "verdict"])._repr_html_()
    (page := tmp_path / "page.html").write_text(f"{table}<script>{script}</script><script>{act}</script>")
    own = f"--user-data-dir={tmp_path / 'browser'}"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", own, "--dump-dom", page.as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    assert "all,COLA (1),SCC (2) | 1,12 1 1,3 3 1,3 | " in seen


def test_downloads_hold_the_frame():
    frame = pd.DataFrame({"claim": ['a "b", c', "é"], "value": [1.5, np.nan]})
    links = Page(report.downloads(frame, "claims")._repr_html_()).all("a")
    assert [link[1]["download"] for link in links] == ["claims.csv", "claims.json"]
    table, records = (b64decode(link[1]["href"].partition("base64,")[2]).decode() for link in links)
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(table)), frame)
    assert json.loads(records) == [{"claim": 'a "b", c', "value": 1.5}, {"claim": "é"}]


@pytest.mark.parametrize(
    ("played_by", "said"),
    [
        ("PGD(eps=0.1, steps=20)", "PGD, 20 steps"),
        ("mine.Square(queries=3)", "Square"),
        ("PGD(eps=0.1)", "PGD, 20 steps"),
        ("SepAttack(image=APGD(eps=0.1), text=BertAttack())", "SepAttack, 100 steps"),
        ("torchattacks.PGD(eps=0.1)", "PGD"),
        ("SepAttack(image=PGD(eps=0.1, steps=7), text=BertAttack())", "SepAttack, 7 steps"),
        ("", ""),
        (np.nan, ""),
    ],
)
def test_what_ran_in_short(played_by, said):
    assert words.ran(played_by) == said


# --- claims -----------------------------------------------------------------------------------------------------------


def claim(number, verdict, *conditions, counts=(1, 0, 0), ours=False, note="", **changes):
    """The rows of one claim in a frame of `verdict_table`."""
    row = {"id": number, "statement": f"<{number}> holds", "printed": "9 %", "mark": "code", "ours": ours, "note": note}
    row |= {"verdict": verdict, **dict(zip(("agree", "contradict", "open"), counts, strict=True)), "outside": 0}
    bounds = {"above": 0.0, "below": np.nan, "p": 0.01, "core": True, "reason": ""} | changes
    return [row | bounds | {"what": what, "value": value, "low": value - 2, "high": value + 2, "outcome": outcome}
            for what, value, outcome in conditions]  # fmt: skip


@pytest.fixture
def found():
    """Verdicts at two scales; the second never tested the third claim."""
    rows = claim("P-C10", "supported", ("gain, a", 30.0, "agree"), ("gain, b", 9.0, "agree"), counts=(2, 0, 0))
    rows += claim("P-C2", "contradicted", ("drop", -5.0, "contradict"), counts=(0, 1, 0))
    late = claim(
        "Q-C1", "open", ("clean", 1.0, "open"), counts=(0, 0, 1), note="9.0 times as many images would settle it"
    )
    late += claim("P-OWN", "supported", ("ours", 3.0, "agree"), ours=True)
    return {"full": pd.DataFrame(rows), "quick": pd.DataFrame(rows + late)}


def test_verdicts_show_word_counts_effect_and_evidence(found):
    shown = report.verdicts(found)
    page = Page(shown._repr_html_())
    assert [link[1]["id"] for link in page.all("a")] == ["P-C2", "P-C10", "P-OWN", "Q-C1"]
    assert page.all("th")[1][2] == "statement"
    rows = [row[2] for row in page.all("tr")]
    (line,) = [row for row in rows if row.startswith("P-C10") and "holds" in row]
    assert "✓ supported 2 agree, 0 contradict, 0 open +9.0 [+7.0, +11.0] to +30.0 [+28.0, +32.0]" in line
    assert "9 % (code)" in line
    (late,) = [row for row in rows if row.startswith("Q-C1") and "holds" in row]
    assert "due" in late
    assert "9.0 times as many images would settle it" in late
    folded = page.one("details")[2]
    assert folded.startswith("Evidence")
    assert "gain, babove 0+9.0 [+7.0, +11.0] ✓ agrees" in folded
    assert "| P-C10" in repr(shown)


def test_evidence_of_some_claims_at_every_scale(found):
    table = report.evidence(found, ["P-C10", "Q-C1"])
    rows = [[field.text for field in row] for row in table.rows]
    assert [row[:2] for row in rows] == [["P-C10", "gain, a"], ["P-C10", "gain, b"], ["Q-C1", "clean"]]
    assert rows[0][3:] == ["+30.0 [+28.0, +32.0]"] * 2
    assert rows[2][3] == "due"
    assert not report.evidence(found, []).rows
    fewer = found["full"][found["full"]["what"] != "gain, a"]  # the claim was tested there, on fewer sets
    table = report.evidence({"full": fewer, "quick": found["quick"]}, ["P-C10"])
    assert [row[3].text for row in table.rows] == ["+9.0 [+7.0, +11.0]", "–"]


def test_evidence_tells_what_decides_nothing_and_what_lies_outside():
    frame = pd.DataFrame(
        claim("A", "supported", ("side", 5.0, "agree"), core=False)
        + claim("B", "outside this world", ("floor", np.nan, "outside"), reason="no room below 2 %", note="no room")
    )
    text = repr(report.verdicts({"quick": frame}))
    assert "side (decides nothing)" in text
    assert "○ outside this world (no room below 2 %)" in text
    own = repr(report.verdicts({"quick": frame.assign(printed="")})).splitlines()[2]
    assert "printed" in text.splitlines()[2]
    assert "printed" not in own


def test_verdicts_of_many_pages_lead_to_them_and_have_one_anchor_each(found):
    two = pd.concat([found["full"].assign(page=name) for name in ("ablation", "curves")])
    links = Page(report.verdicts({"full": two})._repr_html_()).all("a")
    assert [link[1]["href"] for link in links[:2]] == ["ablation.html#P-C2", "curves.html#P-C2"]
    assert len({link[1]["id"] for link in links}) == 4


def test_verdicts_take_what_judging_makes():
    gain = Condition("gain", Estimate(30, 20, 40), above=0)
    claims = [judge(Claim("C1", "up", "9 %"), [gain]), judge(Claim("C2", "down"), outside="no room here")]
    claims += [judge(Claim("C3", "flat", ours=True), [Condition("side", Estimate(1, -4, 6), above=0)])]
    frame = verdict_table(claims)
    text = repr(report.verdicts({"quick": frame}))
    assert "✓ supported, 1 agree, 0 contradict, 0 open, +30.0 [+20.0, +40.0]" in text
    assert "○ outside this world, no room here" in text
    assert "? open, 0 agree, 0 contradict, 1 open, +1.0 [-4.0, +6.0], a distance of" in text


def test_a_claim_without_conditions_is_due_and_not_counted():
    frame = verdict_table(
        [judge(Claim("C1", "up"), [Condition("gain", Estimate(30, 20, 40), above=0)]), judge(Claim("C2", "down"))]
    )
    (line,) = [one for one in repr(report.verdicts({"quick": frame})).splitlines() if "down" in one]
    assert line.split("|")[3].strip() == "due"
    assert repr(report.answer(["It is so."], verdicts={"quick": frame})).endswith(": 1 supported")


def test_wrong_verdicts_are_named(found):
    full = found["full"]
    with pytest.raises(ValueError, match="claim 'P-C10' has 'gain, a' twice at scale full"):
        report.verdicts({"full": pd.concat([full, full])})
    with pytest.raises(ValueError, match="unknown verdict 'maybe'"):
        report.verdicts({"full": full.assign(verdict="maybe")})
    with pytest.raises(ValueError, match="no verdicts"):
        report.verdicts({"full": full.iloc[:0]})


def test_answer_comes_first_with_words_and_figure(found):
    picture = report.show(report.image_grid(torch.zeros(1, 3, 8, 8)), alt="One black image")
    shown = report.answer(["A < B.", "C."], picture, {"photo": found["full"].iloc[:0], "quick": found["quick"]})
    page = Page(shown._repr_html_())
    assert [text[2] for text in page.all("p")[:3]] == [
        "A < B.",
        "C.",
        "Tinyworld (quick): ✓ supported 2 ✗ contradicted 1 ? open 1",
    ]
    assert page.one("img")[1]["alt"] == "One black image"
    assert repr(shown).splitlines()[0] == "A < B."
    assert "[figure: One black image]" in repr(shown)
    with pytest.raises(ValueError, match="give a list"):
        report.answer("one sentence")


# --- figures ----------------------------------------------------------------------------------------------------------


def picture_of(shown):
    """The picture as a browser decodes it."""
    source = Page(shown._repr_html_()).one("img")[1]["src"]
    return Image.open(io.BytesIO(b64decode(source.split("base64,")[1])))


@pytest.fixture
def sweep():
    """Accuracy of two models against eps on two sets; one result is missing."""
    rows = [
        result(model, dataset, correct=180 - 20 * k - 30 * i, eps=k / 255, played_by=f"PGD(eps={k / 255}, steps=10)")
        for i, model in enumerate(("clip", "TeCoA"))
        for dataset in ("CIFAR10", "CIFAR100")
        for k in (4, 0, 1, 2)
    ]
    return pd.DataFrame(rows).drop(index=3)


def test_show_writes_a_small_png_with_alternative_text():
    with report.style():
        drawn = plt.figure()
        drawn.gca().plot([0, 1])
    shown = report.show(drawn, alt='A line that rises, "fast" & <straight>')
    _, attributes, _ = Page(shown._repr_html_()).one("img")
    assert attributes["alt"] == 'A line that rises, "fast" & <straight>'
    assert "max-width:100%;height:auto" in attributes["style"]
    picture = picture_of(shown)
    assert picture.format == "PNG"
    assert picture.width // 2 == int(attributes["width"])
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert len(shown._repr_html_()) < 150_000
    assert not plt.get_fignums()
    assert repr(shown) == f"[figure: {attributes['alt']}]"


@pytest.mark.parametrize("alt", [" ", "bars", "Accuracies: {'clip': 3.0} as bars"])
def test_show_asks_for_a_sentence(alt):
    with pytest.raises(ValueError, match="is not allowed; say in a sentence"):
        report.show(report.image_grid(torch.zeros(1, 3, 8, 8)), alt=alt)


def test_figures_have_a_caption_and_charts_an_svg(sweep):
    chart = report.show(report.curves(sweep, panels="dataset", title="A & B"), alt="Lines that fall with eps")
    page = Page(chart._repr_html_())
    assert page.one("figure")[1]["class"] == "robustclip-figure"
    assert page.one("figcaption")[2].startswith("A & B (scale: quick)")
    link = page.one("a")[1]
    assert link["download"] == "figure.svg"
    root = ElementTree.fromstring(unquote(link["href"].removeprefix("data:image/svg+xml,")))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "A & B (scale: quick)" in "".join(root.itertext())
    again = report.show(report.curves(sweep, panels="dataset", title="A & B"), "Lines that fall with eps", "Mine.")
    assert again.svg == chart.svg
    assert again.caption == "Mine."
    images = report.show(report.image_grid(torch.zeros(1, 3, 8, 8), titles=["star"]), alt="One black image")
    assert images.caption == "star"
    assert not Page(images._repr_html_()).all("a")


def test_every_class_on_a_page_is_known_to_the_style_sheet(found, sweep):
    figure = report.show(report.curves(sweep, panels="dataset"), alt="Lines that fall with eps")
    parts = [
        report.answer(["A."], figure, found),
        report.verdicts(found),
        report.table(sweep[:2], rows="eps"),
        report.downloads(sweep[:2], "sweep"),
    ]
    classes = {
        name
        for part in parts
        for element in Page(part._repr_html_()).elements
        for name in element[1].get("class", "").split()
        if name.startswith("robustclip-")
    }
    assert len(classes) > 8
    style = (Path(__file__).parents[1] / "book/_static/custom.css").read_text(encoding="utf-8")
    assert not {name for name in classes if f".{name}" not in style}


def boxes(axis):
    """The tick labels of an x axis as drawn: rectangles in the direction of their text."""
    found = []
    for label in (label for label in axis.get_xticklabels() if label.get_text()):
        turned = math.radians(label.get_rotation())
        x, y = label.get_transform().transform(label.get_position())
        x, y = x * math.cos(turned) + y * math.sin(turned), y * math.cos(turned) - x * math.sin(turned)
        label.set_rotation(0)
        size = label.get_window_extent()
        label.set_rotation(math.degrees(turned))
        left, top = (x - size.width, y + size.height / 2) if turned else (x - size.width / 2, y)
        found.append((left, left + size.width, top - size.height, top))
    return found


@pytest.mark.parametrize(
    ("count", "name"), [(3, "set {}"), (9, "a rather long name {}"), (40, "set {}"), (4, "word " * 9 + "{}")]
)
def test_tick_labels_never_overlap(frame, count, name):
    many = pd.concat([frame[:1].assign(dataset=name.format(i)) for i in range(count)])
    figure = report.bars(many)
    report.show(figure, alt="Bars of one height")
    drawn = boxes(figure.axes[0])
    assert len(drawn) == count
    for one, other in pairwise(drawn):
        assert not (one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3])


def test_another_run_is_drawn_faintly_over_the_reference(sweep):
    large = sweep.assign(scale="full", accuracy=sweep["accuracy"] + 5)
    first = report.curves(large, panels="dataset", overlay=sweep).axes[0]
    strong, faint = first.get_lines()[0], first.get_lines()[2]
    assert faint.get_ydata().tolist() == (strong.get_ydata() - 5).tolist()
    assert faint.get_alpha() < 0.5
    assert faint.get_color() == strong.get_color()
    one = sweep[sweep["eps"] > 3 / 255]
    chart = report.bars(one.assign(scale="full", accuracy=40.0, low=30.0, high=50.0), overlay=one)
    assert [text.get_text() for text in chart.legends[0].get_texts()] == ["clip", "TeCoA", "overlay (scale: quick)"]
    assert [line.get_ydata().tolist() for line in chart.axes[0].get_lines() if line.get_marker() == "o"] == [
        [50, 50],
        [35, 35],
    ]
    for draw in (report.bars, report.curves):
        alone = draw(one.iloc[:0], overlay=one[one["dataset"] == "CIFAR10"])
        assert alone.get_suptitle() == "(scale: quick)"


def test_forest_draws_printed_and_measured_effects():
    rows = pd.DataFrame(claim("C1", "supported", ("a", 9.0, "agree"), ("b", -3.0, "open")))
    figure = report.forest(rows.assign(claim=rows["id"], printed=[12.0, np.nan], scale="full"))
    (axis,) = figure.axes
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["a", "b", "C1"]
    points = {line.get_marker(): list(line.get_xdata()) for line in axis.get_lines()}
    assert points["o"] == [9.0, -3.0]
    assert points["D"][0] == 12.0
    spans = [bar[:, 0].tolist() for bar in axis.collections[0].get_segments()]
    assert spans == [[7.0, 11.0], [-5.0, -1.0]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["printed", "measured"]
    assert "(scale: full)" in figure.get_suptitle()
    alone = report.forest(rows.assign(claim=rows["id"], printed=np.nan, scale="full"))
    assert [text.get_text() for text in alone.legends[0].get_texts()] == ["measured"]


def test_show_keeps_any_picture_small():
    noise = torch.rand(6, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    shown = report.show(report.image_grid(noise, columns=3, size=2), alt="Six images of noise")
    assert len(shown._repr_html_()) < 150_000
    assert picture_of(shown).format == "WEBP"


def test_curves_draw_the_numbers_in_order(sweep):
    figure = report.curves(sweep, panels="dataset", title="Robustness")
    assert figure.get_suptitle() == "Robustness (scale: quick)"
    assert [axis.get_title() for axis in figure.axes] == ["CIFAR10", "CIFAR100"]
    first = figure.axes[0]
    assert first.get_xlabel() == "perturbation radius eps (1/255)"
    assert figure.get_supylabel() == "accuracy (%)"
    line = first.get_lines()[0]
    assert line.get_xdata().tolist() == pytest.approx([0, 1, 4])
    assert line.get_ydata().tolist() == [90, 80, 50]
    assert len(first.collections) == 2
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in first.get_lines()]
    assert all(one != other for one, other in zip(*looks, strict=True))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["clip", "TeCoA"]
    shown = report.show(figure, alt="Accuracy falls with eps")
    assert "PGD(eps=eps, steps=10) plays PGD-20" in Page(shown._repr_html_()).one("details")[2]


def test_curves_of_other_quantities_and_many_panels(sweep):
    sweep["steps"] = (sweep["eps"] * 255 * 10).round()
    figure = report.curves(sweep, x="steps", y="seconds", hue="model", panels="dataset")
    assert figure.axes[0].get_xlabel() == "attack steps"
    assert not figure.axes[0].collections
    many = pd.concat([sweep.assign(dataset=f"{name}{i}") for i in range(2) for name in ("a", "b")])
    four = report.curves(many.drop_duplicates(["model", "dataset", "eps"]), panels="dataset").axes
    assert [axis.get_subplotspec().get_gridspec().get_geometry() for axis in four] == [(2, 2)] * 4
    one = report.curves(sweep[sweep["dataset"] == sweep["dataset"].iloc[0]])
    assert one.axes[0].get_title() == ""
    with pytest.raises(ValueError, match="they differ in dataset"):
        report.curves(sweep)


def test_clean_images_without_eps_are_drawn_at_zero(frame):
    frame["eps"] = frame["eps"].where(frame["attack"] != "clean")
    figure = report.curves(frame, panels="dataset")
    assert figure.axes[0].get_lines()[0].get_xdata().tolist() == pytest.approx([0, 4])


def test_bars_draw_the_numbers_with_hatches(frame):
    attacked = frame[frame["attack"] == "PGD-20"].drop(index=3)
    figure = report.bars(attacked, title="PGD")
    (axis,) = figure.axes
    heights = {
        bars.get_label(): [bar.get_height() for bar in bars] for bars in axis.containers if bars.get_label()[0] != "_"
    }
    assert heights["TeCoA"] == [45, 45]
    assert heights["clip"][0] == 4
    assert np.isnan(heights["clip"][1])
    assert len({bar.get_hatch() for bar in axis.patches}) == 2
    assert [label.get_text() for label in axis.get_xticklabels()] == ["CIFAR10", "CIFAR100"]
    assert picture_of(report.show(figure, alt="Bars of two heights")).format == "PNG"


def test_bars_of_many_sets_have_tilted_labels(frame):
    many = pd.concat([frame[:1].assign(dataset=f"the long name of set {i}") for i in range(8)])
    figure = report.bars(many, y="seconds")
    report.show(figure, alt="Bars of one height")
    (axis,) = figure.axes
    assert {label.get_rotation() for label in axis.get_xticklabels()} == {40}


def test_names_may_hold_dollars_and_backslashes(frame):
    odd = frame[frame["attack"] == "clean"].assign(model=lambda rows: "$\\foo$ " + rows["model"], dataset="$\\bar")
    shown = report.show(report.bars(odd.drop_duplicates("model"), title="$\\x$"), alt="Bars of two heights")
    assert "$\\foo$ clip" in shown.svg
    images = report.image_grid(torch.zeros(1, 3, 8, 8), titles=["$\\foo$"])
    assert report.show(images, alt="One black image").data


def test_image_grid_keeps_pixels_sharp():
    checker = torch.zeros(5, 3, 8, 8)
    checker[:, :, ::2, ::2] = 1
    figure = report.image_grid(checker, titles=["a very long title indeed"] * 5, columns=3)
    assert len(figure.axes) == 6
    assert figure.axes[0].get_images()[0].get_interpolation() == "nearest"
    np.testing.assert_array_equal(figure.axes[4].get_images()[0].get_array(), checker[4].permute(1, 2, 0))
    plain = report.image_grid(checker[:1])
    colors = np.unique(np.asarray(picture_of(report.show(plain, alt="A board of checks"))))
    assert set(colors) == {0, 255}
    large = report.image_grid(torch.zeros(1, 3, 300, 600))
    assert large.axes[0].get_images()[0].get_interpolation() == "antialiased"
    box = large.axes[0].get_window_extent()
    assert box.width / box.height == pytest.approx(2)


def test_image_grid_names_wrong_input():
    with pytest.raises(ValueError, match="got 2 images and 1 titles"):
        report.image_grid(torch.zeros(2, 3, 4, 4), titles=["a"])
    with pytest.raises(ValueError, match="got 0 images"):
        report.image_grid(torch.zeros(0, 3, 4, 4))
    with pytest.raises(ValueError, match="columns=0"):
        report.image_grid(torch.zeros(2, 3, 4, 4), columns=0)
    with pytest.raises(ValueError, match="must lie in"):
        report.image_grid(torch.full((2, 3, 4, 4), 2.0))


def test_attack_strip_shows_the_change_around_gray():
    clean = torch.full((2, 3, 4, 4), 0.25)
    adversarial = clean.clone()
    adversarial[:, 0] += 8 / 255
    figure = report.attack_strip(clean, adversarial, titles=[("star", "ring"), ("disc", "star")])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:3] == ["clean: star", "change × 15 (gray = 0)", "adversarial: ring"]
    change = np.asarray(figure.axes[1].get_images()[0].get_array())
    np.testing.assert_allclose(change[0, 0], [0.5 + 15 * 8 / 255, 0.5, 0.5], atol=1e-6)
    bold = report.attack_strip(clean, adversarial, magnify=100)
    assert bold.axes[0].get_title() == "clean"
    assert np.asarray(bold.axes[1].get_images()[0].get_array()).max() == 1
    secret = report.attack_strip(clean, adversarial, hidden=True)
    kept, between, attacked = (np.asarray(axis.get_images()[0].get_array()) for axis in secret.axes[:3])
    assert (kept == 0.5).all()
    assert (attacked == 0.5).all()
    np.testing.assert_allclose(between, change)
    with pytest.raises(ValueError, match="give them one"):
        report.attack_strip(clean, adversarial[:1])


# --- state ------------------------------------------------------------------------------------------------------------


def test_nothing_outside_the_style_changes(frame):
    before, color = dict(mpl.rcParams), mpl.colors.to_rgb("b")
    with report.style():
        assert mpl.rcParams["axes.prop_cycle"] == figures.LOOKS
        assert dict(mpl.rcParams) != before
    report.show(report.bars(frame[frame["attack"] == "clean"]), alt="Bars of two heights")
    report.show(report.image_grid(torch.zeros(1, 3, 8, 8)), alt="One black image")
    assert dict(mpl.rcParams) == before
    assert mpl.colors.to_rgb("b") == color
    assert not plt.get_fignums()


def test_import_changes_no_setting():
    before = dict(mpl.rcParams)
    importlib.reload(figures)
    assert dict(mpl.rcParams) == before
