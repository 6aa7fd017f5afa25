"""The command line: measure cells, plan them, ship results and measure them again, look into the store.

Nothing heavy is imported before a command needs it, so `--help` answers at once. Exit codes: 0 done, 1 something failed
on the way (what was finished is kept), 2 the command itself was wrong.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from robustclip import study
    from robustclip.audit import Audit
    from robustclip.cluster import Resources
    from robustclip.study import Cell

app = typer.Typer(
    help="Attacks on CLIP and defenses against them, measured cell by cell.",
    epilog="Start with `robustclip run --role cifar10`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Recipes = Annotated[list[str], typer.Option("--recipe", help="FT-standard, TeCoA, MMCoA, AdvPT, VP ...")]
CELL = ("model", "role", "attack", "attacker", "defense", "eps", "n")  # columns that say what was measured
Scale = Annotated[str, typer.Option(help="quick, full, photo, paper, or a .toml file of your own.")]
Models = Annotated[list[str], typer.Option("--model", help="A model of the scale, or anything models.load takes.")]
Roles = Annotated[list[str] | None, typer.Option("--role", help="A data set, by its role [default: all of the scale].")]
Attacks = Annotated[list[str], typer.Option("--attack", help="clean, noise, PGD-100, AutoAttack, BERT-Attack ...")]
Attackers = Annotated[list[str], typer.Option("--attacker", help="blind or aware of the defense.")]
Defenses = Annotated[list[str], typer.Option("--defense", help="none, TTC, SCC, COLA, TTE, DOC ... at test time.")]
Budgets = Annotated[list[str] | None, typer.Option("--eps", help="Budget, like 4/255 [default: the scale's].")]
Seeds = Annotated[list[int], typer.Option("--seed", help="Random seed of attacks and defenses.")]
Audited = Annotated[int, typer.Option("--audit", min=0, help="Audit image attacks on this many images.")]
Batch = Annotated[int | None, typer.Option("--batch-size", min=1, help="Images at once [default: the scale's].")]
Images = Annotated[int | None, typer.Option("--n", help="Images per role [default: the scale's].")]
Shard = Annotated[str, typer.Option(help="Part i of n of the cells, like 2/4, to split a grid by hand.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Folder = Annotated[Path | None, typer.Option("--store", help="Folder of results [default: ROBUSTCLIP_RUNS, or runs].")]
Executor = Annotated[str | None, typer.Option(help="Send jobs to slurm, or try it with local [default: do it here].")]
Jobs = Annotated[int, typer.Option(help="With an executor: into how many jobs to divide the work, at most.")]
Partition = Annotated[str | None, typer.Option(help="Of Slurm; account and QOS come from SBATCH_ACCOUNT, SBATCH_QOS.")]
Minutes = Annotated[int, typer.Option(help="With an executor: time limit of a job, which is then requeued.")]
Gpus = Annotated[int, typer.Option(help="With an executor: GPUs of a job; several train one model together.")]
Cpus = Annotated[int, typer.Option(help="With an executor: processor cores of a job.")]
SENT = ("executor", "jobs", "partition", "minutes", "gpus", "cpus")
Gates = Annotated[bool, typer.Option("--gates/--no-gates", help="At scale paper, first meet what papers print.")]
Machine = Annotated[bool, typer.Option("--json", help="Machine-readable on standard output.")]


@contextmanager
def _exit_code(code: int) -> Iterator[None]:
    """Show an expected error as one line, without a traceback, and leave with `code`."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(code) from error


def _select(scale: str, models: Sequence[str], shard: str, device: str, **options: Any) -> "list[Cell]":
    """The cells that the options of `run` and `plan` name; whatever is wrong with them is bad usage.

    If all roles are asked for, standard error says which no set plays.
    """
    from robustclip import study
    from robustclip.models import pick_device

    pick_device(device)
    chosen = study.scale(scale)
    specs = {name: chosen.model(name) if name in chosen.models else name for name in models}
    if "defenses" in options:
        options["defenses"] = {name: chosen.defense(name) for name in options["defenses"]}
    given = {name: value for name, value in options.items() if value not in (None, [], ())}
    cells = study.grid(chosen, specs, **given)
    for name, why in ({} if "roles" in given else chosen.missing).items():
        typer.echo(f"no set plays {name} at scale {chosen.name}: {why}", err=True)
    part, parts = _shard(shard, len(cells))
    return cells[part - 1 :: parts]


def _shard(shard: str, most: int = 10_000) -> tuple[int, int]:
    """Part i of n from "i/n"."""
    part, _, parts = shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts) <= most):
        raise ValueError(f"shard={shard!r} is not allowed; write i/n with 1 <= i <= n <= {most}, like 2/4")
    return int(part), int(parts)


def _show(frame: "pd.DataFrame", columns: Sequence[str], as_json: bool) -> None:
    """Print a table: everything as JSON, or some columns for people, eps in 1/255."""
    if as_json:
        typer.echo(json.dumps(_records(frame), indent=1))
        return
    frame = frame.assign(eps=[f"{255 * eps:g}/255" if eps else "" for eps in frame["eps"]])
    typer.echo(frame.to_string(columns=list(columns), index=False, na_rep="?", float_format="{:.1f}".format))


def _records(frame: "pd.DataFrame") -> list[dict]:
    """The rows as JSON knows them: numbers in full, None for what is missing."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _divided(context: typer.Context, most: int) -> list[dict]:
    """The parts of the work, `most` at most, as a job each gets them."""
    if context.params["shard"] != "1/1":
        raise ValueError("--shard and --executor both divide the work; give one of them")
    parts = min(context.params["jobs"], most)
    return [{"shard": f"{part}/{parts}"} for part in range(1, parts + 1)]


def _resources(context: typer.Context) -> "Resources | None":
    """What each job is to get; None if the work is done here."""
    from robustclip.cluster import Resources

    asked = {name: context.params[name] for name in SENT if name in context.params}
    return Resources(**asked) if asked["executor"] is not None else None


def _send(context: typer.Context, resources: "Resources", changes: list[dict]) -> None:
    """Give the cluster the command that is running, once per change of its options."""
    from robustclip import cluster, study

    with _exit_code(1):
        commands, root = [_again(context, change) for change in changes], study.Store(context.params["store"]).root
        numbers = cluster.submit(commands, resources, root)
    typer.echo(f"{len(numbers)} jobs sent, {numbers[0]} to {numbers[-1]}; `robustclip status` shows how they fare.")
    typer.echo("When they are done, the same command without --executor shows what they found and does what is left.")


def _again(context: typer.Context, change: dict) -> list[str]:
    """The words of the running command with some options changed and without those that send it to a cluster."""
    words = [context.info_name or ""]
    for option in context.command.params:
        value = change.get(option.name, context.params[option.name])
        if option.name in SENT or value in (None, [], ()):
            continue
        if isinstance(value, bool):
            words += (option.opts if value else option.secondary_opts)[:1]
            continue
        words += [word for one in (value if isinstance(value, list | tuple) else [value])
                  for word in (option.opts[0], str(one))]  # fmt: skip
    return words


@app.command()
def run(
    context: typer.Context, scale: Scale = "quick", model: Models = ("clip",), role: Roles = None,
    attack: Attacks = ("clean", "PGD-100"), attacker: Attackers = ("blind",), defense: Defenses = ("none",),
    eps: Budgets = None, seed: Seeds = (0,), n: Images = None, shard: Shard = "1/1", device: Device = "auto",
    batch_size: Batch = None, audit: Audited = 0, store: Folder = None, as_json: Machine = False,
    executor: Executor = None, jobs: Jobs = 8, partition: Partition = None, minutes: Minutes = 240, gpus: Gpus = 0,
    cpus: Cpus = 1, gated: Gates = True,
) -> None:  # fmt: skip
    """Measure all combinations of the options and print accuracies with 95 % intervals.

    Finished cells are taken from the store; an interrupted run goes on where it stopped: give the same command again.
    What is missing is told before a model is fetched. At scale paper a run stops where undefended CLIP is far from
    what papers print.

    \b
    robustclip run --role cifar10 --role imagenet --attack clean --attack PGD-20
    robustclip run --role cifar10 --attack PGD-100 --eps 2/255 --eps 4/255 --n 1000
    robustclip run --role cifar10 --defense TTC --attack PGD-10:last --attack aware --attacker blind --attacker aware
    robustclip run --scale full --shard 1/2 & robustclip run --scale full --shard 2/2
    robustclip run --scale paper --executor slurm --jobs 20 --partition gpu --gpus 1
    """
    with _exit_code(2):
        options = {"roles": role, "attacks": attack, "attackers": attacker, "eps": eps, "seeds": seed, "n": n}
        options["defenses"] = defense
        resources = _resources(context)
        cells = _select(scale, model, shard, "cpu" if resources else device, **options)
        parts = _divided(context, len(cells)) if resources else []
    from robustclip.study import evaluate, gates, preflight

    with _exit_code(1):
        preflight.prepare(cells, store)
    if resources:
        return _send(context, resources, parts)
    with _exit_code(1):
        for finding in gates.hold(cells, store, device, batch_size) if gated else ():
            typer.echo(str(finding), err=True)
        results = evaluate(cells, store, device, batch_size, audit)
    _show(
        results,
        (*CELL, "played_by", "metric", "accuracy", "low", "high", "flags", "source", "origin", "stale"),
        as_json,
    )


@app.command()
def audit(
    scale: Scale = "quick",
    model: Annotated[str, typer.Option(help="A model of the scale, or anything models.load takes.")] = "clip",
    role: Annotated[str, typer.Option(help="A data set, by its role.")] = "cifar10",
    attack: Annotated[str, typer.Option(help="The image attack to trust or not: PGD-20, APGD-CE ...")] = "PGD-100",
    attacker: Annotated[str, typer.Option(help="blind or aware of the defense.")] = "aware",
    defense: Annotated[str, typer.Option(help="A defense at test time: TTC, SCC, COLA ...")] = "none",
    eps: Annotated[str | None, typer.Option(help="Budget, like 4/255 [default: the scale's].")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the attack.")] = 0,
    n: Annotated[int, typer.Option(min=1, help="Images to look at.")] = 100,
    device: Device = "auto",
    store: Folder = None,
    as_json: Machine = False,
    classifier: Annotated[
        str, typer.Option(help="module:build of your own, which returns pixels in [0, 1] -> logits; needs --data.")
    ] = "",
    data: Annotated[
        Path | None, typer.Option(help="Its pictures: a folder with a folder per class, or with test.parquet.")
    ] = None,
    size: Annotated[int, typer.Option(min=0, help="Pixels a side of its pictures [default: as they are].")] = 0,
) -> None:
    """Ask whether the robustness of a model under an attack is real; the flags are stored with the result.

    With --classifier it is asked of any classifier on pictures of your own, at 4/255 unless --eps says otherwise, and
    nothing is stored. Exit code 1 if a check raises a flag.

    \b
    robustclip audit --role cifar10 --attack PGD-20
    robustclip audit --model runs/checkpoints/tecoa --attack APGD-CE --eps 4/255 --n 200
    robustclip audit --defense TTC --attack aware --n 50
    robustclip audit --classifier my_module:build --data pictures --size 224 --attack PGD-20
    """
    if classifier or data or size:
        given = {"scale": scale != "quick", "model": model != "clip", "role": role != "cifar10", "store": store}
        given |= {"defense": defense != "none", "attacker": attacker != "aware"}
        _audit_foreign(classifier, data, size, attack, eps or "4/255", n, seed, device, as_json, given)
        return
    with _exit_code(2):
        options = {"roles": [role], "attacks": [attack], "eps": eps and [eps], "seeds": [seed], "n": n}
        options |= {"attackers": [attacker], "defenses": [defense]}
        cells = _select(scale, [model], "1/1", device, **options)
    from robustclip import study
    from robustclip.study import preflight

    with _exit_code(1):
        preflight.prepare(cells, store)
        found = study.audit_cell(cells[0], store, device)
    _show_audit(found, as_json)


def _audit_foreign(
    classifier: str, data: Path | None, size: int, attack: str, eps: str, n: int, seed: int, device: str, as_json: bool,
    given: dict[str, Any],
) -> None:  # fmt: skip
    """The audit of a classifier that is none of the book's; `given` says which options that only those have are set."""
    with _exit_code(2):
        if not (classifier and data):
            raise ValueError("--classifier, --data and --size belong together; give --classifier and --data at least")
        for name in (name for name, there in given.items() if there):
            raise ValueError(f"--{name} is for models of the book; leave it out beside --classifier")
        from robustclip.study import foreign

        chosen = foreign.attack(attack, eps, seed)
        built, samples = foreign.build(classifier, device), foreign.pictures(data, n, size)
    with _exit_code(1):
        found = foreign.audited(built, samples, chosen, seed)
    clean, attacked = (f"{one.value:.1f} % [{one.low:.1f}, {one.high:.1f}]" for one in (found.clean, found.attacked))
    if found.clean.value <= found.chance:
        guess = f"where a constant guess is right on {found.chance:.1f} %"
        typer.echo(f"right on {clean}, {guess}: are the classes in the order of the logits?", err=True)
    if not as_json:
        typer.echo(f"right on {clean} of {found.n} images, under {chosen!r} on {attacked}")
    shares = {"clean": found.clean._asdict(), "attacked": found.attacked._asdict(), "n": found.n}
    _show_audit(found.audit, as_json, **shares)


def _show_audit(found: "Audit", as_json: bool, **more: Any) -> None:
    """The findings of an audit, and in JSON what else is known; leave with 1 if there is a flag."""
    if as_json:
        typer.echo(json.dumps({"flags": list(found.flags), "findings": _records(found.frame()), **more}, indent=1))
    else:
        for finding in found.findings:
            verdict = {True: "FLAG", False: "pass", None: "    "}[finding.flagged]
            typer.echo(f"{verdict}  {finding.check:15} {finding.text}")
    if found.flags:
        raise typer.Exit(1)


@app.command()
def train(
    context: typer.Context,
    recipe: Recipes,
    scale: Scale = "quick",
    role: Annotated[str, typer.Option(help="The data set to learn from, by its role.")] = "cifar10",
    shots: Annotated[
        list[int] | None, typer.Option("--shots", min=1, help="Pictures per class [default: all].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of pictures, order and attacks.")] = 0,
    device: Device = "auto",
    store: Folder = None,
    as_json: Machine = False,
    executor: Executor = None,
    partition: Partition = None,
    minutes: Minutes = 240,
    gpus: Gpus = 0,
    cpus: Cpus = 1,
) -> None:
    """Fine-tune the scale's CLIP and print the folders of the models, which --model takes.

    Models that the store holds are not trained again; an interrupted run goes on. With torchrun, several processes
    share every batch. An executor gets one job for each recipe and number of pictures.

    \b
    robustclip train --recipe TeCoA --recipe MMCoA --role cifar100
    robustclip train --scale full --recipe MMCoA --role imagenet --shots 5
    torchrun --nproc-per-node 2 --no-python robustclip train --scale full --recipe MMCoA
    robustclip train --scale paper --recipe TeCoA --recipe MMCoA --executor slurm --gpus 8
    """
    from robustclip import study
    from robustclip.study import preflight
    from robustclip.training.parallel import joined, world

    with _exit_code(2):
        chosen, resources = study.scale(scale), _resources(context)
        for name in recipe:
            chosen.recipe(name, seed=seed)
    with _exit_code(1):
        preflight.prepare_training(chosen, role, store)
    if resources:
        parts = [{"recipe": [name], "shots": some} for name in recipe for some in shots or [None]]
        return _send(context, resources, parts)
    with _exit_code(1), joined():
        models = study.fine_tuned(chosen, recipe, role, shots or [None], seed, store, device)
        found = {name: str(model.folder()) for name, model in models.items()}
        if not world()[0]:
            typer.echo(json.dumps(found, indent=1) if as_json else "\n".join(f"{n}  {f}" for n, f in found.items()))


@app.command()
def plan(
    scale: Scale = "quick", model: Models = ("clip",), role: Roles = None, attack: Attacks = ("clean", "PGD-100"),
    attacker: Attackers = ("blind",), defense: Defenses = ("none",), eps: Budgets = None, seed: Seeds = (0,),
    n: Images = None, shard: Shard = "1/1", device: Device = "auto", store: Folder = None, as_json: Machine = False,
    recipe: Recipes = (),
) -> None:  # fmt: skip
    """Say what `run` with the same options would take at most; nothing is measured, stored or downloaded.

    With --recipe, say what an epoch of fine-tuning takes instead.

    \b
    robustclip plan --scale paper
    robustclip plan --scale paper --recipe TeCoA --recipe MMCoA --role cifar10 --role imagenet
    """
    if recipe:
        from robustclip import study

        with _exit_code(2):
            costs = study.plan_training(scale, recipe, role or ["cifar10"])
        text = costs.to_string(index=False, na_rep="?", float_format="{:,.0f}".format)
        text += f"\n\n{len(costs)} trainings, {costs['seconds'].sum() / 3600:.2g} hours"
        typer.echo(json.dumps(_records(costs), indent=1) if as_json else text)
        return
    with _exit_code(2):
        options = {"roles": role, "attacks": attack, "attackers": attacker, "eps": eps, "seeds": seed, "n": n}
        options["defenses"] = defense
        cells = _select(scale, model, shard, device, **options)
    from robustclip import study

    with _exit_code(1):
        costs = study.plan(cells, store, device)
    _show(costs, (*CELL, "forward", "backward", "seconds", "megabytes"), as_json)
    if not as_json:
        forward, backward, seconds, megabytes = costs[["forward", "backward", "seconds", "megabytes"]].sum()
        known, unknown = ", ".join(costs["estimate"].unique()), costs["megabytes"].isna().sum()
        typer.echo(f"\n{len(costs)} cells, {forward:,.0f} image passes forward and {backward:,.0f} backward,")
        typer.echo(f"{seconds / 3600:.2g} hours (speed {known}), {megabytes / 1e3:.3g} GB to download", nl=False)
        typer.echo(f" and {unknown} sets of unknown size." if unknown else ".")


@app.command()
def leaderboard(
    scale: Scale = "quick",
    model: Annotated[str, typer.Option(help="A model of the table, a folder, or anything models.load takes.")] = "clip",
    defense: Annotated[str, typer.Option(help="module:Name of your own, or a name of the table.")] = "none",
    attack: Annotated[str, typer.Option(help="module:Name of your own, or a name, beside those of the protocol.")] = "",
    n: Annotated[int, typer.Option(min=0, help="Images per set of your own entry [default: the scale's].")] = 0,
    device: Device = "auto",
    store: Folder = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the whole table there, as JSON.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the whole table there, as CSV.")] = None,
) -> None:
    """Show all models and defenses by what an attacker who knows them leaves; or measure your own by the same protocol.

    A module is a .py file of the current folder, or an installed one. A defense is a class with `logits`, or a function
    from a classifier to a classifier; an attack is called with (classifier, images, labels) and returns images.

    \b
    robustclip leaderboard --scale photo --json board.json
    robustclip leaderboard --defense my_module:MyDefense
    robustclip leaderboard --defense TTC --attack my_module:MyAttack --n 20
    robustclip leaderboard --model ViT-B-32/openai --scale paper
    """
    from robustclip import study
    from robustclip.study import entry, leaderboard

    own = model != "clip" or defense != "none" or attack != ""
    with _exit_code(2):
        chosen = study.scale(scale)
        found = entry.propose(chosen, model, defense, attack, device) if own else None
    with _exit_code(1):
        board, told = leaderboard.rows(chosen, store, device), []
        near = board
        if found:
            mine = entry.measure(found, n, store, device)
            board, place = entry.placed(board, mine)
            near, told = board.iloc[max(place - 3, 0) : place + 4], entry.said(board, place, mine, found.attack_name)
        typer.echo(leaderboard.text(near))
        typer.echo("\n".join(told), nl=bool(told))
        for path, content in (
            (json_file, json.dumps(_records(board), indent=1)),
            (csv_file, board.to_csv(index=False)),
        ):
            if path:
                path.write_text(content, encoding="utf-8")


@app.command()
def export(
    scale: Scale = "quick",
    store: Annotated[
        list[Path] | None, typer.Option(help="Folders of results, merged [default: one, as usual].")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder with one folder per scale [default: what is shipped].")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what is shipped so far.")] = False,
) -> None:
    """Write what stores hold of a scale to the results that travel with the package.

    \b
    robustclip export --scale full
    robustclip export --scale full --store runs --store /from/another/machine/runs
    """
    from robustclip import study

    with _exit_code(2):
        name = _name(scale)
    with _exit_code(1):
        written = study.export(name, store or [None], out, fresh)
        for corrupt in _corrupt(store or [None]):
            typer.echo(f"left out: {corrupt}", err=True)
    typer.echo(written.to_string(index=False))


@app.command()
def reproduce(
    context: typer.Context, scale: Scale = "full", shard: Shard = "1/1", store: Folder = None, device: Device = "auto",
    sample: Annotated[int | None, typer.Option(min=1, help="Only so many cells, by lot.")] = None,
    as_json: Machine = False, executor: Executor = None, jobs: Jobs = 8, partition: Partition = None,
    minutes: Minutes = 240, gpus: Gpus = 0, cpus: Cpus = 1, gated: Gates = True,
    role: Annotated[list[str] | None, typer.Option("--role", help="At scale paper, only the gates on these.")] = None,
) -> None:  # fmt: skip
    """Measure exactly the shipped cells of a scale again and compare every answer; exit code 1 if one differs.

    Results go to the store: a run that was stopped goes on where it was. `export` then ships the new ones. At scale
    paper, of which nothing is shipped, the gates are measured: numbers that papers print; exit code 1 if one fails,
    at once unless --no-gates is given.

    \b
    robustclip reproduce --scale full
    robustclip reproduce --scale full --shard 1/2 & robustclip reproduce --scale full --shard 2/2
    robustclip reproduce --scale paper --role pets --role flowers102
    """
    from robustclip import study

    with _exit_code(2):
        name, parts, resources = _name(scale), _shard(shard), _resources(context)
        printed = not study.shipped_records(name) and study.scale(scale).world == "paper"
        if printed and (sample or shard != "1/1"):
            raise ValueError(
                f"--sample and --shard choose shipped cells, scale {name!r} has none; choose gates by --role"
            )
        if printed and not resources:
            return _printed(study.scale(scale), role, store, device, as_json, gated)
        divided = [] if not resources else [{}] if printed else _divided(context, jobs)  # gates wait for each other
    if resources:
        return _send(context, resources, divided)
    with _exit_code(1):
        found = study.reproduce(name, parts, store, device, sample)
    _differ(found, found["flips"], as_json, "cells measured again")


def _printed(scale: "study.Scale", roles: list[str] | None, store: Path | None, device: str, as_json: bool,
             gated: bool) -> None:  # fmt: skip
    """Measure the gates of a scale beside what is printed."""
    import pandas as pd

    from robustclip.study import gates, preflight

    chosen = [(gate, gate.cells(scale)) for gate in gates.playable(scale, roles)]
    if not chosen:
        raise ValueError(f"no gate is on roles {roles or scale.roles}; give some of: {', '.join(gates.roles(scale))}")
    with _exit_code(1):
        preflight.prepare([cell for _, own in chosen for cell in own], store)
        found = []
        for gate, own in chosen:
            found.append(gates.measured(gate, own, store, device))
            if found[-1].verdict == "fails" and gated:
                break
    frame = pd.DataFrame([gates.row(one) for one in found])
    typer.echo(json.dumps(_records(frame), indent=1) if as_json else frame.to_string(index=False, na_rep="?",
               float_format="{:.2f}".format))  # fmt: skip
    failed = [one for one in found if one.verdict == "fails"]
    for one in failed:
        typer.echo(f"error: {one}; usual causes: {gates.CAUSES}", err=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def confirm(
    scale: Scale = "full", store: Folder = None, device: Device = "auto", as_json: Machine = False,
    since: Annotated[str | None, typer.Option(help="A commit: confirm single definitions edited since then.")] = None,
) -> None:  # fmt: skip
    """After a change of code: measure a sample of the shipped cells it touches; if no answer changed, they stay valid.

    At least three cells for each component that changed, and the first updates of one training per recipe. What was
    found is kept beside the results. Exit code 1 if an answer changed: then the cells are due again.

    With --since, each definition that was edited since a commit is looked at by itself: cells that reach it answer by
    the code of then and of now, on this machine. Without a flip it counts as what it was, for artifacts, too.

    \b
    robustclip confirm --scale full
    robustclip confirm --scale quick --since HEAD
    """
    from robustclip import study

    with _exit_code(2):
        name = _name(scale)
        if since and (store or device != "auto"):
            raise ValueError("--since compares on the processor and keeps no cells; leave --store and --device out")
        edited = study.edited_since(since) if since else []
    with _exit_code(1):
        found = study.confirm_edits(edited, since, name) if since else study.confirm(name, store, device)
    bad, what = ~found["confirmed"].astype(bool), "edited definitions" if since else "changed components"
    _differ(found, bad & (found["cells"] > 0) if since else bad, as_json, what)


def _differ(found: "pd.DataFrame", bad: "pd.Series", as_json: bool, what: str) -> None:
    """Show what was compared; leave with 1 if anything differs."""
    count = int((bad.isna() | bad.astype(bool)).sum())
    text = found.to_string(index=False, na_rep="another name") + "\n" if len(found) else ""
    typer.echo(json.dumps(_records(found), indent=1) if as_json else f"{text}{len(found)} {what}, {count} differ")
    if count:
        raise typer.Exit(1)


def _name(scale: str) -> str:
    """The name under which the results of a scale are kept; it has to exist, or to have some."""
    from robustclip import study

    folder, path = study.shipped_folder(), Path(scale)
    if path.suffix != ".toml" and not (folder and (folder / scale).is_dir()):
        study.scale(scale)
    return path.stem if path.suffix == ".toml" else scale


def _corrupt(stores: "Sequence[Path | None]") -> list[str]:
    from robustclip import study

    found = [study.Store(one).status(study.is_stale) for one in stores]
    return [problem for frame in found for problem in frame["problem"] if problem]


@app.command()
def status(
    store: Folder = None,
    clean: Annotated[bool, typer.Option("--clean", help="Remove temporary files of killed processes.")] = False,
    as_json: Machine = False,
) -> None:
    """List what the store holds: results that are done, stale (of other code), partial or corrupt; jobs; versions."""
    from robustclip import cluster, study

    found = study.Store(store)
    removed = found.clean() if clean else 0
    files, about = found.status(study.is_stale), {"store": str(found.root), **study.versions()}
    jobs = cluster.job_table(found.root)
    if as_json:
        typer.echo(json.dumps(about | {"files": _records(files), "jobs": _records(jobs)}, indent=1))
        return
    typer.echo("  ".join(f"{name} {value}" for name, value in about.items()))
    if files.empty:
        typer.echo("The store is empty; measure something with `robustclip run --role cifar10`.")
    for (scale, state), group in files.groupby(["scale", "state"]):
        typer.echo(f"{scale}: {len(group)} {state}")
    for state, group in jobs.groupby("state"):
        where = f"; read {group['log'].iloc[-1]}" if state in ("failed", "lost") else ""
        typer.echo(f"jobs: {len(group)} {state} ({group['job'].iloc[0]} to {group['job'].iloc[-1]}){where}")
    typer.echo("\n".join([*filter(None, files["problem"]), *[f"{removed} leftovers removed"] * bool(removed)]))


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"robustclip {version('robustclip')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")] = False,
) -> None:
    """Options of all commands."""


def main() -> None:
    """Entry point of the `robustclip` command."""
    app(prog_name="robustclip")


if __name__ == "__main__":
    main()
