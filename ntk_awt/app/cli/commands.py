"""The command line `ntk-awt`: arguments from the config dataclasses, progress bars, exit codes.

Exit code 0: done; 1: a check failed; 2: bad input, with one line that says what to change; 130
and 143: interrupted by Ctrl-C or SIGTERM, with the command that resumes (`interrupts`); 141: nobody
reads the output any more.
"""

import dataclasses
import functools
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

from rich.text import Text
from tyro.conf import Positional, arg

from ntk_awt import __version__, files
from ntk_awt.app.cli import tables
from ntk_awt.app.cli.progress import Bars, console, warnings_in_one_line
from ntk_awt.app.cli.settings import (
    ATTACKS,
    THREATS,
    RunSettings,
    Settings,
    SweepSettings,
    braces,
    parsed,
    run_settings,
)
from ntk_awt.app.interrupts import at_end, install, kept, leave, line
from ntk_awt.app.verdicts import NOT_JUDGED, Verdict, count, of_run, verdict
from ntk_awt.errors import InputError, check_count, choose

__all__ = ["COMMANDS", "main"]

# ---------------------------------------------------------------- commands


JsonFile = Annotated[Path | None, arg(name="json", metavar="FILE")]


def _open(settings: Settings):
    """The run, with progress bars."""
    from ntk_awt.app.run.stages import Run

    opened = Run(settings.config, settings.root, Bars())
    kept.append(settings.root)
    return opened


def run(settings: RunSettings) -> int:
    """Find the ticket, train and compare all networks, write the report."""
    opened = _open(settings)
    results = opened.run()
    verdicts = of_run(results)
    tables.show_networks(console, results, verdicts)
    print(f"report: {opened.paths.report}")
    return _say(verdicts.values(), strict=settings.strict)


def sweep(settings: SweepSettings) -> int:
    """Networks × densities × seeds as one resumable experiment, gathered in one page."""
    from ntk_awt.app import sweep as sweeps

    config = sweeps.load(settings.file, quick=settings.quick)
    changes = {"seeds": settings.seeds, "densities": settings.densities}
    config = dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})
    if settings.data_dir is not None:
        images = dataclasses.replace(config.base.data, data_dir=settings.data_dir)
        config = dataclasses.replace(config, base=dataclasses.replace(config.base, data=images))
    root = settings.run_dir or Path("runs") / (settings.file.stem + "-quick" * settings.quick)
    kept.append(root)
    found = sweeps.run(config, root, Bars())
    tables.show_plain(console, sweeps.HEADERS, sweeps.table_rows(found))
    print(f"report: {root / 'sweep.html'}")
    return _say(sweeps.judge(config, root), strict=settings.strict)


def ticket(settings: Settings) -> int:
    """Make every network at initialisation (search included) and stop there."""
    from ntk_awt import masks
    from ntk_awt.app.names import ordered

    opened = _open(settings)
    opened.make_tickets()
    for name in ordered(settings.config.networks):
        found = opened.load_ticket(name)
        tables.show_layers(console, name, masks.statistics(found.mask, found.gain))
        print(f"ticket: {opened.paths.ticket(name)}")
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
    from ntk_awt.app.names import network_label
    from ntk_awt.app.run.stages import Run, open_run

    config = open_run(run_dir).config
    more = tuple(name for name in networks if name not in config.networks)
    config = dataclasses.replace(config, networks=config.networks + more)
    opened = Run(config, run_dir, Bars())
    kept.append(run_dir)
    opened.make_tickets()
    opened.train(tuple(map(network_label, networks)))
    print(f"trained: {run_dir / 'trained'}")
    found = opened.verdicts()
    code = _say(found, strict=strict)
    if any(one.status == NOT_JUDGED for one in found):
        print(f"to judge them: {shlex.join(['ntk-awt', 'evaluate', str(run_dir)])}")
    return code


def evaluate(
    source: Positional[str],
    networks: tuple[str, ...] = (),
    attacks: Annotated[tuple[str, ...], arg(metavar=f"[{braces(ATTACKS)} ...]")] = (),
    threat: Annotated[str | None, arg(metavar=braces(THREATS))] = None,
    epsilon: float | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    images: Path | None = None,
    out: Path | None = None,
    json_file: JsonFile = None,
) -> int:
    """Robust accuracy of trained networks under any attacks, and whether it can be trusted.

    Outcomes of attacks are kept in the output folder: an interrupted call goes on where it was.
    The last lines are verdicts; the exit code is 1 if a hygiene check fails.

    Args:
        source: a run folder, a saved network's FILE.safetensors, RUN/checkpoints/STAGE, or
            module:function of your own that returns (apply, params).
        networks: of a run folder only these; all if not given.
        attacks: each on what those before it left; the run's if not given.
        threat: what the adversary may do; the run's if not given.
        epsilon: radius in pixel units; the run's if not given.
        steps: gradient steps of each attack (Square makes 50 queries for each); the run's if not
            given.
        restarts: random restarts of each attack; the run's if not given.
        images: FILE.npz with images x [n, *shape] and labels y [n], for a source without a run.
        out: folder of the outcomes and the figure; the run folder, or evaluation/ if not given.
        json_file: write the numbers there as well, or with - to the output.
    """
    from ntk_awt.app import evaluations as robustness

    to_output = json_file == Path("-")
    files.check_output("--json", None if to_output else json_file, ".json")
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
    tables.show_attacks(console, rows)
    tables.show_flags(console, rows)
    print(f"figure: {robustness.draw(found, folder, 'evaluate')}")
    if to_output:
        print(json.dumps(rows, indent=2))
    elif json_file is not None:
        files.write_json(json_file, rows)
        print(f"numbers: {json_file}")
    return _say(
        (verdict(one.label, row["hygiene"]["flags"]) for one, row in zip(found, rows, strict=True)),
        strict=True,
    )


def kernel(
    source: Positional[str],
    network: str | None = None,
    state: Annotated[str | None, arg(metavar="{initial,trained}")] = None,
    inputs: Annotated[str | None, arg(metavar="{clean,adversarial,mixed}")] = None,
    images: Path | None = None,
    images2: Path | None = None,
    outputs: Annotated[str, arg(metavar="{full,diagonal,trace,NUMBER}")] = "full",
    engine: Annotated[str, arg(metavar="{auto,layerwise,contraction,products}")] = "auto",
    batch: int | None = None,
    out: Path | None = None,
    json_file: JsonFile = None,
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
        engine: how to compute it; auto takes the cheapest.
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
    tables.show_metrics(console, file.stem, metrics)
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

    settings = parsed(
        linear_study.Settings, "ntk-awt linear", arguments, description=linear.__doc__
    )
    at_end.append(stop_workers)
    # What Ctrl-C leaves of theirs is removed by a process of Python's, which need not say so.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    found = linear_study.run(settings, Bars().bar)
    for title, headers, rows in found.tables:
        tables.show_plain(console, headers, rows, title)
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
    json_file: JsonFile = None,
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
    json_file: JsonFile = None,
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
    tables.show_statements(console, results)
    if json_file is not None:
        print(f"results: {json_file}")
    if report is not None:
        print(f"report: {page.write(results, report)}")
    return 0 if all(result.holds for result in results) else 1


# ---------------------------------------------------------------- verdicts


def _say(found: Iterable[Verdict], *, strict: bool) -> int:
    """Print each verdict, then how many there are of each kind; the exit code."""
    found = list(found)
    for one in found:
        line = Text(f"verdict of {one}", tables.STYLES[one.status])
        console.print(line, soft_wrap=True)
    console.print(f"verdicts: {count(found)}", highlight=False, soft_wrap=True)
    return int(strict and any(one.status == "failed" for one in found))


# ---------------------------------------------------------------- entry

COMMANDS: dict[str, Callable[..., int]] = {
    "run": run,
    "sweep": sweep,
    "ticket": ticket,
    "train": train,
    "evaluate": evaluate,
    "kernel": kernel,
    "linear": linear,
    "report": report,
    "verify": verify,
    "bench": bench,
}


def _bound(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """Takes the arguments of a command, to be called with them later."""

    @functools.wraps(command)
    def bind(*values: Any, **named: Any) -> Callable[[], int]:
        return functools.partial(command, *values, **named)

    return bind


def _dispatch(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"ntk-awt {__version__}")
        return 0
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
    program, about = f"ntk-awt {name}", command.__doc__ or ""
    if command in (run, ticket):
        kind = RunSettings if command is run else Settings
        return command(run_settings(kind, program, about, rest))
    if command is sweep:
        return sweep(parsed(SweepSettings, program, rest, description=about))
    return parsed(_bound(command), program, rest)()


def _one_line(text: str) -> str:
    """Whatever a name or a file may hold: no line break and no command for the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _fail(text: str) -> int:
    print(f"error: {_one_line(text)}", file=sys.stderr)
    return 2


@warnings_in_one_line()
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
