"""The kernel of one network, from wherever it comes: computed, measured, saved and drawn.

A source is named by one string:

    RUN                            a run folder; one of its networks, initial or trained
    FILE.safetensors               a saved network, of a run or with the model in its metadata
    RUN/checkpoints/STAGE[/STEP]   the newest checkpoint of a search or a training
    module:function                code of the user's own that returns (apply, params)
"""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ntk_awt import checkpoints, files, kernels, masks, models, training
from ntk_awt.app import config as configs
from ntk_awt.app import plots
from ntk_awt.app.config import ModelConfig
from ntk_awt.app.run.folder import Paths, RunFolder
from ntk_awt.app.run.methods import Search, resolve
from ntk_awt.app.run.problem import Problem
from ntk_awt.errors import (
    InputError,
    check_count,
    check_finite,
    check_images,
    check_labels,
    check_name,
    check_structure,
    choose,
)
from ntk_awt.kernels import Plan
from ntk_awt.masks import Ticket
from ntk_awt.network import Network, check_network, check_params, in_one_line
from ntk_awt.types import Gain, Images, Mask, Params

EIGENVECTORS = 6
"""At most that many eigenvectors are drawn."""

UNIT = "logits² / parameter²"


class Source(NamedTuple):
    """A network to look at.

    Attributes:
        name: of the network.
        state: of it, in words; empty if there is only one.
        network: function and parameters, as before masking.
        mask, gain: m and γ; None for a dense network.
        run: that it belongs to, for its probe set; None if there is none.
        folder: of that run.
        shape: of one image, where it is known.
    """

    name: str
    state: str
    network: Network
    mask: Mask | None
    gain: Gain | None
    run: Problem | None
    folder: Paths | None
    shape: tuple[int, ...] | None


class Inputs(NamedTuple):
    """The images of a kernel.

    Attributes:
        name: of the choice.
        x1: of the rows, [n1, *shape].
        x2: of the columns; None if they are x1.
        labels: [n1], of rows and columns alike, where they are known.
    """

    name: str
    x1: Images
    x2: Images | None
    labels: np.ndarray | None


class Result(NamedTuple):
    """A kernel, of what, how it was computed, and its spectrum.

    Attributes:
        source, inputs, plan: as given.
        kernel: [n1, n2, *outputs].
        spectrum: eigenvalues, or singular values of a mixed kernel; of diagonal blocks those of
            their mean over the outputs.
    """

    source: Source
    inputs: Inputs
    plan: Plan
    kernel: np.ndarray
    spectrum: np.ndarray


class Metric(NamedTuple):
    """One number; its value may be infinite, or NaN where it is not defined."""

    name: str
    value: float
    unit: str


# ---------------------------------------------------------------- sources


def open_source(source: str, network: str | None = None, state: str | None = None) -> Source:
    """Find the network that `source` names.

    Args:
        source: a run folder, FILE.safetensors, a checkpoint's folder or module:function.
        network: of a run folder; dense if not given.
        state: of a run folder's network, initial (the default) or trained.

    Raises:
        InputError: nothing there, or not what it should be; `network` or `state` where the source
            says it already.
    """
    path = Path(source)
    place = _checkpoint(path.absolute())
    is_file = path.suffix == ".safetensors"
    is_code = ":" in source and not path.exists() and not is_file
    if is_file or is_code or place:
        for name, value in (("network", network), ("state", state)):
            if value is not None:
                raise InputError(
                    f"--{name}", expected="none: the source is one network", got=repr(value)
                )
    if is_file:
        return _from_file(path)
    if is_code:
        return _from_code(source)
    if place is not None:
        return _from_checkpoint(*place)
    if not Paths(path).config.exists():
        raise InputError(
            f"run folder {source}",
            expected="a folder with config.toml",
            got="none",
            fix="other sources: FILE.safetensors, RUN/checkpoints/STAGE, module:function",
        )
    folder, name, state = RunFolder.open(path), network or "dense", state or "initial"
    choose("network", name, folder.networks)
    choose("state", state, ("initial", "trained"))
    problem, paths = Problem(folder.config), folder.paths
    file = paths.ticket(name) if state == "initial" else paths.trained(name)
    return _of_run(problem, paths, name, state, problem.load(file))


def _of_run(problem: Problem, paths: Paths, name: str, state: str, ticket: Ticket) -> Source:
    shape = problem.dataset.image_shape
    return _sparse(name, state, problem.dense, ticket, shape, problem, paths)


def _sparse(
    name: str,
    state: str,
    network: Network,
    ticket: Ticket,
    shape: tuple[int, ...],
    run: Problem | None = None,
    folder: Paths | None = None,
) -> Source:
    """A source with a mask, or without one where the ticket is the dense network."""
    params, mask, gain = ticket
    keeps = all(bool(np.all(m)) for m in jax.tree.leaves(mask))
    if keeps and all(float(g) == 1 for g in jax.tree.leaves(gain)):
        mask = gain = None  # a kernel without a mask is computed faster
    return Source(name, state, network.replace(params=params), mask, gain, run, folder, shape)


def _from_file(path: Path) -> Source:
    folder = path.absolute().parent
    if Paths(folder.parent).config.exists() and folder.name in ("tickets", "trained"):
        run = RunFolder.open(folder.parent)
        state = "initial" if folder.name == "tickets" else "trained"
        problem = Problem(run.config)
        return _of_run(problem, run.paths, path.stem, state, problem.load(path))
    said = masks.load_metadata(path)
    if missing := [key for key in ("model", "input_shape", "num_classes") if key not in said]:
        raise InputError(
            f"metadata of {path}",
            expected="the model that it belongs to",
            got=f"no {missing[0]}",
            fix="put it back into its run folder's tickets/ or trained/, or make it again with "
            "ntk-awt ticket",
        )
    try:
        settings, shape, classes = (
            json.loads(said[key]) for key in ("model", "input_shape", "num_classes")
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"metadata of {path}", expected="JSON", got=str(error)) from None
    check_structure(f"metadata of {path}: input_shape", shape, [int])
    shape = tuple(shape)
    for size in (*shape, classes):
        check_count(f"metadata of {path}: input_shape and num_classes", size, low=1)
    model = configs.from_dict(settings, ModelConfig, f"metadata of {path}")
    # Any key will do: the parameters are those of the file.
    network = models.build(model, shape, classes, jax.random.key(0))
    ticket = masks.load_ticket(path, network.params)
    name = said.get("network", path.stem)
    check_name(f"network in the metadata of {path}", name)
    return _sparse(name, "", network, ticket, shape)


def _checkpoint(path: Path) -> tuple[Path, str, str, str] | None:
    """Run folder, stage, network and step ("" if not said) of a path inside checkpoints/."""
    folder, step = (path.parent, path.name) if path.name.isdigit() else (path, "")
    stage, _, name = folder.name.partition("-")
    if folder.parent.name != "checkpoints" or not name:
        return None
    return folder.parent.parent, stage, name, step


def _from_checkpoint(root: Path, stage: str, name: str, step: str) -> Source:
    """The network as of the newest checkpoint; its state says the updates done by then."""
    folder = RunFolder.open(root)
    choose("stage of a checkpoint", stage, ("search", "train"))
    choose("network", name, folder.networks)
    problem, where = Problem(folder.config), folder.paths.checkpoints(stage, name)
    load = _searched if stage == "search" else _trained
    found = load(problem, folder.paths, name)
    if found is None:
        raise InputError(f"checkpoint {where}", expected="a saved state", got="none")
    saved, updates, ticket = found
    if step and int(step) != saved:
        raise InputError(
            f"checkpoint {step} of {stage}-{name}", expected=f"the newest, {saved}", got=step
        )
    return _of_run(problem, folder.paths, name, f"{stage} step {updates}", ticket)


def _searched(problem: Problem, paths: Paths, name: str) -> tuple[int, int, Ticket] | None:
    method = resolve(problem.config, name)
    if not isinstance(method, Search):
        raise InputError("network", expected="one that is searched for", got=name)
    like = method.start(problem, masks.dense(problem.dense.params))
    found = checkpoints.newest(paths.checkpoints("search", name), like)
    return found and (found[0], int(found[1].solver.step), found[1].solver.ticket)


def _trained(problem: Problem, paths: Paths, name: str) -> tuple[int, int, Ticket] | None:
    params = problem.dense.params
    optimizer = training.make_optimizer(problem.config.train, 1).init(params)
    like = training.TrainState(jnp.zeros((), jnp.int32), params, optimizer)
    found = checkpoints.newest(paths.checkpoints("train", name), like)
    if found is None:
        return None
    saved, state = found
    ticket = problem.load(paths.ticket(name))._replace(params=state.params)
    return saved, int(state.step), ticket


@contextmanager
def _users_code(what: str, expected: str) -> Iterator[None]:
    """Modules are looked for in the current folder as well; any error becomes one line.

    So does `sys.exit`. What the code prints goes to the error stream: the other one has results.
    """
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise InputError(what, expected=expected, got=in_one_line(error, here)) from error
    finally:
        sys.path.remove(here)


def _from_code(source: str) -> Source:
    module_name, _, name = source.partition(":")
    with _users_code(f"source {source}", "code that runs"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # what it imports itself is missing
            where = f"a module in {Path.cwd()} or an installed one"
            raise InputError(f"module {module_name}", expected=where, got="none") from None
        functions = [
            key for key, value in vars(module).items() if callable(value) and key[0] != "_"
        ]
        choose(f"function of {module_name}", name, functions)
        found = getattr(module, name)()
    parts = found if isinstance(found, tuple) else (found,)
    if len(parts) != 2 or not callable(parts[0]):
        raise InputError(
            f"result of {source}",
            expected="a tuple (apply, params), apply a function (params, x[n, *shape]) -> logits",
            got=", ".join(type(part).__name__ for part in parts),
        )
    apply, params = parts
    check_params(params, source)

    def traced(params: Params, x: Images) -> Any:
        with _users_code(f"source {source}", "code that JAX can trace on these images"):
            return apply(params, x)

    return Source(source, "", Network(traced, params), None, None, None, None, None)


# ---------------------------------------------------------------- images


def choose_inputs(
    source: Source,
    inputs: str | None = None,
    images: Path | None = None,
    images2: Path | None = None,
) -> Inputs:
    """The images of a kernel, from the run's probe set or from files.

    Args:
        source: the network.
        inputs: of a run: clean for Θ(X, X), adversarial (the default) for Θ(X̃, X̃), mixed for
            Θ(X, X̃).
        images: FILE.npy with images [n, *shape], or FILE.npz with such an array `x` and perhaps
            labels `y` [n]; in place of the probe set.
        images2: the same for the columns; the kernel is mixed then.

    Raises:
        InputError: both or neither of them, an unknown choice, a bad file, or images that the
            network does not take.
    """
    if images is None:
        if images2 is not None:
            raise InputError("--images2", expected="--images with it", got="none")
        if source.run is None:
            raise InputError(
                "--images",
                expected="FILE.npy or FILE.npz, since this source has no run with a probe set",
                got="none",
            )
        chosen = _probe(source.run, inputs or "adversarial")
    else:
        if inputs is not None:
            raise InputError("--inputs", expected="none with --images", got=repr(inputs))
        x1, labels = load_images(images)
        chosen = Inputs(images.stem, x1, None, labels)
        if images2 is not None:
            chosen = Inputs(f"{images.stem}-{images2.stem}", x1, load_images(images2)[0], None)
    classes = _check_taken(source, chosen)
    if chosen.labels is not None:
        check_labels("labels", chosen.labels, len(chosen.x1), classes)
    return chosen


def _probe(run: Problem, inputs: str) -> Inputs:
    choose("inputs", inputs, ("clean", "adversarial", "mixed"))
    clean, perturbed = run.probe
    x1, x2 = {
        "clean": (clean, None),
        "adversarial": (perturbed, None),
        "mixed": (clean, perturbed),
    }[inputs]
    return Inputs(inputs, x1, x2, run.dataset.y_validation[: len(clean)])


def load_images(path: Path) -> tuple[Any, np.ndarray | None]:
    """Images, and labels if there are any."""
    what = f"images {path}"
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            found = {"x": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except Exception as error:  # a bad file raises one of many kinds
        raise InputError(what, expected="a .npy or .npz file", got=str(error)) from None
    if "x" not in found:
        raise InputError(what, expected="an array x in it", got=", ".join(found) or "nothing")
    check_images(what, found["x"], (-np.inf, np.inf))
    if not len(found["x"]):
        raise InputError(what, expected="at least one image", got="none")
    return found["x"].astype(np.float32), found.get("y")


def _check_taken(source: Source, inputs: Inputs) -> int:
    """Raise unless the network takes the images; the number of its logits."""
    classes = 0
    for x in (inputs.x1, inputs.x2):
        if x is None:
            continue
        if source.shape is not None and x.shape[1:] != source.shape:
            expected = f"images of shape {source.shape}, which {source.name} takes"
            raise InputError("images", expected=expected, got=f"shape {x.shape[1:]}")
        classes = check_network(source.network, x, what=source.name)
    return classes


# ---------------------------------------------------------------- the kernel


def plan(
    source: Source,
    inputs: Inputs,
    outputs: str | int = "full",
    engine: str = "auto",
    batch: int | None = None,
) -> Plan:
    """How the kernel will be computed; see `kernels.plan`."""
    apply, params = source.network.apply, source.network.params
    return kernels.plan(
        apply, params, inputs.x1, inputs.x2, mask=source.mask, outputs=outputs, engine=engine,
        batch=batch,
    )  # fmt: skip


def compute(source: Source, inputs: Inputs, plan: Plan) -> Result:
    """The kernel, by that plan.

    Raises:
        InputError: a kernel that is not finite.
    """
    network, mask, gain = source.network, source.mask, source.gain
    apply, params = network.apply, network.params
    kernel = kernels.empirical(apply, params, inputs.x1, inputs.x2, mask=mask, gain=gain, plan=plan)
    check_finite("kernel", kernel)
    spectrum = _spectrum(kernel, inputs.x2 is not None)
    return Result(source, inputs, plan, np.asarray(kernel), np.asarray(spectrum))


def _matrix(kernel: jax.Array) -> jax.Array:
    """The kernel in a form that has a spectrum: full, or one matrix on the images."""
    return jnp.mean(kernel, axis=2) if kernel.ndim == 3 else kernel


@partial(jax.jit, static_argnames="mixed")
def _spectrum(kernel: jax.Array, mixed: bool) -> jax.Array:
    return kernels.spectrum(_matrix(kernel), mixed=mixed)


def _classes(result: Result) -> int:
    network = result.source.network
    return jax.eval_shape(network.apply, network.params, result.inputs.x1).shape[1]


def _one_hot(result: Result) -> np.ndarray | None:
    """Labels as targets [n, c]; of one logit's kernel only that column."""
    labels, outputs = result.inputs.labels, result.plan.outputs
    if labels is None:
        return None
    targets = np.eye(_classes(result), dtype=np.float32)[labels]
    return targets[:, [outputs]] if isinstance(outputs, int) else targets


@jax.jit
def _metrics(
    kernel: jax.Array, spectrum: jax.Array, targets: jax.Array | None
) -> dict[str, jax.Array]:
    matrix = _matrix(kernel)
    found = {
        "norm": jnp.linalg.norm(matrix.ravel()),
        "rank": kernels.effective_rank(spectrum),
        "condition": kernels.condition_number(spectrum),
        "first": kernels.spectrum_mass(spectrum, 1),
        "ten": kernels.spectrum_mass(spectrum, min(10, len(spectrum))),
    }
    if kernel.shape[0] == kernel.shape[1]:
        found["trace"] = jnp.trace(kernels.flatten(matrix))
    if targets is not None:
        found["alignment"] = kernels.label_alignment(matrix, targets)
    return found


def measure(result: Result) -> list[Metric]:
    """Trace, norm, spectrum and label alignment (`kernels.metrics`) of a kernel.

    Of diagonal blocks it is their mean Θ̄ over the c outputs that is measured, and trace and norm of
    a mean are those of Θ̄ ⊗ I_c, so that they can be set beside those of a full kernel: the trace is
    the same number, the norm at most that of the full one. A mixed kernel has singular values in
    place of eigenvalues, and no trace. The alignment of one logit's kernel is that with the labels
    of its class.
    """
    size, targets = len(result.spectrum), _one_hot(result)
    found = _metrics(result.kernel, result.spectrum, targets)
    norm, unit, outputs = "norm ‖Θ‖_F", UNIT, result.plan.outputs
    if outputs in ("diagonal", "trace"):
        norm, classes = "norm ‖Θ̄ ⊗ I‖_F, Θ̄ the mean over outputs", _classes(result)
        found = {**found, "norm": found["norm"] * classes**0.5}
        if "trace" in found:
            found["trace"] = found["trace"] * classes
    elif outputs != "full":
        unit = f"{UNIT}, output {outputs}"
    rows = [
        ("trace", "trace", unit),
        (norm, "norm", unit),
        ("effective rank", "rank", f"of {size}"),
        ("condition number", "condition", "ratio"),
        ("spectrum mass, top 1", "first", "share"),
        (f"spectrum mass, top {min(10, size)}", "ten", "share"),
        ("label alignment", "alignment", "cosine"),
    ]
    skipped = {"trace"} if result.inputs.x2 is not None else set()
    skipped |= {"ten"} if size == 1 else set()
    return [
        Metric(name, float(found[key]), unit)
        for name, key, unit in rows
        if key in found and key not in skipped
    ]


# ---------------------------------------------------------------- files


def default_file(source: Source, inputs: Inputs, plan: Plan) -> Path:
    """Where the kernel is saved: in the run's figures, or in the current folder."""
    outputs = "" if plan.outputs == "full" else str(plan.outputs)
    words = [word for word in ("kernel", source.name, source.state, inputs.name, outputs) if word]
    name = re.sub(r"[^\w.-]+", "-", "-".join(words))
    folder = Path() if source.folder is None else source.folder.figures
    return folder / f"{name}.npz"


def save(result: Result, file: Path) -> None:
    """Write the kernel, its images x1 and x2, labels, and the names of all of that, as .npz."""
    source, inputs, plan, kernel, _ = result
    arrays = {"kernel": kernel, "x1": inputs.x1, "x2": inputs.x2, "labels": inputs.labels}
    names = {"network": source.name, "state": source.state, "inputs": inputs.name}
    arrays |= names | {"outputs": str(plan.outputs)}
    files.save_arrays(file, {name: array for name, array in arrays.items() if array is not None})


def record(result: Result, metrics: list[Metric]) -> dict[str, Any]:
    """What was measured, and of what, as JSON values; None for a number that is not finite."""
    source, inputs, chosen, kernel, _ = result
    return {
        "network": source.name,
        "state": source.state,
        "inputs": inputs.name,
        "outputs": chosen.outputs,
        "engine": chosen.engine,
        "shape": list(kernel.shape),
        "metrics": [
            {"name": name, "value": value if np.isfinite(value) else None, "unit": unit}
            for name, value, unit in metrics
        ],
    }


def figures(result: Result) -> dict[str, Figure]:
    """Pictures by name: the kernel, its spectrum, and where they apply eigenvectors, classes.

    Eigenvectors need one set of images with one or three channels; specialisation needs labels
    and the kernels of all outputs.
    """
    source, inputs, chosen, kernel, values = result
    title = ", ".join(filter(None, (source.name, source.state, inputs.name)))
    of_mean, spectrum = ": mean over outputs", source.name
    if chosen.outputs != "full":
        one = isinstance(chosen.outputs, int)
        spectrum += f": output {chosen.outputs}" if one else of_mean
        title += f": output {chosen.outputs}" if one else of_mean if kernel.ndim == 2 else ""
    drawn = {
        "kernel": plots.kernel(kernel, title),
        "spectrum": plots.spectrum({spectrum: values}),
    }
    shape = inputs.x1.shape
    if inputs.x2 is None and len(shape) == 4 and shape[-1] in (1, 3):
        decompose = jax.jit(kernels.eigenvectors, static_argnums=1)
        sizes, vectors = decompose(kernel, min(EIGENVECTORS, shape[0]))
        pictures = kernels.eigenpictures(vectors, jnp.asarray(inputs.x1))
        drawn["eigenvectors"] = plots.eigenvectors(np.asarray(pictures), np.asarray(sizes))
    targets = _one_hot(result)
    if targets is not None and kernel.ndim > 2:
        shares = np.asarray(jax.jit(kernels.specialisation)(kernel, targets))
        drawn["specialisation"] = plots.specialisation(shares, [str(c) for c in range(len(shares))])
    return drawn


def draw(result: Result, file: Path) -> list[Path]:
    """Save the pictures beside the kernel's file, as .svg and .png; the .svg files."""
    paths = []
    for name, figure in figures(result).items():
        stem = file.stem if name == "kernel" else f"{file.stem}-{name}"
        plots.save(figure, file.parent, stem)
        paths.append(file.parent / f"{stem}.svg")
    return paths
