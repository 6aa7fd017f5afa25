"""The leaderboard as a page shows it: a row per entry, with an interval and n below each number."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustclip.report.figures import COLORS, style
from robustclip.report.tables import Field, HtmlTable
from robustclip.report.words import MISSING, WORLDS
from robustclip.study.leaderboard import called

HEADS = {  # of columns with numbers
    "clean": "clean", "blind": "blind PGD-10", "autoattack": "AutoAttack", "aware": "aware", "worst": "worst case",
    "best_known": "best known", "text": "text", "multimodal": "image and text", "certified": "certified",
}  # fmt: skip
BEST = ("clean", "aware", "worst", "text", "multimodal", "certified")  # no blind number is anybody's best
ON = {"host": "on the host, blind", "defended": "on the defended one", "model": ""}


def leaderboard(frame: pd.DataFrame, caption: str, note: str = "") -> HtmlTable:
    """Show rows of `study.leaderboard`: accuracies in %, the best of a column in bold, but for blind attacks.

    The columns model, defense, kind and "potentially unreliable" get select boxes.
    """
    shown = frame.to_dict("records")
    best = {name: frame[name].max() for name in BEST} if len(frame) else {}
    heads = ("rank", "model", "defense", "kind", *HEADS.values(), "passes", "reported", "potentially unreliable")
    return HtmlTable(
        heads, tuple(_line(one, best) for one in shown), 3, caption, note=note,
        filters=("model", "defense", "kind", "potentially unreliable"),
    )  # fmt: skip


def drops(boards: Mapping[str, pd.DataFrame], top: int = 12) -> Figure:
    """Draw what blind attackers leave of the first entries beside the worst case, a panel per scale."""
    with style():
        figure = Figure(figsize=(max(5.6, 4.7 * len(boards)), 1.2 + 0.25 * top))
        axes = np.atleast_1d(figure.subplots(1, len(boards)))
        for axis, (of, frame) in zip(axes, boards.items(), strict=True):
            _drops_of(axis, frame[frame["rank"].notna()].head(top), WORLDS.get(of, of))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(f"The first {top}: what blind attackers leave, and the worst case", fontsize="medium")
    sets = "; ".join(f"{WORLDS.get(of, of)}: {frame['sets'].iloc[0]}, n = {frame['worst_n'].max()}"
                     for of, frame in boards.items())  # fmt: skip
    figure.set_label(f"{sets}. Thin line: 95 % interval of the worst case. ⚑: potentially unreliable.")
    return figure


def _drops_of(axis: Axes, frame: pd.DataFrame, title: str) -> None:
    """One panel: blind and worst case of each entry, a line between them."""
    for place, one in enumerate(frame.to_dict("records")):
        axis.plot([one["blind"], one["worst"]], [place] * 2, "-", color="0.75", marker="", linewidth=1.5, zorder=1)
        ends = [one["worst_low"], one["worst_high"]]
        axis.plot(ends, [place] * 2, "-", color=COLORS[0], marker="", linewidth=1)
        axis.plot(one["blind"], place, "s", color=COLORS[1], ms=5, label="blind PGD-10" * (not place))
        axis.plot(one["worst"], place, "D", color=COLORS[0], ms=5, label="worst case" * (not place))
    labels = [called(one.model, one.defense) + " ⚑" * bool(one.doubts) for one in frame.itertuples()]
    axis.set_yticks(range(len(frame)), labels)
    axis.set(xlim=(-3, 103), ylim=(len(frame) - 0.4, -0.6), xlabel="accuracy (%)", title=title)
    axis.grid(False, axis="y")


def _line(one: Mapping, best: Mapping[str, float]) -> tuple[Field, ...]:
    """One entry."""
    rank = Field() if pd.isna(one["rank"]) else Field(f"{one['rank']}", int(one["rank"]))
    names = [Field(one[name], one[name]) for name in ("model", "defense", "kind")]
    below = {"autoattack": ON[one["autoattack_on"]], "best_known": f"by {one['strongest'].replace(':last', '')}"}
    numbers = [_number(one, name, best, below.get(name, "")) for name in HEADS]
    passes = Field()
    if not pd.isna(one["forward"]):
        passes = Field(f"{one['forward']:.0f} / {one['backward']:.0f}", one["forward"] + one["backward"])
    printed = Field()
    if not pd.isna(one["reported"]):
        printed = Field(f"{one['reported']:.1f}", one["reported"], small=(one["reported_of"],))
    why = tuple(filter(None, one["unreliable"].split("; ")))
    return (rank, *names, *numbers, passes, printed, Field("yes" if why else "no", len(why), small=why))


def _number(one: Mapping, name: str, best: Mapping[str, float], below: str) -> Field:
    """An accuracy with its interval and the images behind it."""
    value = one[name]
    if pd.isna(value):
        return Field(MISSING)
    small = (f"[{one[f'{name}_low']:.0f}, {one[f'{name}_high']:.0f}]", f"n = {one[f'{name}_n']:,}", below)
    return Field(f"{value:.1f}", value, value == best.get(name), tuple(filter(None, small)))
