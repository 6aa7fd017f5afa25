"""Tables and figures: numbers unchanged, words that must stand beside them, HTML that parses, no global state."""

import importlib
import io
from base64 import b64decode
from html.parser import HTMLParser

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
from robustclip.study import Claim, Condition, Estimate, compare, judge, reported, verdict_table, wilson
from robustclip.study.evaluate import COLUMNS

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
    row |= {"eps": 0.0 if clean else 4 / 255, "n": n, "seed": 0, "accuracy": accuracy, "low": low, "high": high}
    row |= {
        "seconds": 1.5,
        "forward": 2400,
        "backward": 2000,
        "stale": False,
        "flags": "" if clean else "not audited",
        "checkpoint": "a",
        "data": "b",
        "code": "c",
    }
    return row | {"device": "cpu", "date": "2025-01-01", "commit": "d", "key": "e"} | changes


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
    """All notes of a table in one string."""
    return " ".join(table.notes)


def test_fixture_has_the_columns_of_evaluate(frame):
    assert set(frame.columns) == set(COLUMNS)


@pytest.mark.parametrize(
    ("flags", "mark", "words"),
    [
        ("passed", "", "Audit: 4 of 4 attacked numbers passed."),
        ("not audited", "", "Audit: 0 of 4 attacked numbers passed, 4 not audited."),
        ("gradients; square", " ⚑", "Audit: 0 of 4 attacked numbers passed, ⚑ flagged: gradients, square."),
        ("blind; not audited", " ⚑", "Audit: 0 of 4 attacked numbers passed, 4 not audited, ⚑ flagged: blind."),
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
    assert words.text_of("eps", 0.5) == "0.5"
    assert words.text_of("eps", np.nan) == "–"


def test_note_says_who_played_each_role_and_attack(frame):
    frame.loc[frame["dataset"] == "CIFAR100", "source"] = "hub:org/set"
    notes = text_of(report.table(frame, note="Mine."))
    assert notes.startswith("Mine. Accuracy (%) with 95 % Wilson intervals, n = 200.")
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
    with pytest.raises(ValueError, match="scale=None is not allowed"):
        report.table(frame.drop(columns="scale"))
    with pytest.raises(ValueError, match="scale=None is not allowed"):
        report.verdicts(verdict_table([judge(Claim("A", "b"))]))
    frame.loc[frame["model"] == "clip", "scale"] = "full"
    with pytest.raises(ValueError, match="full, quick; show the column 'scale'"):
        report.table(frame)
    assert report.table(frame, rows=("scale", "model", "attack")).caption.endswith("(scale: full, quick)")
    with pytest.raises(ValueError, match="drop duplicates, or filter"):
        report.table(pd.concat([frame[:1], frame[:1]]))


def test_comparison_puts_paper_reference_and_run_side_by_side(frame):
    ours = frame[(frame["dataset"] == "CIFAR10") & (frame["model"] == "clip")].replace({"PGD-20": "PGD-100"})
    ours.loc[ours["attack"] == "PGD-100", "stale"] = True
    printed = reported("mmcoa", "I").query("dataset == 'CIFAR10'")
    joined = compare(ours, printed, methods={"clip": "CLIP"})
    table = report.comparison(joined.assign(reference=50.0), ours, caption="Table I")
    assert table.caption == "Table I (scale: quick)"
    assert table.heads[-3:] == ("paper (%)", "reference (%, full)", "this run (%)")
    assert {"eps (paper)", "eps (this run)"} <= set(table.heads)
    assert not {"setting", "attacker"} & set(table.heads)
    rows = {(row[0].text, row[1].text): [entry.text for entry in row[-3:]] for row in table.rows}
    assert rows["CLIP", "PGD-100"] == ["9.32", "50.0", "4.0 [2.0, 7.7] †"]
    assert rows["CLIP", "BERT-Attack"] == ["79.74", "50.0", "–"]
    assert "tinyworld plays CIFAR10." in text_of(table)
    Page(table._repr_html_())


def test_comparison_marks_secondary_numbers_and_shows_settings_where_needed(frame):
    base = {"method": "COLA", "attack": "clean", "dataset": "CIFAR10", "ours": np.nan, "reference": np.nan}
    rows = [
        base | {"printed": 80.0 + i, "grade": grade, "setting": f"k={i}"} for i, grade in enumerate(("secondary", None))
    ]
    table = report.comparison(pd.DataFrame(rows), frame)
    assert table.heads[3] == "setting"
    assert [[entry.text for entry in row[3:]] for row in table.rows] == [
        ["k=0", "80.0 (secondary)", "–", "–"],
        ["k=1", "81.0", "–", "–"],
    ]


def test_verdicts_have_a_symbol_and_a_word():
    sure, unsure = Condition("gain", Estimate(30, 20, 40), above=10), Condition("drop", Estimate(3, 1, 5), above=10)
    tests = {"✓ reproduced": [sure], "◐ partly": [sure, unsure], "✗ not reproduced": [unsure], "○ not testable": []}
    claims = [judge(Claim(f"C{i}", "<up>", "9 %", mark="code"), parts) for i, parts in enumerate(tests.values())]
    table = report.verdicts(verdict_table(claims), scale="quick")
    assert table.caption == "Claims under test (scale: quick)"
    for row, start in zip(table.rows, tests, strict=True):
        assert row[3].text.startswith(start)
        assert row[2].text == "9 % (code)"
    assert "<up>" in [cell[2] for cell in Page(table._repr_html_()).all("td")]
    own = report.verdicts(verdict_table([judge(Claim("A1", "ours"), [sure])]), scale="quick")
    assert own.heads == ("id", "statement", "verdict", "evidence")
    with pytest.raises(ValueError, match="unknown verdict 'maybe'"):
        report.verdicts(verdict_table(claims).assign(verdict="maybe"), scale="quick")


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


def test_show_asks_for_alternative_text():
    with pytest.raises(ValueError, match="alt=' ' is not allowed"):
        report.show(report.image_grid(torch.zeros(1, 3, 8, 8)), alt=" ")


def test_show_keeps_any_picture_small():
    noise = torch.rand(6, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    shown = report.show(report.image_grid(noise, columns=3, size=2), alt="noise")
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
    shown = report.show(figure, alt="Accuracy falls")
    assert "PGD(eps=eps, steps=10) plays PGD-20" in Page(shown._repr_html_()).one("p")[2]


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
    assert picture_of(report.show(figure, alt="bars")).format == "PNG"


def test_bars_of_many_sets_have_tilted_labels(frame):
    many = pd.concat([frame[:1].assign(dataset=f"set {i}") for i in range(8)])
    (axis,) = report.bars(many, y="seconds").axes
    assert {label.get_rotation() for label in axis.get_xticklabels()} == {40}


def test_image_grid_keeps_pixels_sharp():
    checker = torch.zeros(5, 3, 8, 8)
    checker[:, :, ::2, ::2] = 1
    figure = report.image_grid(checker, titles=["a very long title indeed"] * 5, columns=3)
    assert len(figure.axes) == 6
    assert figure.axes[0].get_images()[0].get_interpolation() == "nearest"
    np.testing.assert_array_equal(figure.axes[4].get_images()[0].get_array(), checker[4].permute(1, 2, 0))
    plain = report.image_grid(checker[:1])
    colors = np.unique(np.asarray(picture_of(report.show(plain, alt="checks"))))
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
    with pytest.raises(ValueError, match="give them one"):
        report.attack_strip(clean, adversarial[:1])


# --- state ------------------------------------------------------------------------------------------------------------


def test_nothing_outside_the_style_changes(frame):
    before, color = dict(mpl.rcParams), mpl.colors.to_rgb("b")
    with report.style():
        assert mpl.rcParams["axes.prop_cycle"] == figures.LOOKS
        assert dict(mpl.rcParams) != before
    report.show(report.bars(frame[frame["attack"] == "clean"]), alt="bars")
    report.show(report.image_grid(torch.zeros(1, 3, 8, 8)), alt="black")
    assert dict(mpl.rcParams) == before
    assert mpl.colors.to_rgb("b") == color
    assert not plt.get_fignums()


def test_import_changes_no_setting():
    before = dict(mpl.rcParams)
    importlib.reload(figures)
    assert dict(mpl.rcParams) == before
