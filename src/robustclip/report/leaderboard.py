"""The leaderboard as a page shows it: a row per entry, with an interval and n below each number."""

from collections.abc import Mapping

import pandas as pd

from robustclip.report.tables import Field, HtmlTable
from robustclip.report.words import MISSING

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
