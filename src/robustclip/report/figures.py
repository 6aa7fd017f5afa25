"""Figures: one seaborn style on a white card, which reads the same on a light and on a dark page."""

import io
import math
import textwrap
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from urllib.parse import quote

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullFormatter
from PIL import Image
from torch import Tensor

from robustclip.checks import check_images, check_range
from robustclip.report import words
from robustclip.report.markup import folded, paragraphs

COLORS = sns.color_palette("colorblind", 8)
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2))]
HATCHES = ["", "///", "|||", "\\\\\\", "xx", "--", "++", "x|"]  # lines only: dots make an SVG five times larger
FAINT = {"alpha": 0.4, "linewidth": 1, "markersize": 3}
LOOKS = cycler(color=COLORS, marker=MARKERS, linestyle=DASHES)
INCH = 96  # pixels of a web page
GAP = 0.08  # inches between images
SAFE = " =:/;,'()<>!?*+-"  # what may stand unchanged in a link to an SVG
LIMIT = 110_000  # bytes of one picture: 147 kB once written into a page
TRIES = [("png", 1, {}), ("webp", 1, {"lossless": True}), ("webp", 1, {"quality": 90}), ("webp", 1, {"quality": 70})]
TRIES += [("webp", 2, {"quality": 70}), ("webp", 2, {"quality": 30})]


@contextmanager
def style() -> Iterator[None]:
    """Draw in the book's style inside a `with` block: colorblind palette, a marker and a dash pattern per color."""
    own = {"axes.prop_cycle": LOOKS, "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False}
    own |= {"figure.constrained_layout.use": True, "figure.figsize": (5.6, 3.6), "grid.color": "0.9"}
    own |= {"svg.fonttype": "none", "svg.hashsalt": "robustclip", "text.parse_math": False}  # a name may hold a $
    own |= sns.plotting_context("notebook", font_scale=0.85)
    with mpl.rc_context(sns.axes_style("ticks") | own):
        yield


@dataclass(frozen=True, repr=False)
class Picture:
    """A figure ready for a page: its file, twice `width` pixels wide, words that stand for it, caption, notes, SVG."""

    data: bytes
    kind: str
    width: int
    alt: str
    caption: str = ""
    notes: tuple[str, ...] = ()
    svg: str = ""

    def _repr_html_(self) -> str:
        """Return a figure that style sheets number; the class "dark-light" keeps themes from recoloring it."""
        kind, source = "dark-light" + " robustclip-chart" * bool(self.svg), escape(quote(self.svg, safe=SAFE))
        link = f' <a download="figure.svg" href="data:image/svg+xml,{source}">SVG</a>' * bool(source)
        return (
            f'<figure class="robustclip-figure"><div><img class="{kind}" alt="{escape(self.alt)}" '
            f'width="{self.width}" style="max-width:100%;height:auto;background:#fff;border-radius:3px;padding:0" '
            f'src="data:image/{self.kind};base64,{b64encode(self.data).decode()}"></div>\n'
            f'<figcaption>{escape(self.caption)}<span class="robustclip-save">{link}</span></figcaption>\n'
            f"{folded('Data, attack, audit', paragraphs(self.notes, 'note'))}</figure>"
        )

    def __repr__(self) -> str:
        return "\n".join((f"[figure: {self.alt}]", *self.notes))


def show(figure: Figure, alt: str, caption: str = "") -> Picture:
    """Turn a figure into a picture (PNG, or WebP if too large); `alt` says what it shows to those who cannot see it.

    Without a caption, the title of the figure is taken. Charts can be saved as SVG, too. Tick labels that would overlap
    are abbreviated and turned first.
    """
    if len(alt.split()) < 3 or "{" in alt:
        raise ValueError(f"alt={alt!r} is not allowed; say in a sentence what the figure shows")
    plt.close(figure)  # else a notebook shows it a second time, without the words
    svg = io.StringIO()
    with style():
        for axis in (side for panel in figure.axes for side in (panel.xaxis, panel.yaxis)):
            if isinstance(axis.get_major_formatter(), LogFormatter):  # which writes formulas
                axis.set_major_formatter("{x:,g}")
                axis.set_minor_formatter(NullFormatter())
        figure.draw_without_rendering()
        changed = [_untangle(axis) for axis in figure.axes if axis.axison]
        if any(changed):
            figure.draw_without_rendering()
        figure.set_layout_engine("none")  # everything has its place now
        figure.set_dpi(2 * INCH)
        (canvas := FigureCanvasAgg(figure)).draw()
        if not any(axis.images for axis in figure.axes):
            figure.savefig(svg, format="svg", metadata={"Date": None})
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    for kind, coarse, options in TRIES:
        image.reduce(coarse).save(file := io.BytesIO(), kind, **options)
        if file.tell() <= LIMIT:
            break
    chart, notes = svg.getvalue() if svg.tell() <= LIMIT else "", tuple(figure.get_label().splitlines())
    caption = caption or figure.get_suptitle() or (figure.axes[0].get_title() if len(figure.axes) == 1 else "")
    return Picture(file.getvalue(), kind, image.width // 2, alt, caption, notes, chart)


def curves(
    frame: pd.DataFrame,
    x: str = "eps",
    y: str = "accuracy",
    hue: str = "model",
    panels: str = "",
    title: str = "",
    overlay: pd.DataFrame | None = None,
) -> Figure:
    """Plot `y` against `x`: a line with its Wilson band per `hue`, a panel per value of `panels`; no eps means 0.

    `overlay`, a frame of another scale or run, is drawn faintly over it; alone, if `frame` has no rows.
    """
    frame, overlay = (overlay, None) if frame.empty and overlay is not None else (frame, overlay)
    names = [name for name in (x, hue, panels) if name]
    words.check_unique(frame, names, y)
    parts = list(frame.groupby(panels, sort=False)) if panels else [("", frame)]
    looks = dict(zip(frame[hue].unique(), LOOKS(), strict=False))
    across = 2 if len(parts) == 4 else min(len(parts), 3)
    down = -(-len(parts) // across)
    with style():
        figure = Figure(figsize=(max(5.6, 2.8 * across), 1.6 + 2.2 * down))
        axes = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
        for axis, (name, part) in zip(axes, parts, strict=False):
            axis.set(title=words.text_of(panels, name) if panels else "", xlabel=words.UNITS.get(x, x))
            for label, line in _lines(part, x, hue):
                axis.plot(line[x], line[y], label=words.text_of(hue, label), **looks[label])
                if y == "accuracy":
                    axis.fill_between(line[x], line["low"], line["high"], color=looks[label]["color"], alpha=0.2, lw=0)
            if overlay is not None:
                for label, line in _lines(overlay[overlay[panels] == name] if panels else overlay, x, hue):
                    axis.plot(line[x], line[y], label=_faint(overlay), **looks.get(label, {}) | FAINT)
        for axis in axes[len(parts) :]:
            axis.remove()
        return _finish(figure, frame, names, y, title)


def bars(
    frame: pd.DataFrame,
    x: str = "dataset",
    y: str = "accuracy",
    hue: str = "model",
    title: str = "",
    overlay: pd.DataFrame | None = None,
) -> Figure:
    """Draw bars of `y` with Wilson intervals: a group per `x`, a color and a hatch per `hue`; no bar: no result.

    `overlay`, a frame of another scale or run, is drawn as faint circles; as bars, if `frame` has no rows.
    """
    frame, overlay = (overlay, None) if frame.empty and overlay is not None else (frame, overlay)
    words.check_unique(frame, [x, hue], y)
    groups, names = list(frame[x].unique()), list(frame[hue].unique())
    width = 0.8 / len(names)
    with style():
        figure = Figure(figsize=(min(9, max(4.2, 1.2 + 0.3 * len(groups) * (len(names) + 1))), 3.8))
        axis = figure.subplots()
        for index, name in enumerate(names):
            part = frame[frame[hue] == name].set_index(x).reindex(groups)
            places = [group - 0.4 + (index + 0.5) * width for group in range(len(groups))]
            look = {"color": COLORS[index % 8], "hatch": HATCHES[index % 8], "edgecolor": "white"}
            errors = [part[y] - part["low"], part["high"] - part[y]] if y == "accuracy" else None
            drawn = axis.bar(places, part[y], width, yerr=errors, label=words.text_of(hue, name), **look)
            axis.bar_label(drawn, fmt="%.0f", fontsize="x-small", padding=1)
            if overlay is not None:
                over = overlay[overlay[hue] == name].set_index(x).reindex(groups)[y]
                axis.plot(places, over, "o", color="0.2", mfc="white", ms=4, alpha=0.7, label=_faint(overlay))
        axis.set_xticks(range(len(groups)), [words.text_of(x, group) for group in groups])
        axis.grid(False, axis="x")
        return _finish(figure, frame, [x, hue], y, title)


def stacked(
    frame: pd.DataFrame, rows: str, parts: str, panels: str, looks: Mapping[str, str], title: str = ""
) -> Figure:
    """Count the rows of `frame`: a bar per value of `rows`, a panel per one of `panels`.

    `looks` are the parts of a bar in their order, with their colors; behind it stand counts with their first words.
    """
    counts = frame.groupby([panels, rows, parts], sort=False).size()
    names, heads = list(frame[rows].unique()), list(frame[panels].unique())
    longest = frame.groupby([panels, rows]).size().max()
    with style():
        figure = Figure(figsize=(max(5.6, 1.2 + 3.8 * len(heads)), 1.4 + 0.24 * len(names)))
        axes = figure.subplots(1, len(heads), sharex=True, sharey=True, squeeze=False)[0]
        for axis, head in zip(axes, heads, strict=True):
            ends, told = np.zeros(len(names)), [[] for _ in names]
            for (part, color), hatch in zip(looks.items(), HATCHES, strict=False):
                widths = [counts.get((head, name, part), 0) for name in names]
                if any(widths):
                    look = {"color": color, "hatch": hatch, "edgecolor": "white", "label": part}
                    axis.barh(range(len(names)), widths, left=ends, **look)
                for texts, width in zip(told, widths, strict=True):
                    texts += [f"{width} {part.split()[0]}"] * bool(width)
                ends += widths
            for place, (end, texts) in enumerate(zip(ends, told, strict=True)):
                axis.text(end + 0.02 * longest, place, "  ".join(texts), va="center", fontsize="small")
            axis.set_yticks(range(len(names)), names)
            axis.set(
                xlim=(0, 1.75 * longest),
                xlabel="number",
                ylim=(len(names) - 0.4, -0.6),
                title=words.WORLDS.get(head, head),
            )
            axis.grid(False, axis="y")
        return _finish(figure, frame, [], "", title)


def forest(frame: pd.DataFrame, unit: str = "gain in accuracy (points)", title: str = "Printed and measured") -> Figure:
    """Draw a line per effect, grouped by claim: measured with its interval (dot), printed by the paper (diamond).

    Columns: `claim`, `what`, `value`, `low`, `high`, `printed` and `scale`; NaN is not drawn.
    """
    group = frame.groupby("claim", sort=False).ngroup()
    places = pd.Series(range(1, len(frame) + 1), index=frame.index) + group  # a line for the name of each claim
    heads = places.groupby(frame["claim"], sort=False).min() - 1
    with style():
        figure = Figure(figsize=(6.4, 1.3 + 0.23 * (len(places) + len(heads))))
        axis, ends = figure.subplots(), [frame["value"] - frame["low"], frame["high"] - frame["value"]]
        axis.errorbar(frame["value"], places, xerr=ends, fmt="o", color=COLORS[0], capsize=2, label="measured")
        if frame["printed"].notna().any():
            axis.plot(frame["printed"], places, "D", color=COLORS[1], mfc="none", label="printed")
        axis.axvline(0, color="0.3", linewidth=0.8)
        axis.set_yticks([*places, *heads], [*frame["what"], *heads.index])
        for tick in axis.get_yticklabels()[len(places) :]:
            tick.set_fontweight("bold")
        axis.set(ylim=(places.max() + 0.6, -0.6), xlabel=unit)
        axis.grid(False, axis="y")
        return _finish(figure, frame, [], "", title)


def image_grid(images: Tensor, titles: Sequence[str] = (), columns: int = 6, size: float = 1.2) -> Figure:
    """Lay out images (n, 3, height, width) in [0, 1], `size` inches wide each; enlarged pixels stay sharp squares."""
    count = len(check_images(images))
    across = min(int(check_range("columns", columns, 1)), count)
    if not count or len(titles) not in (0, count):
        raise ValueError(f"got {count} images and {len(titles)} titles; give at least one image, and a title for each")
    lines = [textwrap.fill(title, round(14 * size)) for title in titles] or [""] * count
    head = GAP + 0.15 * max(line.count("\n") + 1 for line in lines) * bool(titles)
    down, tall = -(-count // across), size * images.shape[2] / images.shape[3]
    height, width = down * (tall + head) + GAP, across * (size + GAP) + GAP
    room = {"left": GAP / width, "right": 1 - GAP / width, "bottom": GAP / height, "top": 1 - head / height}
    room |= {"wspace": GAP / size, "hspace": head / tall}
    smooth = "nearest" if images.shape[3] < 2 * INCH * size else "antialiased"
    with style():
        figure = Figure(figsize=(width, height), layout="none")
        for axis in (axes := figure.subplots(down, across, squeeze=False, gridspec_kw=room).flatten()):
            axis.set_axis_off()
        for axis, image, line in zip(axes, images.detach().cpu(), lines, strict=False):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation=smooth, aspect="auto")
            axis.set_title(line, fontsize=8, pad=2)
        return figure


def attack_strip(
    clean: Tensor,
    adversarial: Tensor,
    titles: Sequence[tuple[str, str]] = (),
    magnify: float | None = None,
    hidden: bool = False,
) -> Figure:
    """Show clean | perturbation x `magnify` (gray = 0) | adversarial, one image a row.

    `titles` says what the model sees in the clean and in the adversarial image of each row. Without `magnify`, the
    largest whole factor that clips nothing is taken. Of `hidden` images, which may not be shown, only the change is.
    """
    if check_images(clean).shape != check_images(adversarial).shape:
        raise ValueError(f"adversarial has shape {tuple(adversarial.shape)}, clean {tuple(clean.shape)}; give them one")
    change = (adversarial - clean).detach()
    factor = magnify or max(1, int(0.5001 / change.abs().max().clamp(min=1e-3).item()))
    left, right = [torch.full_like(clean, 0.5)] * 2 if hidden else (clean, adversarial)
    strip = torch.stack([left, (0.5 + factor * change).clamp(0, 1), right], dim=1).flatten(0, 1)
    heads = []
    for before, after in titles or [("", "")] * len(clean):
        heads += [f"clean: {before}", f"change × {factor:g} (gray = 0)", f"adversarial: {after}"]
    return image_grid(strip, [head.removesuffix(": ") for head in heads], columns=3, size=1.6)


def _lines(frame: pd.DataFrame, x: str, hue: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """The lines of a chart, each in the order of `x`; eps in 1/255."""
    frame = frame.assign(eps=frame["eps"].fillna(0) * 255) if x == "eps" else frame
    return iter(frame.sort_values(x).groupby(hue, sort=False))


def _faint(overlay: pd.DataFrame) -> str:
    """The one name of everything that is drawn faintly."""
    return f"overlay ({words.scale_of(overlay)})"


def _untangle(axis: Axes) -> bool:
    """Turn the tick labels of the x axis, and abbreviate long ones, if one would run into its neighbor."""
    low, high = sorted(axis.get_xlim())
    labels = [label for label in axis.get_xticklabels() if label.get_text() and low <= label.get_position()[0] <= high]
    boxes = [label.get_window_extent() for label in labels]
    if any(label.get_rotation() for label in labels) or not any(a.overlaps(b) for a, b in pairwise(boxes)):
        return False
    gap, tall = min(b.x0 + b.x1 - a.x0 - a.x1 for a, b in pairwise(boxes)) / 2, max(box.height for box in boxes)
    turn = 40 if 1.1 * tall < gap * math.sin(math.radians(40)) else 90
    texts = [textwrap.shorten(label.get_text(), 24, placeholder="…") for label in labels]
    look = {"rotation": turn, "ha": "right", "va": "center", "rotation_mode": "anchor"}
    axis.set_xticks([label.get_position()[0] for label in labels], texts, **look)
    return True


def _finish(figure: Figure, frame: pd.DataFrame, shown: list[str], y: str, title: str) -> Figure:
    """Add what every chart needs: title with scale, unit, legend, and below it the notes that belong to its numbers."""
    if y == "accuracy":
        figure.axes[0].set_ylim(-2, 104)
    if y:
        figure.supylabel(words.UNITS.get(y, y), fontsize="medium")
    figure.suptitle(f"{title} ({words.scale_of(frame)})".strip(), fontsize="medium")
    drawn = [pair for axis in figure.axes for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    known = {name: handle for handle, name in sorted(drawn, key=lambda pair: pair[1].startswith("overlay"))}
    columns = max(1, int(figure.get_figwidth() / (0.6 + 0.07 * max(map(len, known)))))
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.set_label("\n".join(words.notes(frame, shown, y) if y else ""))  # `show` puts it below the picture
    return figure
