"""The words around a number, shared by tables and figures: units, scale, who played a role, what the attacker knew."""

import re

import pandas as pd

from robustclip import attacks
from robustclip.checks import check_choice
from robustclip.study.ledger import DUE as DUE

MISSING, STALE, FLAGGED = "–", "†", "⚑"
UNITS = {"accuracy": "accuracy (%)", "eps": "perturbation radius eps (1/255)", "steps": "attack steps", "n": "images"}
UNITS |= {"seconds": "time (s)", "forward": "images forward", "backward": "images backward"}
KNOWS = {"blind": "blind (sees only the undefended model)", "aware": "aware (sees the defended model)"}
KNOWS |= {"?": "blind or aware is not recorded"}
WORLDS = {"quick": "Tinyworld (quick)", "full": "Tinyworld (full)", "paper": "paper's data"}  # other scales: their name
SETTINGS = ["scale", "model", "defense", "dataset", "attack", "attacker", "eps", "n", "seed", "setting", "metric"]


def text_of(name: str, value: object) -> str:
    """Write a value of column `name`: a small eps in 1/255, a dash if missing."""
    if pd.isna(value) or value == "":
        return MISSING
    if not isinstance(value, float):
        return str(value)
    if name == "eps" and 0 < value <= 16 / 255:
        return f"{value * 255:.4g}/255"
    return f"{value:g}"


def ran(played_by: object) -> str:
    """Say in short what ran: "PGD, 20 steps" for PGD(eps=0.02, steps=20); empty if nothing did."""
    name = re.match(r"[\w.]+", played_by) if isinstance(played_by, str) else None
    steps = re.findall(r"\bsteps=(\d+)", played_by)[:1] if name else []
    if name and not steps:  # a repr leaves defaults out
        kinds = (getattr(attacks, kind, None) for kind in re.findall(r"(?<![\w.])[A-Za-z]\w+(?=\()", played_by))
        steps = [kind.steps for kind in kinds if isinstance(getattr(kind, "steps", None), int)][:1]
    return ", ".join([name[0].rpartition(".")[2], *(f"{count} steps" for count in steps)]) if name else ""


def played(frame: pd.DataFrame) -> str:
    """Say in short what ran under which name: "PGD, 20 steps, plays PGD-100."; empty where nothing attacked."""
    if not {"played_by", "attack"} <= set(frame.columns):
        return ""
    return _plays(frame.assign(played_by=frame["played_by"].map(ran)), "played_by", "attack", ",")


def trained(seeds: int, over: str) -> str:
    """Say what intervals `over` some images do and do not cover, by the number of training seeds behind them."""
    if seeds == 1:
        return f"With one seed of training, intervals are over {over} and say nothing about other trainings."
    return f"Intervals are a bootstrap over {seeds} seeds of training and {over}."


def scale_of(frame: pd.DataFrame) -> str:
    """Return "scale: quick"; a number without its scale is an error."""
    if "scale" not in frame:
        raise ValueError("a frame without a column 'scale' is not allowed; add it, as in frame.assign(scale='quick')")
    return f"scale: {', '.join(frame['scale'].unique())}"


def check_unique(frame: pd.DataFrame, names: list[str], value: str) -> None:
    """Check that `frame` has the columns `names` and `value` and one row for each combination of `names`."""
    for name in (*names, value):
        check_choice("column", name, frame.columns)
    if "scale" in frame and "scale" not in names and frame["scale"].nunique() > 1:
        raise ValueError(f"results are of {scale_of(frame)}; show the column 'scale' or filter by it")
    place = frame.groupby(names, dropna=False).ngroup()
    twins = frame[place.isin(place[place.duplicated()].head(1))]
    if len(twins):
        differ = [name for name in SETTINGS if name in twins and twins[name].nunique(dropna=False) > 1]
        remedy = f"they differ in {', '.join(differ)}; show that too" if differ else "drop duplicates"
        raise ValueError(f"{len(twins)} results for {twins.iloc[0][names].to_dict()}: {remedy}, or filter the frame")


def notes(frame: pd.DataFrame, shown: list[str], value: str = "accuracy") -> tuple[str, ...]:
    """Return the sentences that must stand beside the numbers of `frame`; `shown` are the columns a reader sees."""
    kind = " and ".join(frame["interval"].unique()) if "interval" in frame else "Wilson"
    what = UNITS.get(value, value) + f" with 95 % {kind} intervals" * (value == "accuracy" and "low" in frame)
    if "n" in frame and frame["n"].notna().any():
        what += ", n = " + " to ".join(dict.fromkeys(f"{n:,.0f}" for n in (frame["n"].min(), frame["n"].max())))
    cast = (_cast(frame, shown, "Data", "source", "dataset"), _cast(frame, shown, "Attack", "played_by", "attack"))
    stale = f"{STALE} Measured with an older version of the code."
    old = frame.get("stale", pd.Series(dtype=bool)).eq(True).any()
    said = (*cast, _attacker(frame, shown), _audit(frame), stale * bool(old))
    return (f"{what[0].upper()}{what[1:]}.", *filter(None, said))


def flags_of(value: object) -> list[str]:
    """The audit flags in a value of column `flags`; "passed" and "not audited" are none."""
    names = value.split("; ") if isinstance(value, str) else []
    return [name for name in names if name not in ("", "passed", "not audited")]


def audits(frame: pd.DataFrame) -> str:
    """Markdown: how many of these attacked numbers were audited, and every flag that was raised."""
    known = frame[~frame["flags"].str.contains("not audited") & (frame["flags"] != "")]
    raised = [
        f"- {row['dataset']}, {row['model']}, {row['attack']}: {', '.join(flags)}"
        for row in known.to_dict("records")
        if (flags := flags_of(row["flags"]))
    ]
    said = f"The audit looked at {len(known)} of {len(frame)} attacked numbers and raised flags on {len(raised)}."
    return "\n".join([said, "", *raised])


def _audit(frame: pd.DataFrame) -> str:
    """Say how many attacked numbers were audited and passed, and which flags the others carry."""
    known = frame.get("flags", pd.Series(dtype=object)).fillna("")
    known = known[known != ""]
    if known.empty:
        return ""
    flags = sorted({name for value in known for name in flags_of(value)})
    audited = (~known.str.contains("not audited")).sum()
    said = [f"{(known == 'passed').sum()} of {audited} audited numbers passed"] * bool(audited)
    said += [f"{len(known) - audited} not audited" if audited else "not audited"] * bool(audited < len(known))
    said += [f"{FLAGGED} flagged: {', '.join(flags)}"] * bool(flags)
    return f"Audit: {', '.join(said)}."


def _cast(frame: pd.DataFrame, shown: list[str], what: str, player: str, role: str) -> str:
    """Say which set or attack plays which of the papers'; its eps in 1/255, unless the reader sees that anyway."""
    if not {player, role} <= set(frame.columns):
        return f"{what}: what plays the papers' names is not recorded."
    known = frame[frame[player].fillna("") != ""].astype({player: str})
    budget = (lambda found: "eps") if "eps" in shown else (lambda found: text_of("eps", float(found[0])))
    players = known[player].str.replace(r"(?<=\beps=)[\d.e-]+", budget, regex=True)
    plays = _plays(known.assign(**{player: players}), player, role)
    return f"{what}: {plays}" if plays else ""


def _plays(frame: pd.DataFrame, player: str, role: str, comma: str = "") -> str:
    known = frame[(frame[player] != "") & (frame[player] != frame[role])].groupby(player, sort=False)[role]
    plays = "; ".join(f"{name}{comma} plays {', '.join(roles.unique())}" for name, roles in known)
    return f"{plays}." * bool(plays)


def _attacker(frame: pd.DataFrame, shown: list[str]) -> str:
    """Say what the attackers knew; blind and aware numbers may not be mixed without showing which is which."""
    blank = pd.Series("?", index=frame.index)
    none = {name: frame.get(name, blank).fillna("none").isin(("none", "clean", "")) for name in ("attack", "defense")}
    defended = frame[~none["attack"] & ~none["defense"]]
    if defended.empty:
        return "" if none["attack"].all() else "Attacker: no test-time defense, so blind and aware are the same."
    known = sorted(defended.get("attacker", blank).fillna("?").unique())
    if len(known) > 1 and "attacker" not in shown:
        raise ValueError(f"attacked numbers are {' and '.join(known)}; show the column 'attacker' or filter by it")
    return f"Attacker: {'; '.join(KNOWS[check_choice('attacker', name, KNOWS)] for name in known)}."
