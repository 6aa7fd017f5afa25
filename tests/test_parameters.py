"""Wrong parameters of a notebook end it with one line."""

import pytest

from robustclip import parameters
from robustclip.parameters import WrongParameter

RIGHT = {"scale": "quick", "n": 0, "seed": 0, "device": "cpu", "steps": 10}


class Shell:
    """What IPython remembers of the cells that ran."""

    def __init__(self, *cells: str):
        self.user_ns = {"In": ["", *cells]}


@pytest.fixture
def ran(monkeypatch):
    def with_cells(*cells: str) -> None:
        monkeypatch.setattr("IPython.get_ipython", lambda: Shell(*cells))

    return with_cells


def test_right_parameters_pass(ran):
    parameters.check(**RIGHT)
    ran("n: int = 3  # images", '# Parameters\nn = 4\nscale = "quick"\n')
    parameters.check(**RIGHT | {"scale": "tests/data/quick.toml"})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"scale": "quik"}, "unknown scale 'quik'; choose one of: full, paper, photo, quick"),
        ({"scale": "none.toml"}, "no file 'none.toml'"),
        ({"n": -1}, "n=-1 is not allowed"),
        ({"n": "many"}, "n='many' is not allowed"),
        ({"n": 1.5}, "n=1.5 is not allowed; it must be a whole number"),
        ({"seed": -1}, "seed=-1 is not allowed"),
        ({"device": "gpu"}, "cannot compute on device 'gpu'"),
    ],
)
def test_a_wrong_parameter_is_one_line(wrong, said):
    with pytest.raises(WrongParameter, match=said) as caught:
        parameters.check(**RIGHT | wrong)
    (line,) = caught.value._render_traceback_()
    assert line.startswith(f"WrongParameter: {said}")
    assert "\n" not in line


def test_names_that_a_page_does_not_have_are_refused(ran):
    ran("stepz = 1", "# Parameters\nn = 4\nstepz = 5\n")
    with pytest.raises(WrongParameter, match="unknown parameter stepz; this page has: scale, n, seed, device, steps"):
        parameters.check(**RIGHT)
