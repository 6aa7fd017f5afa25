"""Write what holds, in five sentences and one picture, to the README and to the card of the book: `make headline`.

Both are computed from the shipped results; the sentences stand between two comments of the README.
"""

import re
import sys
from pathlib import Path

from robustclip import report, study
from robustclip.study import headline, leaderboard

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- headline: written by `make headline` -->", "<!-- end of the headline -->"
PICTURE, CARD = ROOT / "book" / "_static" / "headline.svg", ROOT / "book" / "_static" / "card.png"
WIDTH, HEIGHT = 12.0, 6.3  # inches of the card, at 100 dots each


def block(sentences: list[str], spoken: str) -> str:
    """What stands between the comments: a picture and a list."""
    lines = [f"![{spoken}]({PICTURE.relative_to(ROOT).as_posix()})", "", *(f"- {one}" for one in sentences)]
    return "\n".join([BEGIN, "", *lines, "", END])


def written(text: str, told: str) -> str:
    """The README with this block in the place of the old one."""
    pattern = re.escape(BEGIN) + ".*" + re.escape(END)
    if not re.search(pattern, text, re.DOTALL):
        raise ValueError(f"README.md has no place for the headline; put {BEGIN!r} and {END!r} there")
    return re.sub(pattern, lambda _: told, text, flags=re.DOTALL)


def main() -> None:
    """Compute and write all of it; with --check say whether the README is as it would be written."""
    boards = {name: leaderboard.rows(study.scale(name)) for name in study.EVIDENCE}
    spoken = "What blind attackers leave of the best models and defenses, and what all attacks on images together leave"
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf8")
    new = written(text, block(headline.sentences(boards), spoken))
    if "--check" in sys.argv[1:]:
        sys.exit(0 if new == text else "README.md does not say what the shipped results say; run `make headline`")
    readme.write_text(new, encoding="utf8")
    figure = report.drops(boards)
    figure.savefig(PICTURE, metadata={"Date": None})
    figure.set_size_inches(WIDTH, HEIGHT)
    figure.savefig(CARD, dpi=100)


if __name__ == "__main__":
    main()
