"""The check of a notebook's parameters: a wrong one ends the page in its first cells, with one line."""

import ast
import sys

from robustclip.checks import check_integer
from robustclip.models import pick_device
from robustclip.study.scales import scale

CHECKS = {
    "scale": scale,
    "n": lambda n: check_integer("n", n, 0),
    "seed": lambda seed: check_integer("seed", seed, 0),
    "device": pick_device,
}


class WrongParameter(ValueError):
    """A parameter that a page cannot run with."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback, which would be long and say nothing more."""
        return [f"{type(self).__name__}: {self}"]


def check(**parameters: object) -> None:
    """Raise a one-line error if one of a page's parameters is wrong, or if papermill was given one it does not have."""
    try:
        if unknown := sorted(_injected() - parameters.keys()):
            raise ValueError(f"unknown parameter {', '.join(unknown)}; this page has: {', '.join(parameters)}")
        for name, check_value in CHECKS.items():
            if name in parameters:
                check_value(parameters[name])
    except (ValueError, OSError) as error:
        raise WrongParameter(str(error)) from None


def _injected() -> set[str]:
    """Names that papermill's own cell assigned; papermill only warns of those that a notebook does not have."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    cells = shell.user_ns.get("In", []) if shell else []
    statements = [node for cell in cells if cell.startswith("# Parameters\n") for node in ast.parse(cell).body]
    return {target.id for node in statements if isinstance(node, ast.Assign) for target in node.targets}
