"""The claims ledger: every claim of a paper once per world, with what is known of it, due or judged."""

import re

import pandas as pd
import pytest
from bs4 import BeautifulSoup

from robustclip import report, study
from robustclip.study import Claim, Condition, Estimate, judge, keep_verdicts
from robustclip.study.ledger import KNOWING, PARTS, WORST, known_claims, ledger, verdict_rows
from robustclip.study.provenance import ROOT
from robustclip.study.reported import reported

RESULTS = ROOT.parent.parent / "results"
BOOK = ROOT.parent.parent / "book"
shipped = pytest.mark.skipif(not RESULTS.is_dir(), reason="no checkout: nothing is shipped")


@pytest.fixture(scope="module")
def everything():
    """The verdicts that are shipped at all scales."""
    return pd.concat([verdict_rows(path.name) for path in sorted(RESULTS.iterdir()) if path.is_dir()])


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A function that keeps verdicts of a page, shipped or found here; nothing else is known."""
    places = {True: tmp_path / "results", False: tmp_path / "runs"}
    monkeypatch.setenv("ROBUSTCLIP_RESULTS", str(places[True]))
    monkeypatch.setenv("ROBUSTCLIP_RUNS", str(places[False]))
    monkeypatch.delenv("ROBUSTCLIP_FRESH", raising=False)

    def keep(names, scale, page, *effects, what="effect {}", ship=True, **changes):
        conditions = [
            Condition(what.format(i), Estimate(value, value - 1, value + 1), above=0) for i, value in enumerate(effects)
        ]
        claims = [Claim(name, f"What {name} says.", **changes) for name in names.split()]
        places[ship].mkdir(exist_ok=True)
        keep_verdicts([judge(claim, conditions) for claim in claims], scale, page, places[ship])

    return keep


def row_of(frame, name, scale):
    (row,) = frame[(frame["id"] == name) & (frame["scale"] == scale)].to_dict("records")
    return row


@shipped
def test_every_claim_of_a_paper_is_described(everything):
    claims = everything[~everything["ours"].astype(bool)]
    known = known_claims()
    assert set(claims["id"]) <= set(known)
    for name in set(known) - set(claims["id"]):
        assert known[name]["why"], name
        assert known[name]["statement"], name
    assert not set(known) & set(everything[everything["ours"].astype(bool)]["id"])


@shipped
def test_facts_are_of_the_words_that_they_may_be(everything):
    knowing = everything[(everything["id"] == KNOWING) & everything["what"].str.endswith(WORST)]
    for name, facts in known_claims().items():
        assert {"paper", "modality", "attacker", "where"} <= set(facts), name
        allowed = {"paper", "modality", "attacker", "where", "defense", "statement", "printed", "mark", "page", "why"}
        assert set(facts) <= allowed, name
        assert facts["modality"] in ("image", "text", "multimodal", "none"), name
        assert facts["attacker"] in ("blind", "aware", "both", "none"), name
        if "defense" in facts:
            assert facts["attacker"] == "blind", name
            assert facts["defense"] + WORST in set(knowing["what"]), name


@shipped
def test_every_part_and_page_is_there():
    assert {path.name for path in RESULTS.glob("*/verdicts/*")} <= set(PARTS)
    links = {link for link in ledger(["photo", "full", "quick"])["link"] if link}
    assert links
    for link in links:
        assert (BOOK / link.partition(".html")[0]).with_suffix(".ipynb").is_file(), link


@shipped
def test_one_row_per_claim_and_scale(everything):
    frame = ledger(["photo", "full"])
    assert not frame.duplicated(["scale", "id", "page"]).any()
    assert not frame[~frame["ours"]].duplicated(["scale", "id"]).any()
    judged = everything.drop_duplicates(["page", "id"])
    assert len(frame) == 2 * len(set(judged["id"]) | set(known_claims()))
    assert (frame["statement"] != "").all()


def test_printed_numbers_of_claims_without_a_page_are_those_of_the_file():
    values = {f"{value:.2f}" for value in reported("multimodal-attacks")["value"]}
    for name in ("MMA-C1", "MMA-C2", "MMA-C3", "MMA-C4"):
        numbers = re.findall(r"\d+\.\d\d", known_claims()[name]["printed"])
        assert numbers
        assert set(numbers) <= values


def test_effects_and_counts_are_those_of_the_verdict(small):
    small("COLA-C1", "photo", "cola/results", 7.0, 3.0, 5.0, printed="46.2")
    row = row_of(ledger(), "COLA-C1", "photo")
    assert (row["verdict"], row["agree"], row["contradict"], row["open"]) == ("supported", 3, 0, 0)
    assert (row["smallest"], row["smallest_low"], row["smallest_high"]) == (3, 2, 4)
    assert (row["largest"], row["largest_low"], row["largest_high"]) == (7, 6, 8)
    assert (row["paper"], row["printed"], row["where"], row["attacker"]) == ("COLA", "46.2", "Table 1", "blind")
    assert row["link"] == "cola/results.html#COLA-C1"
    assert study.ledger is ledger


def test_what_no_page_has_judged_is_due_or_outside(small):
    small("MMCOA-C1", "quick", "mmcoa/in-distribution", 7.0)
    frame = ledger()
    full, photo = (row_of(frame, "MMCOA-C1", scale) for scale in ("full", "photo"))
    assert (full["verdict"], full["meanwhile"]) == ("due", "supported")
    assert (photo["verdict"], photo["meanwhile"]) == ("due", "")
    assert photo["link"] == "mmcoa/in-distribution.html#MMCOA-C1"
    assert row_of(frame, "MMCOA-C2", "photo")["verdict"] == "due"
    outside = row_of(frame, "MMA-C2", "photo")
    assert (outside["verdict"], outside["note"]) == ("outside this world", known_claims()["MMA-C2"]["why"])
    planned = row_of(frame, "MMA-C1", "photo")
    assert (planned["verdict"], planned["link"]) == ("due", "foundations/retrieval-attacks.html#MMA-C1")


def test_a_claim_is_due_where_its_page_measured_nothing_for_it(small):
    small("MMCOA-C1", "quick", "mmcoa/in-distribution", 5.0)
    small("MMCOA-C1", "full", "mmcoa/in-distribution")
    small("MMCOA-C1", "photo", "mmcoa/in-distribution", 5.0, -0.5)
    frame = ledger()
    full, photo = row_of(frame, "MMCOA-C1", "full"), row_of(frame, "MMCOA-C1", "photo")
    assert (full["verdict"], full["meanwhile"]) == ("due", "supported")
    assert (photo["verdict"], photo["agree"], photo["open"]) == ("open", 1, 1)


def test_shipped_verdicts_come_before_those_found_here(small):
    small("TTC-C1", "photo", "testtime/ttc", 7.0)
    small("TTC-C1", "photo", "testtime/ttc", -7.0, ship=False)
    small("AOM-C2", "photo", "testtime/noise-anchors", -7.0, ship=False)
    frame = ledger()
    assert row_of(frame, "TTC-C1", "photo")["verdict"] == "supported"
    assert row_of(frame, "AOM-C2", "photo")["verdict"] == "contradicted"
    assert row_of(frame, "TTC-C1", "photo")["link"] == "survey/testtime/ttc.html#TTC-C1"


def test_blind_claims_stand_beside_the_gain_against_who_knows(small):
    small("TTC-C1", "photo", "testtime/ttc", 7.0)
    small(KNOWING, "photo", "testtime/what-held", 2.0, what=f"TTC{WORST}")
    row = row_of(ledger(), "TTC-C1", "photo")
    assert (row["defense"], row["aware"], row["aware_low"], row["aware_high"]) == ("TTC", 2, 1, 3)
    assert pd.isna(row_of(ledger(), "TTC-C1", "full")["aware"])


def test_our_own_statements_come_last_in_natural_order(small):
    small("PC2 PC10 PC1", "photo", "mmcoa/paper-and-code", 7.0, ours=True)
    small("AB1", "photo", "mmcoa/ablation", 7.0, ours=True)
    frame = ledger(["photo"])
    assert list(frame[frame["ours"]]["id"]) == ["AB1", "PC1", "PC2", "PC10"]
    assert frame["ours"].is_monotonic_increasing


def test_the_table_leads_to_the_evidence_and_says_what_is_due(small):
    small("TTC-C1", "photo", "testtime/ttc", 7.0, 3.0, printed="39.17", mark="secondary")
    small(KNOWING, "photo", "testtime/what-held", 2.0, what=f"TTC{WORST}")
    small("MMCOA-C1", "quick", "mmcoa/in-distribution", 7.0)
    frame = ledger()
    page = BeautifulSoup(report.ledger(frame[~frame["ours"]], "../")._repr_html_(), "html.parser")
    filters = [head.text for head in page.select("th[data-filter]")]
    assert filters == ["paper", "attacked", "photo", "Tinyworld (full)"]
    cells = page.find(id="TTC-C1").find_parent("tr").find_all(["th", "td"])
    assert cells[0].a["href"] == "../survey/testtime/ttc.html#TTC-C1"
    assert [cell.text for cell in cells[2:6]] == ["TTC", "39.17 Table 1 (secondary)", "image", "blind"]
    assert "✓ supported 2 agree" in cells[6].text
    assert "+3.0 [+2.0, +4.0] to +7.0 [+6.0, +8.0]" in cells[6].text
    assert "aware: TTC +2.0 [+1.0, +3.0] over CLIP alone" in cells[6].text
    assert cells[7].text == "due"
    assert page.find(id="MMCOA-C1").find_parent("tr").find_all("td")[-1].text == "due quick: ✓ supported"


def test_our_own_statements_have_a_table_of_their_own(small):
    small("PC1", "photo", "mmcoa/cost", 7.0, ours=True)
    frame = ledger(["photo"])
    table = report.ledger(frame[frame["ours"]])
    assert table.heads == ("claim", "statement", "page", "photo")
    assert table.filters == ("page", "photo")


def test_the_figure_counts_every_claim(small):
    small("TTC-C1", "photo", "testtime/ttc", 7.0)
    frame = ledger()
    papers = frame[~frame["ours"]]
    figure = report.tally(papers)
    photo, full = figure.axes
    assert (photo.get_title(), full.get_title()) == ("photo", "Tinyworld (full)")
    names = [label.get_text() for label in photo.get_yticklabels()]
    assert names == list(papers["paper"].unique())
    for axis, scale in ((photo, "photo"), (full, "full")):
        widths = sum(bar.get_width() for bar in axis.patches)
        assert widths == (papers["scale"] == scale).sum()
    counted = {name: text.get_text() for name, text in zip(names, photo.texts, strict=True)}
    assert counted["TTC"] == "1 ✓  8 due"
    assert len({bar.get_hatch() for bar in photo.patches if bar.get_width()}) == 3
