"""Gates: numbers of papers that a run has to meet before hours are spent."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from robustclip.cli import app
from robustclip.data.roles import role
from robustclip.study import gates, grid, scale
from robustclip.study.gates import ENSEMBLES, GATES, SHARED, asked, check, hold, playable, row

BY_NAME = {(gate.paper, gate.name): gate for gate in GATES}


def hits(accuracy: float, n: int) -> np.ndarray:
    """Right or wrong for each of n images."""
    return np.arange(n) < round(accuracy / 100 * n)


def gate(name: str):
    return BY_NAME["SCC", name]


# --- what is printed --------------------------------------------------------------------------------------------------


def test_every_gate_has_its_printed_number():
    printed = {name: one.printed for (_, name), one in BY_NAME.items()}
    assert len(printed) + 1 == len(GATES)  # CLIP on ImageNet, clean, is printed by two
    for method, clean, attacked in (("CLIP", 61.51, 2.70), ("RN", 61.61, 3.86), ("TTC", 59.75, 39.17)):
        assert printed[f"{method} over 16 sets, clean"] == clean
        assert printed[f"{method} over 16 sets, PGD-10:last at 1/255"] == attacked
    assert BY_NAME["FARE", "FARE on ImageNet, APGD-T at 1/255"].printed == 32.9
    singles = [printed[f"CLIP on {title}, clean"] for title in
               ("OxfordPets", "Caltech256", "Flowers102", "Food101")]  # fmt: skip
    assert printed["CLIP over 5 sets, clean"] == pytest.approx((59.69 + sum(singles)) / 5)
    assert len(SHARED) == len(set(SHARED)) == 16
    assert {one.tolerance for one in GATES} == {0.5, 2.0}


def test_cells_are_in_the_setting_of_the_print():
    """The released step, last iterate, one prompt per set; the full stop is theirs."""
    (cell,) = gate("TTC on ImageNet, PGD-10:last at 1/255").cells(scale("paper"), 100)
    assert (cell.n, cell.template, cell.spec) == (100, "This is a photo of a {}.", "ViT-B-32/openai")
    assert (cell.attack.eps, cell.attack.step_size, cell.attack.steps) == (1 / 255, 1 / 255, 10)
    assert (cell.defense_name, cell.attacker) == ("TTC", "blind")
    (pets,) = gate("CLIP on OxfordPets, clean").cells(scale("paper"))
    assert (pets.template, pets.n) == (None, 1000)  # the role's own prompt is the paper's


def test_what_a_scale_cannot_play_is_said():
    paper = scale("paper")
    reason = gate("CLIP over 16 sets, clean").unfit(paper)
    assert "of 224 pixels, cifar10, cifar100, stl10 have fewer here" in reason
    assert "pcam has other prompts here" in reason
    assert BY_NAME["FARE", "FARE on ImageNet, clean"].unfit(paper) == ENSEMBLES
    assert gate("CLIP on ImageNet, clean").unfit(scale("full")) == "the scale lacks sets"
    assert not gate("CLIP over 5 sets, clean").unfit(paper)
    assert {name for one in playable(paper) for name in one.roles} == set(gates.roles(paper))
    assert all(role(name).paper.get("pixels", 224) == 224 for name in gates.roles(paper))


# --- verdicts by made-up answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "n", "verdict"),
    [
        (59.7, 1000, "holds"),
        (57.0, 1000, "holds"),  # by chance
        (50.0, 1000, "fails"),  # the raw class names, or another crop
        (58.9, 50_000, "holds"),  # 0.5 and the interval
        (58.0, 50_000, "fails"),
        (50.0, 100, "open"),
    ],
)
def test_a_gate_is_as_wide_as_chance_and_its_tolerance(accuracy, n, verdict):
    found = check(gate("CLIP on ImageNet, clean"), [hits(accuracy, n)])
    assert (found.verdict, found.n) == (verdict, n)
    assert found.measured.low < accuracy < found.measured.high
    if verdict == "open":
        assert "n=100 tells the number to 16 points only; take more images" in str(found)
    else:
        assert str(found).startswith(f"gate 'CLIP on ImageNet, clean' {verdict}: printed 59.69 (SCC, table 1), ")
        assert f"measured {accuracy:.2f} on n={n} (" in str(found)
        assert str(found).endswith("), tolerance 0.5 points")


def test_a_mean_needs_all_its_sets_and_is_sharper_than_one():
    mean = gate("CLIP over 5 sets, clean")
    assert str(check(mean, [hits(60, 1000)] * 4)).endswith("is open: 4 of 5 cells are known")
    own = [59.69, 87.44, 81.72, 65.46, 83.88]
    met = check(mean, [hits(value, 1000) for value in own])
    assert met.verdict == "holds"
    assert met.n == 5000
    assert check(mean, [hits(value - 3.5, 1000) for value in own]).verdict == "fails"
    assert check(gate("CLIP on ImageNet, clean"), [hits(own[0] - 3.5, 1000)]).verdict == "holds"
    assert row(met)["measured"] == pytest.approx(np.mean(own), abs=0.05)
    assert row(check(mean, []))["verdict"] == "open"


# --- before a run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch):
    """Accuracies by role, attack and defense that stand for measuring; and what was measured, in order."""
    table: dict = {}
    asked_for: list = []

    def evaluate(cells, *_):
        asked_for.extend((cell.role, cell.attack_name, cell.defense_name) for cell in cells)
        rows = [{"role": cell.role, "n": cell.n, "kind": asked_for[place - len(cells)]}
                for place, cell in enumerate(cells)]  # fmt: skip
        return SimpleNamespace(to_dict=lambda _: rows)

    def outcomes(one, _):
        name, attack, defense = one["kind"]
        title = role(name).title
        method = {"none": "CLIP"}.get(defense, defense)
        words = attack if attack == "clean" else f"{attack} at 1/255"
        return hits(table.get(one["kind"], gate(f"{method} on {title}, {words}").printed), one["n"])

    monkeypatch.setattr(gates, "evaluate", evaluate)
    monkeypatch.setattr(gates, "outcomes", outcomes)
    return SimpleNamespace(table=table, asked=asked_for)


def names(cells) -> list[str]:
    return [one.name for one, _ in asked(cells)]


def test_the_gates_of_a_run_are_of_its_model_its_sets_and_what_it_defends():
    paper = scale("paper")
    assert names(grid(paper, roles=["pets", "dtd"])) == ["CLIP on OxfordPets, clean",
                                                        "CLIP on OxfordPets, PGD-10:last at 1/255"]  # fmt: skip
    defended = grid(paper, roles=["pets"], defenses={"COLA": paper.defense("COLA")})
    assert [name.split()[0] for name in names(defended)] == ["CLIP", "CLIP", "RN", "RN", "TTC", "TTC"]
    assert not names(grid(paper, ["clip-large"], roles=["pets"]))
    assert not names(grid("full", roles=["pets"]))
    assert "CLIP over 16 sets, clean" in names(grid(paper))
    (_, own), _ = asked(grid(paper, roles=["pets"], n=300))
    assert own[0].n == 300


def test_a_run_goes_on_where_all_gates_hold(answers):
    found = list(hold(grid("paper", roles=["imagenet", "pets"])))
    assert [one.verdict for one in found if one.gate.paper == "SCC"] == ["holds"] * 4
    assert {one.verdict for one in found if one.gate.paper == "FARE"} == {"open"}
    assert {kind[0] for kind in answers.asked} == {"imagenet", "pets"}


def test_the_first_gate_that_fails_stops_the_run(answers):
    answers.table["pets", "clean", "none"] = 70
    with pytest.raises(ValueError, match=r"gate 'CLIP on OxfordPets, clean' fails: printed 87.44 .* measured 70.00 on "
                       r"n=1000 .* usual causes: resolution .*prompts.*precision.*--no-gates") as caught:  # fmt: skip
        list(hold(grid("paper", roles=["imagenet", "pets"])))
    assert "\n" not in str(caught.value)
    assert answers.asked == [("imagenet", "clean", "none"), ("pets", "clean", "none")]  # no attack was made


def test_the_command_stops_or_goes_on_anyway(answers, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("robustclip.study.preflight.prepare", lambda *_: None)
    monkeypatch.setattr("robustclip.study.evaluate", lambda *_: pytest.fail("measured"))
    answers.table["pets", "clean", "none"] = 70
    run = ["run", "--scale", "paper", "--role", "pets"]
    done = CliRunner().invoke(app, run)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: gate 'CLIP on OxfordPets, clean' fails: ")
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(pytest.fail.Exception, match="measured"):
        CliRunner().invoke(app, [*run, "--no-gates"], catch_exceptions=False)


def test_reproduce_prints_the_gates_of_a_scale_of_which_nothing_is_shipped(answers, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROBUSTCLIP_RESULTS", str(tmp_path / "nothing"))
    monkeypatch.setattr("robustclip.study.preflight.prepare", lambda *_: None)
    command = ["reproduce", "--scale", "paper", "--role", "pets", "--json"]
    rows = json.loads(CliRunner().invoke(app, command).stdout)
    assert [one["verdict"] for one in rows] == ["holds"] * 6
    answers.table["pets", "clean", "RN"] = 70
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert [one["verdict"] for one in json.loads(done.stdout)] == ["holds"] * 2 + ["fails"]  # the rest is not measured
    assert len(json.loads(CliRunner().invoke(app, [*command, "--no-gates"]).stdout)) == 6
    done = CliRunner().invoke(app, ["reproduce", "--scale", "paper", "--role", "dtd"])
    assert done.exit_code == 2
    assert "no gate is on roles ['dtd']; give some of: imagenet, pets" in done.stderr
