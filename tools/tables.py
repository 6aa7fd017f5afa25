"""Write the tables of the executed book as PDF, one file per part: `make tables`, after `make book`.

A table is read from the Markdown that stands for it in a notebook's outputs, so that what is printed is what the page
shows. Wide tables get smaller letters, long ones more pages.
"""

import re
import textwrap
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

import nbformat
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from parts import arguments, parts_of

WIDTH, HEIGHT, MARGIN = 11.69, 8.27, 0.5  # inches of A4, landscape
LARGEST, SMALLEST = 9.0, 4.0  # points
LETTER, LINE = 0.6, 1.25  # width of a letter and distance of lines, in font sizes
ABSENT = str.maketrans("ℓ", "l")  # letters that the font of the tables lacks
CELL = 30  # letters of a column before its text goes on below
Table = tuple[str, list[list[str]]]  # caption; rows of places, the first of which are heads


def tables_of(notebook: Path) -> Iterator[Table]:
    """The tables in the outputs of an executed notebook."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "robustclip-table" in data.get("text/html", ""):
                yield from parsed(data["text/plain"].translate(ABSENT))


def parsed(text: str) -> Iterator[Table]:
    """The tables in a text of Markdown, each with the line above it."""
    caption, rows = "", []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([re.sub(r"\*\*|\\(?=\|)", "", place).strip() for place in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            yield caption, [rows[0], *rows[2:]]
            caption, rows = "", []
        elif line.strip():
            caption = line.strip()


def laid_out(rows: list[list[str]]) -> list[str]:
    """The rows as lines of equally wide letters, long places wrapped, a rule below the heads."""
    wrapped = [[textwrap.wrap(place, CELL) or [""] for place in row] for row in rows]
    widths = [max(len(line) for place in column for line in place) for column in zip(*wrapped, strict=True)]
    lines = []
    for number, row in enumerate(wrapped):
        for parts in zip_longest(*row, fillvalue=""):
            lines.append("  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip())
        lines += ["-" * (sum(widths) + 2 * len(widths) - 2)] * (number == 0)
    return lines


def pages_of(title: str, table: Table) -> Iterator[Figure]:
    """A table on as many pages as it takes."""
    caption, rows = table
    lines = laid_out(rows)
    room = 72 * (WIDTH - 2 * MARGIN) / LETTER
    size = max(SMALLEST, min(LARGEST, room / max(map(len, lines))))
    per_page = int(72 * (HEIGHT - 3 * MARGIN) / (LINE * size))
    for start in range(0, len(lines), per_page):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        x, top = MARGIN / WIDTH, 1 - MARGIN / HEIGHT
        head = textwrap.shorten(f"{title}: {caption}", 150) + " (continued)" * bool(start)
        figure.text(x, top, head, fontsize=10, va="top", parse_math=False)
        text = "\n".join(lines[start : start + per_page])
        figure.text(x, top - MARGIN / HEIGHT, text, fontsize=size, va="top", family="monospace", linespacing=LINE,
                    parse_math=False)  # fmt: skip
        yield figure


def write(path: Path, title: str, notebooks: Iterable[Path]) -> int:
    """The tables of some notebooks in one file; how many there are. No file without tables."""
    found = [(notebook, table) for notebook in notebooks for table in tables_of(notebook)]
    if found:
        path.parent.mkdir(parents=True, exist_ok=True)
        with PdfPages(path, metadata={"Title": f"Robust CLIP, Reproduced: {title}"}) as file:
            for notebook, table in found:
                for page in pages_of(f"{title}, {notebook.stem}", table):
                    file.savefig(page)
    return len(found)


def main() -> None:
    """Write one file per part of the table of contents."""
    given = arguments(__doc__, "tables")
    for title, name, notebooks in parts_of(given.executed):
        print(f"{write(given.out / f'{name}.pdf', title, notebooks):4} tables  {name}")


if __name__ == "__main__":
    main()
