"""The command line `ntk-awt`: arguments from the config dataclasses, progress bars, exit codes.

Exit code 0: done; 1: a check failed; 2: bad input, with one line that says what to change; 130
and 143: interrupted by Ctrl-C or SIGTERM, with the command that resumes (`interrupts`); 141: nobody
reads the output any more.
"""

import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text
from tyro.conf import OmitArgPrefixes, Positional, arg

from ntk_awt import files
from ntk_awt.app import config as configs
from ntk_awt.app.config import RunConfig
from ntk_awt.app.interrupts import at_end, install, kept, leave, line
from ntk_awt.app.verdicts import NOT_JUDGED, Verdict, count, of_run, verdict
from ntk_awt.errors import InputError, check_count, choose


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Left to `main`: Rich would exit with 1."""
        raise BrokenPipeError


console = _Console(stderr=True)


# ---------------------------------------------------------------- progress


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g} {task.fields['unit']}/s" if speed else "compiling")


class Bars:
    """Progress bars with rates and time left, on the terminal's error stream."""

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Callable[[float], None]]:
        """See `run.writer.Reporter.bar`."""
        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(label, total=total, unit=unit)
            yield lambda done: progress.update(task, completed=done)

    @contextmanager
    def status(self, label: str) -> Iterator[None]:
        """What is being done, and since when, on a terminal; for work of unknown length."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        silent = not console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=silent) as progress:
            progress.add_task(label, total=None)
            yield


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Python's warnings as one line each, above the progress bars; the same text once."""
    said: set[str] = set()

    def show(message: Warning | str, *rest: object) -> None:
        text = " ".join(str(message).split())
        if text not in said:
            said.add(text)
            console.print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


# ---------------------------------------------------------------- commands


@dataclass(frozen=True)
class Settings:
    """What `run` and `ticket` take: every setting, and where to keep the run."""

    config: OmitArgPrefixes[RunConfig]
    run_dir: Path | None = None
    """Folder of the run; runs/NAME, a name made from the settings, if not given."""

    @property
    def root(self) -> Path:
        """The run folder."""
        return self.run_dir or Path("runs") / configs.run_name(self.config)


@dataclass(frozen=True)
class RunSettings(Settings):
    """What `run` takes."""

    strict: bool = False
    """Exit with 1 if a hygiene check of a network fails."""


@dataclass(frozen=True)
class SweepSettings:
    """What `run` takes with the config file of a sweep."""

    quick: bool = False
    """Apply the file's table [sweep.quick]: fewer seeds, a shorter training."""
    seeds: tuple[int, ...] | None = None
    """Only these seeds, in place of the file's: several calls can share the work."""
    densities: tuple[float, ...] | None = None
    """Only these densities, in place of the file's."""
    data_dir: Path | None = None
    """Folder of the data files; else the environment variable NTK_AWT_DATA (or its sub-folder)."""
    run_dir: Path | None = None
    """Folder of the sweep; runs/NAME (NAME-quick) of the config file, if not given."""
    strict: bool = False
    """Exit with 1 if a hygiene check of a network fails."""


def run_sweep(path: Path, settings: SweepSettings) -> int:
    """Networks × densities × seeds as one resumable experiment, gathered in one page."""
    from ntk_awt.app import sweep

    config = sweep.load(path, quick=settings.quick)
    changes = {"seeds": settings.seeds, "densities": settings.densities}
    config = dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})
    if settings.data_dir is not None:
        images = dataclasses.replace(config.base.data, data_dir=settings.data_dir)
        config = dataclasses.replace(config, base=dataclasses.replace(config.base, data=images))
    root = settings.run_dir or Path("runs") / (path.stem + "-quick" * settings.quick)
    kept.append(root)
    found = sweep.run(config, root, Bars())
    console.print(_fitted(sweep.HEADERS, sweep.table_rows(found)))
    print(f"report: {root / 'sweep.html'}")
    return _say(sweep.judge(config, root), strict=settings.strict)


def run(settings: RunSettings) -> int:
    """Find the ticket, train and compare all networks, write the report."""
    from ntk_awt.app.run.folder import RunFolder, is_complete

    root = settings.root
    if is_complete(root, settings.config):
        results = RunFolder.open(root).results
        console.print(f"complete: {root}", markup=False, highlight=False, soft_wrap=True)
    else:
        from ntk_awt.app.run import stages

        with stages.opened(settings.config, root, Bars()) as (problem, writer):
            kept.append(root)
            results = stages.run(problem, writer)
    verdicts = of_run(results)
    console.print(_networks_table(results, verdicts))
    print(f"report: {root / 'report.html'}")
    return _say(verdicts.values(), strict=settings.strict)


def ticket(settings: Settings) -> int:
    """Make every network at initialisation (search included) and stop there."""
    from ntk_awt import masks
    from ntk_awt.app.run import stages

    with stages.opened(settings.config, settings.root, Bars()) as (problem, writer):
        kept.append(settings.root)
        stages.make_tickets(problem, writer)
    for name in writer.folder.networks:
        path = writer.paths.ticket(name)
        found = problem.load(path)
        console.print(_layers_table(name, masks.statistics(found.mask, found.gain)))
        print(f"ticket: {path}")
    return 0


def train(run_dir: Positional[Path], networks: tuple[str, ...] = (), strict: bool = False) -> int:
    """Train the networks of a run folder that are not trained yet.

    It ends with the verdicts of the run's evaluation, where there is one.

    Args:
        run_dir: a run folder, e.g. from `ntk-awt ticket`.
        networks: train only these, and add those that the run does not have yet: any name that
            `run --networks` takes.
        strict: exit with 1 if a hygiene check of a network fails.
    """
    from ntk_awt.app.run import stages
    from ntk_awt.app.run.folder import RunFolder, network_label

    config = RunFolder.open(run_dir).config
    more = tuple(name for name in networks if name not in config.networks)
    config = dataclasses.replace(config, networks=config.networks + more)
    with stages.opened(config, run_dir, Bars()) as (problem, writer):
        kept.append(run_dir)
        stages.make_tickets(problem, writer)
        stages.train(problem, writer, tuple(map(network_label, networks)))
    print(f"trained: {run_dir / 'trained'}")
    found = writer.folder.verdicts()
    code = _say(found, strict=strict)
    if any(one.status == NOT_JUDGED for one in found):
        print(f"to judge them: {shlex.join(['ntk-awt', 'evaluate', str(run_dir)])}")
    return code


def evaluate(
    source: Positional[str],
    networks: tuple[str, ...] = (),
    attacks: tuple[str, ...] = (),
    threat: str | None = None,
    epsilon: float | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    images: Path | None = None,
    out: Path | None = None,
    json_file: Annotated[Path | None, arg(name="json")] = None,
) -> int:
    """Robust accuracy of trained networks under any attacks, and whether it can be trusted.

    Outcomes of attacks are kept in the output folder: an interrupted call goes on where it was.
    The last lines are verdicts; the exit code is 1 if a hygiene check fails.

    Args:
        source: a run folder, a saved network's FILE.safetensors, RUN/checkpoints/STAGE, or
            module:function of your own that returns (apply, params).
        networks: of a run folder only these; all if not given.
        attacks: pgd, apgd-ce, apgd-dlr, apgd-t, fab-t, square, auto; the run's if not given.
        threat: linf, l2 or strong-l2; the run's if not given.
        epsilon: radius in pixel units; the run's if not given.
        steps: gradient steps of each attack (Square makes 50 queries for each); the run's if not
            given.
        restarts: random restarts of each attack; the run's if not given.
        images: FILE.npz with images x [n, *shape] and labels y [n], for a source without a run.
        out: folder of the outcomes and the figure; the run folder, or evaluation/ if not given.
        json_file: write the numbers there as well.
    """
    from ntk_awt.app import evaluations as robustness

    files.check_output("--json", json_file, ".json")
    request = robustness.Request(attacks, threat, epsilon, steps, restarts, images)
    if robustness.is_run(source):
        if out is not None:
            raise InputError("--out", expected="none: a run keeps its outcomes", got=str(out))
        kept.append(Path(source))
        found = robustness.evaluate_run(Path(source), request, networks, Bars())
        folder = Path(source) / "figures"
    else:
        if networks:
            raise InputError("--networks", expected="none: the source is one network", got="some")
        folder = out or Path("evaluation")
        files.check_folder("--out", folder)
        kept.append(folder)
        found = [robustness.evaluate_source(source, request, folder, Bars())]
    rows = [one.record() for one in found]
    console.print(_attacks_table(rows))
    console.print(_flags_table(rows))
    print(f"figure: {robustness.draw(found, folder, 'evaluate')}")
    if json_file is None:
        print(json.dumps(rows, indent=2))
    else:
        files.write_json(json_file, rows)
        print(f"numbers: {json_file}")
    return _say(
        (verdict(one.label, row["hygiene"]["flags"]) for one, row in zip(found, rows, strict=True)),
        strict=True,
    )


def kernel(
    source: Positional[str],
    network: str | None = None,
    state: str | None = None,
    inputs: str | None = None,
    images: Path | None = None,
    images2: Path | None = None,
    outputs: str = "full",
    engine: str = "auto",
    batch: int | None = None,
    out: Path | None = None,
    json_file: Annotated[Path | None, arg(name="json")] = None,
) -> int:
    """Tangent kernel of a network: measured, saved as .npz and drawn.

    Args:
        source: a run folder, a saved network's FILE.safetensors, RUN/checkpoints/STAGE, or
            module:function of your own that returns (apply, params).
        network: of a run folder; dense if not given.
        state: of a run folder's network, initial (if not given) or trained.
        inputs: of a run's probe set: clean for Θ(X, X), adversarial (if not given) for Θ(X̃, X̃),
            mixed for Θ(X, X̃).
        images: FILE.npy with images [n, *shape], or FILE.npz with images x and perhaps labels y;
            in place of the probe set.
        images2: the same, for the columns of a mixed kernel.
        outputs: full, diagonal, trace (the mean over outputs), or the number of one output.
        engine: auto, layerwise, contraction or products.
        batch: images a tile; chosen from the memory if not given.
        out: the .npz file; if not given, in the run folder's figures/, else in the current folder.
            The pictures lie beside it.
        json_file: write the numbers there as well; null is an infinite or undefined one.
    """
    from ntk_awt.app import sources as inspection

    bars = Bars()
    files.check_output("--out", out, ".npz")
    files.check_output("--json", json_file, ".json")
    with bars.status("network and images"):
        found = inspection.open_source(source, network, state)
        chosen = inspection.choose_inputs(found, inputs, images, images2)
    number = int(outputs) if outputs.lstrip("-").isdecimal() else outputs
    plan = inspection.plan(found, chosen, number, engine, batch)
    console.print(str(plan), markup=False, highlight=False, soft_wrap=True)
    file = out or inspection.default_file(found, chosen, plan)
    files.check_folder("--out", file.parent)
    with bars.status("kernel"):
        result = inspection.compute(found, chosen, plan)
    inspection.save(result, file)
    with bars.status("metrics and pictures"):
        metrics = inspection.measure(result)
        pictures = inspection.draw(result, file)
    table = _table("metric", "value", "unit", title=file.stem)
    for name, value, unit in metrics:
        table.add_row(name, _number(value), escape(unit))
    console.print(table)
    print(f"kernel {list(result.kernel.shape)}: {file}")
    for picture in pictures:
        print(f"picture: {picture}")
    if json_file is not None:
        record = inspection.record(result, metrics)
        files.write_json(json_file, record)
        print(f"numbers: {json_file}")
    return 0


def linear(arguments: list[str]) -> int:
    """Linear classification: rates, phase diagram, SVMs, what knowing the signal changes."""
    from ntk_awt.app import linear as linear_study
    from ntk_awt.theory.linear.studies import stop_workers

    settings = _parsed(
        linear_study.Settings, "ntk-awt linear", arguments, description=linear.__doc__
    )
    at_end.append(stop_workers)
    # What Ctrl-C leaves of theirs is removed by a process of Python's, which need not say so.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    found = linear_study.run(settings, Bars().bar)
    for title, headers, rows in found.tables:
        table = _table(*headers, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for path in linear_study.save(found, settings):
        print(f"{found.name}: {path}")
    return 0


def report(run_dirs: Positional[tuple[Path, ...]], out: Path = Path("comparison.html")) -> int:
    """Redraw a run's report from its records, or compare several runs.

    Args:
        run_dirs: one run folder to redraw, or several to compare.
        out: the comparison's page.
    """
    from ntk_awt.app.report import page as reports

    if not run_dirs:
        raise InputError("run folders", expected="one or more", got="none")
    files.check_output("--out", out, ".html")
    page = (
        reports.write(run_dirs[0]) if len(run_dirs) == 1 else reports.compare(list(run_dirs), out)
    )
    print(f"report: {page}")
    return 0


def bench(
    names: Positional[tuple[str, ...]] = (),
    json_file: Annotated[Path | None, arg(name="json")] = None,
) -> int:
    """Time our kernels, attacks and searches against a peer in the same run (needs a checkout).

    Args:
        names: attacks, kernels, tickets; all if not given.
        json_file: write the rows there as well.
    """
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        raise InputError(
            "benchmarks",
            expected=f"the folder benchmarks in {checkout}",
            got="none",
            fix="clone the repository and install it with pip install -e .",
        )
    sys.path.insert(0, str(checkout))
    from benchmarks.__main__ import main as run_benchmarks

    run_benchmarks(names, json_file)
    return 0


def verify(
    names: Positional[tuple[str, ...]] = (),
    full: bool = False,
    seed: int = 0,
    json_file: Annotated[Path | None, arg(name="json")] = None,
    report: Path | None = None,
) -> int:
    """Check the statements of the theory by numbers; exit code 1 if any fails.

    Args:
        names: statements, e.g. P3 E2; all if not given.
        full: more seeds, larger widths.
        seed: of all randomness.
        json_file: write the results there, after every statement anew.
        report: write a self-contained page FILE.html with one figure a statement.
    """
    from proofs_check import page
    from proofs_check import runner as verification

    files.check_output("--report", report, ".html")
    files.check_output("--json", json_file, ".json")
    for name in names:
        verification.load(name)
    check_count("seed", seed, low=0)
    results: list[verification.Result] = []
    chosen = names or tuple(verification.MODULES)
    with Bars().bar("verify", len(chosen), "statements") as show:

        def on_done(result: verification.Result) -> None:
            results.append(result)
            show(len(results))
            if json_file is not None:
                files.write_json(json_file, [found.record() for found in results])

        verification.verify(
            chosen,
            size="full" if full else "default",
            seed=seed,
            on_start=lambda statement: lambda share: show(len(results) + share),
            on_done=on_done,
        )
    for result in results:
        for complaint in page.complaints(result):
            console.print(complaint, markup=False, highlight=False, soft_wrap=True)
    console.print(_statements_table(results))
    if json_file is not None:
        print(f"results: {json_file}")
    if report is not None:
        print(f"report: {page.write(results, report)}")
    return 0 if all(result.holds for result in results) else 1


# ---------------------------------------------------------------- verdicts and tables

STYLES = {"passed": "", "warned": "yellow", "failed": "red", NOT_JUDGED: "yellow"}
SIGNS = {"passed": "", "warned": " !", "failed": " ✗"}


def _say(found: Iterable[Verdict], *, strict: bool) -> int:
    """Print each verdict, then how many there are of each kind; the exit code."""
    found = list(found)
    for one in found:
        line = Text(f"verdict of {one}", STYLES[one.status])
        console.print(line, soft_wrap=True)
    console.print(f"verdicts: {count(found)}", highlight=False, soft_wrap=True)
    return int(strict and any(one.status == "failed" for one in found))


def _statements_table(results: list[Any]) -> Table:
    table = _table(
        "statement",
        "holds",
        "margin\n[parts]",
        "bound /\nactual",
        "cases\n[held]",
        "controls\n[rejected]",
        "time\n[s]",
        title="margin: distance from violation, in parts of what is allowed",
    )
    for result in results:
        cases, controls = result.outcome.cases, result.outcome.controls
        table.add_row(
            f"{result.statement.number} {result.statement.title}",
            "yes" if result.holds else "NO",
            _number(result.margin),
            "–" if result.tightness is None else f"{result.tightness:.3g}",
            f"{sum(case.holds for case in cases)} / {len(cases)}",
            f"{sum(control.rejected for control in controls)} / {len(controls)}",
            f"{result.seconds:.1f}",
        )
    return table


def _percent(value: float, low: float, high: float, n: int = 0) -> str:
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _number(value: float) -> str:
    return {"inf": "∞", "nan": "undefined"}.get(str(value), f"{value:.4g}")


def _table(first: str, *headers: str, title: str | None = None) -> Table:
    """An empty table that cuts no word; square brackets in title and headers are no markup."""
    others = [Column(escape(header), overflow="fold") for header in headers]
    return Table(Column(first, no_wrap=True), *others, title=title and escape(title))


def _fitted(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """As many columns, from the left, as there is room for whole cells; a report has them all."""
    columns = zip(headers, *rows, strict=True)
    widths = [max(map(len, [*header.split(), *cells])) for header, *cells in columns]
    fitting = [n for n in range(2, len(widths) + 1) if sum(widths[:n]) + 3 * n < console.width]
    shown = max(fitting, default=1)
    table = _table(*headers[:shown])
    for column, width in zip(table.columns, widths, strict=False):
        column.width = width
    for row in rows:
        table.add_row(*row[:shown])
    return table


def _networks_table(results: dict[str, Any], verdicts: dict[str, Verdict]) -> Table:
    table = _table(
        "network",
        "density\n[0–1]",
        "natural\n[%]",
        "robust\n[%]",
        "gap\n[logits]",
        "Θ dist.\n[rel.²]",
        title="test accuracy with 95 % interval, mean dynamics gap, kernel distance at start",
    )
    if any(one.status != "passed" for one in verdicts.values()):
        table.caption = "✗: a check fails, !: a check warns; see the verdicts"
    for name, values in results["networks"].items():
        status = verdicts[name].status
        table.add_row(
            Text(name + SIGNS[status], STYLES[status]),
            f"{values['density']:.4g}",
            _percent(values["natural_accuracy"], *values["natural_interval"]),
            _percent(values["robust_accuracy"], *values["robust_interval"]),
            f"{values['dynamics_gap']:.3g}",
            f"{values['relative_kernel_distance']:.3g}",
        )
    return table


def _attacks_table(rows: list[dict[str, Any]]) -> Table:
    table = _table(
        "network",
        "attack",
        "tried on\n[images]",
        "left\n[images]",
        "accuracy\n[%], 95 % interval",
        title="after each attack; the worst case of all last",
    )
    for row in rows:
        table.add_row(row["network"], "none", "", "", _percent(**row["natural"]))
        for turn in row["attacks"]:
            table.add_row(
                "",
                turn["attack"] + (f" ({turn['suite']})" if turn["suite"] != turn["attack"] else ""),
                str(turn["attacked"]),
                str(turn["survived"]),
                _percent(turn["robust_accuracy"], *turn["robust_interval"]),
            )
        table.add_row("", "all", "", "", _percent(**row["robust"]), end_section=True)
    return table


def _flags_table(rows: list[dict[str, Any]]) -> Table:
    """The checks that did not pass; all of them are in the JSON file and in a run's report."""
    flags = [(row["network"], flag) for row in rows for flag in row["hygiene"]["flags"]]
    raised = [(network, flag) for network, flag in flags if flag["status"] != "pass"]
    table = _table("check", "network", "status", "value (limit) [unit]", "measured")
    table.title = f"hygiene: {len(flags) - len(raised)} of {len(flags)} checks pass"
    for network, flag in raised:
        table.add_row(
            flag["name"],
            network,
            Text(flag["status"], {"warn": "yellow", "fail": "red"}[flag["status"]]),
            escape(f"{flag['value']:.3g} ({flag['limit']:.3g}) [{flag['unit']}]"),
            flag["meaning"],
        )
    return table


def _layers_table(name: str, rows: list[Any]) -> Table:
    table = _table(
        "layer",
        "shape\n[*window, in, out]",
        "kept\n[weights]",
        "density\n[kept / all]",
        "gain γ\n[factor]",
        "dead inputs\n[units]",
        "dead outputs\n[units]",
        title=name,
    )
    for row in rows:
        table.add_row(
            row.name,
            "×".join(map(str, row.shape)),
            str(row.kept),
            f"{row.density:.4g}",
            f"{row.gain:.3f}",
            str(row.dead_inputs),
            str(row.dead_outputs),
        )
    return table


# ---------------------------------------------------------------- entry

COMMANDS: dict[str, Callable[..., int]] = {
    "run": run,
    "ticket": ticket,
    "train": train,
    "evaluate": evaluate,
    "kernel": kernel,
    "linear": linear,
    "report": report,
    "verify": verify,
    "bench": bench,
}


def _split_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The FILE of --config FILE or --config=FILE, if given, and the other arguments."""
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            following = [value] if equals else arguments[at + 1 : at + 2]
            if not following or not following[0]:
                raise InputError("--config", expected="a TOML file after it", got="nothing")
            return Path(following[0]), arguments[:at] + arguments[at + 1 + (not equals) :]
    return None, arguments


def _bound(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """Takes the arguments of a command, to be called with them later."""

    @functools.wraps(command)
    def bind(*values: Any, **named: Any) -> Callable[[], int]:
        return functools.partial(command, *values, **named)

    return bind


def _parsed(kind: Any, program: str, arguments: list[str], **settings: Any) -> Any:
    """What the arguments say, or Tyro's complaint as one line; `--help` is shown as it is."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, args=arguments, **settings)
    except SystemExit as stop:
        if stop.code != 2:
            raise
    # A box: what is wrong, a rule, then the options that may have been meant, each with its help.
    boxed = [row.strip("╭╮╰╯│─ ") for row in said.getvalue().splitlines()]
    rules = [at for at, row in enumerate(said.getvalue().splitlines()) if "│ ──" in row]
    first = rules[0] if rules else len(boxed)
    options = dict.fromkeys(row for row in boxed[first:] if row.startswith("--"))
    options.pop(f"{program} --help", None)
    raise InputError(
        "arguments",
        expected=" or ".join(options) or f"those of {program} --help",
        got=" ".join(filter(None, boxed[1:first])),
        fix=f"see {program} --help",
    )


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [
            f"  {name:<10} {(f.__doc__ or '').splitlines()[0]}" for name, f in COMMANDS.items()
        ]
        print("usage: ntk-awt COMMAND [OPTIONS]; `ntk-awt COMMAND --help` lists the options\n")
        print("\n".join(lines))
        return 0
    name, rest = arguments[0], arguments[1:]
    choose("command", name, COMMANDS)
    command = COMMANDS[name]
    if command is linear:  # its settings are declared where they are used: it loads them itself
        return linear(rest)
    if command not in (run, ticket):
        return _parsed(_bound(command), f"ntk-awt {name}", rest)()
    path, rest = _split_config(rest)
    if command is run and path is not None:
        from ntk_awt.app import sweep

        if sweep.is_sweep(path):
            found = _parsed(
                SweepSettings,
                f"ntk-awt run --config {path}",
                rest,
                description=run_sweep.__doc__,
            )
            return run_sweep(path, found)
    config = RunConfig() if path is None else configs.load(path)
    kind = RunSettings if command is run else Settings
    settings = _parsed(
        kind,
        f"ntk-awt {name}",
        rest,
        description=f"{command.__doc__} With --config FILE.toml, flags override the file.",
        default=kind(config),
    )
    return command(settings)


def _one_line(text: str) -> str:
    """Whatever a name or a file may hold: no line break and no command for the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _fail(text: str) -> int:
    print(f"error: {_one_line(text)}", file=sys.stderr)
    return 2


@_warnings_in_one_line()
def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code.

    Args:
        arguments: of the command; those of the process if not given, which then also handles
            Ctrl-C and SIGTERM (`interrupts`).
    """
    alone = arguments is None
    if arguments is None:
        install()
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it raises as well
        arguments = sys.argv[1:]
    kept.clear()
    try:
        code = _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except InputError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # What Python would write at its end goes nowhere, without a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        code = _fail(
            f"cannot read or write{where}: expected space and permission, "
            f"got {error.strerror or error}; finished work is kept, mend it and run again"
        )
        return leave(code) if alone else code  # Orbax may be in the middle of something
    except (MemoryError, RuntimeError) as error:
        text = str(error).strip().partition("\n")[0]
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
            return _fail(
                f"memory: expected enough for these settings, got {text or 'too little'}; "
                "make the network, the batch or the number of images smaller"
            )
        if "Unable to initialize backend" in text:
            return _fail(f"JAX_PLATFORMS: expected a device that is there, got {text}")
        raise
    except KeyboardInterrupt:
        print(line("interrupted", arguments, kept[-1] if kept else None), file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
