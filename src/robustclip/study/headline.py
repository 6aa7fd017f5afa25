"""What holds, in five sentences: computed from what is shipped, for the front page and the README.

print("\\n".join(sentences({"photo": rows(scale("photo")), "full": rows(scale("full"))})))
"""

from collections.abc import Mapping

import pandas as pd

from robustclip.study import finetuning
from robustclip.study.claims import Verdict
from robustclip.study.ledger import DUE, in_both, ledger

KEEPS = 5.0  # points over CLIP alone that we call something
AMONG = {"photo": "on photographs", "full": "in Tinyworld", "quick": "in Tinyworld, a small run"}
GATED = ("-open", "-reversed", "-calibrated")  # ends of names: other gates than the published ones, of our own
WORDS = (*map(str, Verdict), DUE)


def sentences(boards: Mapping[str, pd.DataFrame]) -> list[str]:
    """Claims, defenses at test time, fine-tuning, the best of all, and the two worlds; `boards` are by scale.

    The first scale is the one that the sentences on models speak of.
    """
    claims = ledger(list(boards))
    claims = claims[~claims["ours"].astype(bool)]
    first = next(iter(boards))
    board = boards[first]
    told = [claimed(claims), *(make(board, AMONG[first]) for make in (at_test_time, tuned, best))]
    return [one for one in [*told, agreement(claims)] if one]


def claimed(claims: pd.DataFrame) -> str:
    """How many claims got which word, in each world."""
    counts = {scale: part["verdict"].value_counts() for scale, part in claims.groupby("scale", sort=False)}
    parts = [
        f"{AMONG[scale]} " + ", ".join(f"{found[word]} {word}" for word in WORDS if word in found)
        for scale, found in counts.items()
    ]
    return f"{claims['id'].nunique()} claims of {claims['paper'].nunique()} papers: {'; '.join(parts)}."


def at_test_time(board: pd.DataFrame, among: str) -> str:
    """What defenses around the undefended CLIP keep under blind attackers, and under those who know."""
    on_clip = board[(board["model"] == "CLIP") & ~board["defense"].str.endswith(GATED)]
    alone = on_clip[on_clip["defense"] == "none"]
    around = on_clip[(on_clip["defense"] != "none") & on_clip["worst"].notna()]
    if alone.empty or around.empty:
        return ""
    plain = alone.iloc[0]
    blind, worst = ((around[name] - plain[name] >= KEEPS).sum() for name in ("blind", "worst"))
    surely = (around["worst_low"] - plain["worst"] >= KEEPS).sum()
    top = around.iloc[0]
    return (
        f"Of {len(around)} defenses at test time around an undefended CLIP, {blind} keep at least {KEEPS:.0f} points "
        f"more than CLIP alone under the papers' blind PGD, and {worst} once attackers who know the defense count, "
        f"{surely} of them with the whole interval ({among}); the best, {top['defense']}, falls from "
        f"{top['blind']:.0f} to {shown(top, 'worst')}."
    )


def tuned(board: pd.DataFrame, among: str) -> str:
    """The recipe of fine-tuning that keeps most at equal budget, of those that have a page."""
    bare = board[board["model"].isin(finetuning.MAIN) & (board["defense"] == "none")]
    models = bare[bare["worst"].notna()]
    if models.empty:
        return ""
    top, last = models.iloc[0], models.iloc[-1]
    return (
        f"Of {len(models)} recipes of adversarial fine-tuning with one budget, {top['model']} keeps most in the worst "
        f"case, {shown(top, 'worst')}, at {top['clean']:.0f} % on clean images, and {last['model']} least, "
        f"{shown(last, 'worst')} ({among})."
    )


def best(board: pd.DataFrame, among: str) -> str:
    """The first line of the leaderboard."""
    ranked = board[board["worst"].notna()]
    if ranked.empty:
        return ""
    top = ranked.iloc[0]
    behind = "" if top["defense"] == "none" else f" behind {top['defense']}"
    return (
        f"Best of all {len(ranked)} entries of the leaderboard is {top['model']}{behind} ({top['kind']}): it keeps "
        f"{shown(top, 'worst')} in the worst case over all attacks on images, {top['clean']:.0f} % on clean ones "
        f"({among})."
    )


def agreement(claims: pd.DataFrame) -> str:
    """On how many claims that both worlds can test they say the same word."""
    scales = list(claims["scale"].unique())
    words = in_both(claims, *scales) if len(scales) == 2 else ()
    if not len(words):
        return ""
    same = (words[scales[0]] == words[scales[1]]).sum()
    return (
        f"The two worlds, photographs and drawings, give the same word on {same} of {len(words)} claims that both test."
    )


def shown(one: pd.Series, name: str) -> str:
    """A number in % with its interval."""
    return f"{one[name]:.0f} % [{one[f'{name}_low']:.0f}, {one[f'{name}_high']:.0f}]"
