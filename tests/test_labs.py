"""Labs: solutions pass all checks, stubs pass none, typical mistakes are named, and nothing of either leaks."""

import re
from collections.abc import Callable

import nbformat
import pytest
from torch import Tensor

import execute
import labs
import try_nbgrader
from labs import about, graded, handed_out, linked, put_back

NAMES = [path.stem for path in labs.labs()]
FEW = {"n": 12, "updates": 8}  # parameters of labs: checks have to work with little
FIELDS = {"schema_version", "grade", "grade_id", "locked", "solution", "task", "cell_type"}

# Lab -> the cell of a solution -> what a student writes instead of what, and what the checks then say.
MISTAKES: dict[str, dict[str, list[tuple[str, str, str]]]] = {
    "attack": {
        "zero-shot": [
            ("F.normalize(clip.raw_images(images), dim=1)", "clip.raw_images(images)", "unit length"),
            ("clip.logit_scale * pictures", "pictures", "what multiplies cosines"),
            ("return clip", "return 9 + clip", "no multiples of cosines"),
            ("clip.text_features(prompts).T", "clip.text_features(samples.prompts).T", "use the arguments"),
            (" @ clip.text_features(prompts).T", "", "one column for each prompt"),
        ],
        "gradient": [
            ("images.clone().requires_grad_()", "images.requires_grad_()", "work on a copy"),
            ('reduction="sum"', 'reduction="mean"', "no mean"),
            ("cross_entropy(classifier(points)", "cross_entropy(-classifier(points)", "the loss falls"),
            ("torch.autograd.grad(loss, points)", "torch.autograd.grad(-loss, points)", "the loss falls"),
            ("labels, reduction", "classifier(images).argmin(1), reduction", "true label"),
        ],
        "fgsm": [
            ("(images + eps", "(images - eps", "not down"),
            (".clamp(0, 1)", "", "pixels left"),
            (".sign()", "", "the sign"),
            (".sign()", ".sign() / 2", "take the sign"),
            ("eps * pixel", "255 * eps * pixel", "allowed are 4/255"),
            ("eps * pixel", "4 / 255 * pixel", "not where one signed step leads"),
        ],
        "project": [
            (".clamp(0, 1)", "", "projected pixels lie outside"),
            ("(images + (points - images).clamp(-eps, eps))", "points", "clamp the change"),
            ("(points - images)", "0.5 * (points - images)", "inside already must stay"),
        ],
        "pgd": [
            ("images, eps)", "points, eps)", "project around the original"),
            ("project(points + step_size * gradient.sign(), images, eps)", "points + step_size * gradient.sign()",
             "project around the original"),
            ("points + step_size", "points - step_size", "where it has to grow|should be FGSM"),
            ("(classifier, points, labels)", "(classifier, images, labels)", "taken anew"),
            ("points = images\n", "points = images + eps / 2\n", "start at the picture itself"),
        ],
        "worst": [
            ("return torch.stack(right).all(0)", "return min(one.float().mean() for one in right)", "both count"),
            (".all(0)", ".any(0)", "survive both"),
            (".mean().item()", ".sum().item()", "four of six"),
        ],
        "targeted": [
            ("points - step_size", "points + step_size", "it has to fall"),
            ("points, targets)", "points, labels)", "it has to fall|wanted class"),
            ("images, eps)", "points, eps)", "the budget is broken"),
        ],
    },
    "fine-tune": {
        "loss": [
            ("clip.logit_scale * clip", "clip", "cosines alone"),
            (" @ texts.T, labels)", ' @ texts.T, labels, reduction="sum")', "not the mean"),
            (" @ texts.T, labels)", ' @ texts.T, labels, reduction="none")', "one number"),
            ("@ texts.T", "@ clip.text_features(training.prompts).T", "use the argument"),
        ],
        "weights": [
            ('weight.requires_grad_(name.startswith("visual."))', "weight.requires_grad_()", "that you do not return"),
            ('if name.startswith("visual.")', "if True", "gradients through prompts"),
            ('if name.startswith("visual.")', 'if name.startswith("visual.layer")', "are missing"),
            ('weight.requires_grad_(name.startswith("visual."))', "pass", "ask for no gradient"),
            ("in clip.network", "in copy.deepcopy(clip.network)", "no copies"),
        ],
        "attack": [
            ("return points.detach()", "return points.detach().requires_grad_()", "plain numbers"),
            ("(gradient,) = torch.autograd.grad(class_loss(clip, points, labels, texts), points)",
             "class_loss(clip, points, labels, texts).backward(); gradient = points.grad", "the leak"),
            ("images + eps * start", "images", "start at random in the ball"),
            ("change.clamp(-eps, eps)", "change", "project every step"),
            ("(images + change.clamp(-eps, eps)).clamp(0, 1)", "images + change.clamp(-eps, eps)", "left"),
            ("steps * gradient", "steps * -gradient", "has to grow"),
            ("* 2 - 1", "", "start is not"),
            ("1.25 * eps", "0.1 * eps", "weakens it"),
            ("class_loss(clip, points", "class_loss(globals()['clip'], points", "not a global one"),
        ],
        "update": [
            ("optimizer.zero_grad()", "pass", "zero_grad"),
            ("class_loss(clip, attacked", "class_loss(clip, images", "clean pictures"),
            ("loss.backward()", "(-loss).backward()", "up the loss"),
            ("optimizer.step()", "pass", "does the optimizer step"),
            ("loss = class_loss", "clip.train(); loss = class_loss", "evaluation mode"),
            ("return loss.item()", "return loss", "as a number"),
        ],
        "loop": [
            ("copy.deepcopy(clip)", "clip", "this is the original"),
            ("return tuned.requires", "return copy.deepcopy(tuned).requires", "another model than you return"),
            ("labels[rows]", "labels[:batch_size]", "do not belong together"),
            ("torch.randperm(len(images), generator=generator)", "torch.arange(len(images))", "draw anew"),
            ("[:batch_size]", "", "batch_size pictures"),
            ("texts, eps, steps", "texts, 0.0, steps", "the budget eps"),
            (".requires_grad_(False)", "", "still ask"),
            ("lr=rate", "lr=1.0", "rate that you were given"),
        ],
        "measure": [
            ("attack(classifier", "attack(models.ZeroShotClassifier(copy.deepcopy(clip), test.prompts)", "you judge"),
            ("attacked = attack(classifier, images, truth)", "attacked = images", "never attacked"),
            ("samples.prompts", "training.prompts", "prompts of that set"),
            ("return clean, robust", "return robust, clean", "clean accuracy is"),
        ],
    },
    "break": {
        "defense": [
            (".round()", ".floor()", "nearest level"),
            ("* (LEVELS - 1)).round() / (LEVELS - 1)", "* LEVELS).round() / LEVELS", "levels instead of"),
            (", generator=torch.Generator().manual_seed(seed)", "", "make a generator"),
            ("manual_seed(seed)", "manual_seed(0)", "another seed gave the same"),
            (" * 2 - 1", "", "only brightens"),
            ("(images + RADIUS * noise).clamp(0, 1)", "images + RADIUS * noise", "cut it"),
            ("COPIES * draw + copy", "copy", "two draws give the same"),
            ("COPIES * draw + copy", "draw", "copies 4, 5, 6, 7"),
        ],
        "judge": [
            ("UNSEEN + draw)", "draw)", "seen by an attacker"),
            ("UNSEEN + draw)", "UNSEEN)", "you used 1"),
            (".float().mean()", ".all(0).float().mean()", "average accuracies"),
            ("defended(images, UNSEEN + draw)", "plain(images)", "judge the defended"),
        ],
        "naive": [
            ("(gradient == 0)", "(gradient != 0)", "you find"),
            ("function(points)", "plain(points)", "rounding is flat"),
        ],
        "through": [
            ("images + (rounded(images) - images).detach()", "images", "the value has to stay"),
            ("images + (rounded(images) - images).detach()", "rounded(images)", "that of rounding"),
            ("images + (rounded(images) - images).detach()", "rounded(images).detach()", "no gradient"),
            ("images + (rounded(images) - images).detach()", "images * 2 + (rounded(images) - 2 * images).detach()",
             "that of the identity"),
            ("plain(rounded_through(", "plain(rounded(", "rounded_through that"),
            ("COPIES * draw + copy", "copy", "answer what defended"),
        ],
        "expected": [
            ("for draw in draws)", "for draw in draws[:1])", "first one only"),
            ("attackable(points, draw)", "attackable(points, 0)", "one draw of the defense only"),
            (" / len(draws)", "", "divide by the number"),
            ('reduction="sum"', 'reduction="mean"', "sum over pictures"),
            ("[0] / len", "[0] / -len", "the loss falls"),
        ],
        "aware": [
            ("[step * draws + draw for draw in range(draws)]", "[0]", "only one draw"),
            ("[step * draws + draw for", "[draw for", "take new ones at each step"),
            ("[step * draws + draw for", "[UNSEEN + step * draws + draw for", "cheating"),
            ("expected_gradient(points", "-expected_gradient(points", "which way do you climb"),
            ("expected_gradient(points, labels, [", "(lambda points, *_: points)(points, labels, [", "never looked"),
            ("climb(gradient, images, eps", "climb(gradient, images, 2 * eps", "the budget is broken"),
        ],
    },
    "claim": {
        "wilson": [
            ("100 * (middle", "(middle", "percent, not shares"),
            ("z**2 / (4 * n**2)", "0", "Wilson"),
            ("p, z = correct / n, 1.96", "p, z = correct / n, 1.0", "Wilson has"),
        ],
        "paired": [
            ("2 * tail", "tail", "one-sided"),
            ("min(1.0, 2 * tail)", "2 * tail", "without any difference"),
            ("(first & ~second)", "first", "eight throws|differs from itself"),
        ],
        "budget": [
            (".abs()", "", "you say"),
            (".amax(1)", ".mean(1)", "the largest of all"),
        ],
        "slope": [
            (".all(1)", ".any(1)", "whole"),
            ("torch.autograd.grad(loss", "torch.autograd.grad(-loss", "has to rise"),
            ("(images + (ahead - images).clamp(-eps, eps)).clamp(0, 1)", "ahead", "lead out of the ball"),
            ("points, losses = images, []", "points, losses = (images + eps).clamp(0, 1), []", "pictures themselves"),
        ],
        "rivals": [
            ("points + eps / 4", "points - eps / 4", "has to shrink"),
            ("(ahead - images).clamp(-eps, eps)", "(ahead - images)", "transferred: a pixel moved"),
            ("tried = (images + eps", "tried = (best + eps", "searched: a pixel moved"),
            ("best[better], least[better] = tried[better], left[better]", "best, least = tried, left", "shrink|by pic"),
            ("left < least", "left > least", "shrink"),
            ("lead(classifier(tried), labels)", "lead(plain(tried), labels)", "was asked"),
        ],
        "verdict": [
            ("p_value(after, claimed) < 0.05", "p_value(after, claimed) > 2", "loses to a rival"),
            ("> 0.5", "> 0.99", "what about its gradient"),
            ('"broken attack" if raised', '"broken attack" if len(raised) > 1', "one flag is enough"),
            ("went[-1] <= went[0]", "went[-1] < 0", "where does its gradient lead"),
        ],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def sources() -> dict:
    return {path.stem: nbformat.read(path, as_version=4) for path in labs.labs()}


def namespace() -> dict:
    """An empty one, as a notebook has it."""
    return {"__name__": "__main__"}


def run(cells: list, space: dict) -> list[str | None]:
    """Run cells but figures and tables in one namespace, as a notebook does; for each what went wrong."""
    told = []
    for cell in cells:
        try:
            if cell.cell_type == "code" and not re.search(r"report\.(show|listing)\(", cell.source):
                exec(compile(cell.source, cell.id, "exec"), space)
            told.append(None)
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
        if "parameters" in cell.metadata.get("tags", []):
            space.update({name: value for name, value in FEW.items() if name in space})
    return told


def caught(cells: list, space: dict, change: Callable[[str], str]) -> str | None:
    """What the first check to fail after the first of these cells, a solution, says if it is changed."""
    before = {name: value.clone() if isinstance(value, Tensor) else value for name, value in space.items()}
    exec(change(cells[0].source), space)
    checks = (cell for cell in cells[1:] if about(cell).get("grade"))
    said = next((wrong for cell in checks for wrong in run([cell], space) if wrong), None)
    space.clear()
    space.update(before)
    return said


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_solutions_pass_and_typical_mistakes_are_named(sources, name):
    cells, space = sources[name].cells, namespace()
    places = [place for place, cell in enumerate(cells) if about(cell).get("solution")]
    ends = [*places[1:], len(cells)]
    assert {cells[place].id for place in places} == set(MISTAKES[name])
    told, missed = run(cells[: places[0]], space), []
    for place, end in zip(places, ends, strict=True):
        part = cells[place:end]
        for old, new, said in MISTAKES[name][part[0].id]:
            assert old in part[0].source, (part[0].id, old)
            answer = caught(part, space, lambda source, old=old, new=new: source.replace(old, new)) or "nothing"
            if not (answer.startswith("AssertionError: ") and re.search(said, answer)):
                missed.append(f"{part[0].id}, {new!r} for {old!r}: {answer}")
        told += run(part, space)
    assert not list(filter(None, told))
    assert not missed, "\n".join(missed)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_handed_out_passes_no_check(sources, name):
    marks = graded(handed_out(sources[name]), sources[name], lambda notebook: run(notebook.cells, namespace()))
    assert len(marks) > 5
    assert sum(most for _, most, _ in marks.values()) == 20
    assert not {check: given for check, (given, *_) in marks.items() if given}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_is_hidden_is_handed_out(sources, name):
    given = handed_out(sources[name])
    text = "\n".join(cell.source for cell in given.cells)
    shown = {line.strip() for cell in sources[name].cells for line in told_apart(cell.source)[0]}
    for before, after in zip(sources[name].cells, given.cells, strict=True):
        kept, hidden = told_apart(before.source)
        own = [line for line in after.source.splitlines() if line.strip() not in labs.STUB]
        assert own == kept, before.id
        told = {line.strip() for line in hidden if len(line) > 30} - shown
        assert not [line for line in told if line in text], before.id
        assert ("# YOUR CODE HERE" in after.source) == bool(about(before).get("solution"))
        if after.cell_type == "code":
            compile(after.source, after.id, "exec")


def told_apart(source: str) -> tuple[list[str], list[str]]:
    """The lines outside of all marks, and those between them."""
    kept, hidden, inside = [], [], False
    for line in source.splitlines():
        if line.strip().startswith("### "):
            inside = "BEGIN" in line
        else:
            (hidden if inside else kept).append(line)
    return kept, hidden


@pytest.mark.parametrize("name", NAMES)
def test_metadata_is_what_nbgrader_expects(sources, name):
    cells = [cell for cell in sources[name].cells if about(cell)]
    ids = [about(cell)["grade_id"] for cell in cells]
    assert len(ids) == len(set(ids))
    for cell in cells:
        facts = about(cell)
        assert set(facts) == FIELDS | {"points"} if facts["grade"] else set(facts) == FIELDS
        assert facts["schema_version"] == 3
        assert facts["cell_type"] == cell.cell_type
        assert re.fullmatch(r"[a-zA-Z0-9_\-]+", facts["grade_id"])
        assert all(isinstance(facts[key], bool) for key in ("grade", "locked", "solution", "task"))
        assert not facts["task"]
        assert facts["solution"] != facts["locked"]  # stubs are for students, all else is not
        assert ("### BEGIN SOLUTION" in cell.source) == facts["solution"]
        assert "### BEGIN HIDDEN TESTS" not in cell.source or facts["grade"]
        assert not facts["grade"] or facts["points"] > 0
    for mark in ("SOLUTION", "HIDDEN TESTS"):
        text = "".join(cell.source for cell in sources[name].cells)
        assert text.count(f"### BEGIN {mark}") == text.count(f"### END {mark}") > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_lab_says_what_it_is_for_what_it_needs_and_how_long_it_takes(sources, name):
    first = sources[name].cells[0].source
    assert all(f"| **{word}** |" in first for word in ("Goal", "You need", "Time", "Points"))
    total = int(re.search(r"\*\*Time\*\* \| (\d+) minutes", first)[1])
    tasks = [re.search(r"^## \d+\. .*\((\d+) minutes, (\d+) points?\)$", cell.source, re.MULTILINE)
             for cell in sources[name].cells]  # fmt: skip
    minutes, points = (sum(int(task[place]) for task in tasks if task) for place in (1, 2))
    assert 90 <= total <= 120
    assert minutes == total
    assert points == sum(about(cell).get("points", 0) for cell in sources[name].cells) == 20


def lab(*cells: tuple[str, str, dict]) -> nbformat.NotebookNode:
    """A lab of cells (source, grade_id, what else nbgrader knows)."""
    made = []
    for source, grade_id, facts in cells:
        made.append(nbformat.v4.new_code_cell(source))
        made[-1].metadata["nbgrader"] = {"grade_id": grade_id, **facts}
    return nbformat.v4.new_notebook(cells=made)


CHECK = "assert f() == 2\n### BEGIN HIDDEN TESTS\nassert f() > 1\n### END HIDDEN TESTS"
SMALL = lab(
    ("def f():\n    ### BEGIN SOLUTION\n    return 2\n    ### END SOLUTION", "f", {"solution": True}),
    (CHECK, "a", {"grade": True, "locked": True, "points": 3}),
    ("assert f() > 1", "b", {"grade": True, "locked": True, "points": 2}),
)


def test_stubs_and_checks_of_a_lab():
    given = handed_out(SMALL)
    assert [cell.source for cell in given.cells] == [
        "def f():\n    # YOUR CODE HERE\n    raise NotImplementedError()",
        "assert f() == 2",
        "assert f() > 1",
    ]


@pytest.mark.filterwarnings("default")
def test_grading_puts_checks_back_and_says_what_went_wrong():
    handed_in = handed_out(SMALL)
    handed_in.cells[0].source = "def f():\n    return 3"
    handed_in.cells[1].source = "assert True"
    assert graded(handed_in, SMALL) == {"a": (0, 3, "AssertionError: "), "b": (2, 2, None)}


def test_a_student_who_knows_all_solutions_hands_in_no_marks():
    release = handed_out(SMALL)
    made = try_nbgrader.solved(release, SMALL)
    assert [cell.source for cell in made.cells] == ["def f():\n    return 2", "assert f() == 2", "assert f() > 1"]
    assert release == handed_out(SMALL)


@pytest.mark.filterwarnings("default")
def test_the_book_runs_labs_with_their_solutions_and_shows_them_without(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    (tmp_path / "book").mkdir()
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    shown = nbformat.v4.new_code_cell("print(f() * 21)")
    source = nbformat.v4.new_notebook(cells=[*SMALL.cells, shown], metadata=kernel)
    nbformat.write(source, tmp_path / "book" / "lab.ipynb")
    job = execute.Job(tmp_path / "book" / "lab.ipynb", tmp_path / "out" / "lab.ipynb", {}, "")
    assert execute.run(job) is None
    made = nbformat.read(tmp_path / "out" / "lab.ipynb", as_version=4)
    assert [cell.source for cell in made.cells] == [cell.source for cell in handed_out(source).cells]
    assert made.cells[-1].outputs[0].text == "42\n"


def test_a_check_that_was_removed_is_missed():
    handed_in = handed_out(SMALL)
    del handed_in.cells[1]
    with pytest.raises(ValueError, match="cells a of the lab are missing"):
        put_back(handed_in, SMALL)


def test_links_of_what_is_handed_out_lead_to_the_published_book():
    cell = nbformat.v4.new_markdown_cell(
        "[A](../foundations/attacks.ipynb), [B](audit.ipynb), [C](https://x.org/y.html)."
    )
    (found,) = linked(nbformat.v4.new_notebook(cells=[cell])).cells
    base = "https://robust-clip-reproduced.github.io/robust-clip-reproduced/book"
    assert found.source == (
        f"[A]({base}/foundations/attacks.html), [B]({base}/coursework/audit.html), [C](https://x.org/y.html)."
    )


def test_both_versions_are_written(tmp_path, sources):
    labs.write(tmp_path)
    for name in NAMES:
        student, instructor = (
            nbformat.read(tmp_path / version / f"{name}.ipynb", as_version=4) for version in ("student", "instructor")
        )
        assert student == handed_out(instructor)
        assert instructor == linked(sources[name])
        assert "](../" not in "".join(cell.source for cell in student.cells)
