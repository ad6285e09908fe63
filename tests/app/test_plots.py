"""What the figures of kernel measures draw: data, names and units, and nothing over the data."""

import re
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.patches import StepPatch

from ntk_awt.app import plots
from ntk_awt.errors import InputError

NAMES = ("dense", "ticket", "elsewhere")


def drawn(figure):
    """Lay the figure out as `save` would."""
    FigureCanvasAgg(figure).draw()
    return figure


def overlaps(figure):
    """Whether a legend of the figure covers a part of the axes, labels included."""
    drawn(figure)
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    return any(
        legend.get_window_extent().overlaps(box) for legend in figure.legends for box in boxes
    )


def points(line):
    """The coordinates [2, n] of a line."""
    return np.array([line.get_xdata(), line.get_ydata()])


def names(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def image(ax):
    """The pixels of the picture in these axes."""
    (found,) = [a for a in ax.get_children() if isinstance(a, matplotlib.image.AxesImage)]
    return np.asarray(found.get_array())


def spectra():
    rng = np.random.default_rng(0)
    return {name: np.sort(rng.uniform(1, 9, 6))[::-1] for name in NAMES}


def test_a_legend_over_the_data_is_noticed():
    figure = plots.spectrum(spectra())
    assert not overlaps(figure)
    figure.legend(loc="center")
    assert overlaps(figure)


def test_spectrum_draws_sizes_and_shares():
    values = spectra()
    values["ticket"] = np.array([-1.0, 4.0, 1e-20, 3.0])  # sizes, in any order; one is rounding
    figure = plots.spectrum(values)
    sizes, mass = figure.axes
    for name, line, share in zip(NAMES, sizes.lines, mass.lines, strict=True):
        expected = np.array([4.0, 3.0, 1.0]) if name == "ticket" else values[name]
        rank = np.arange(1, len(expected) + 1)
        np.testing.assert_allclose(points(line), np.stack([rank, expected]))
        total = np.cumsum(sorted(abs(values[name]), reverse=True)) / abs(values[name]).sum()
        np.testing.assert_allclose(points(share)[1], total)
        assert to_hex(line.get_color()) == to_hex(share.get_color()) == plots.colors(NAMES)[name]
    assert names(figure) == list(NAMES)
    assert "logits² / parameter²" in sizes.get_ylabel()
    assert sizes.get_xscale() == sizes.get_yscale() == "log"
    assert not overlaps(figure)


@pytest.mark.parametrize("shape", [(8, 5, 4, 1), (2, 5, 4, 3), (3, 20), (1, 5, 4, 1)])
def test_eigenvectors_are_scaled_one_by_one(shape):
    pictures = np.random.default_rng(1).normal(size=shape) * np.arange(1, shape[0] + 1).reshape(
        -1, *[1] * (len(shape) - 1)
    )
    pictures[-1] = 0
    values = np.arange(shape[0], 0, -1) * 1.5
    figure = drawn(plots.eigenvectors(pictures, values))
    used = [ax for ax in figure.axes if ax.get_title()]
    assert [re.findall(r"[\d.]+", ax.get_title()) for ax in used] == [
        [str(i + 1), f"{value:.3g}"] for i, value in enumerate(values)
    ]
    for ax, picture in zip(used, pictures, strict=True):
        scaled = picture / (abs(picture).max() or 1)
        expected = (scaled + 1) / 2 if shape[-1] == 3 else scaled
        np.testing.assert_allclose(image(ax).ravel(), expected.ravel(), atol=1e-12)
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert ("pixel / largest pixel" in labels) == (shape[-1] != 3)  # colours need no scale


@pytest.mark.parametrize(("widest", "opening"), [(0.01, 30), (0.7, 60), (1.5, 90), (3.0, 180)])
def test_polar_draws_the_paths_and_opens_far_enough(widest, opening):
    angle = {name: np.linspace(0, widest, 4) / (i + 1) for i, name in enumerate(NAMES)}
    radius = {name: np.linspace(1, 2 + i, 4) for i, name in enumerate(NAMES)}
    figure = plots.polar(radius, angle)
    (ax,) = figure.axes
    assert ax.name == "polar"
    for name in NAMES:
        (path,) = [line for line in ax.lines if str(line.get_label()).startswith(f"{name},")]
        np.testing.assert_array_equal(points(path), [angle[name], radius[name]])
        assert to_hex(path.get_color()) == plots.colors(NAMES)[name]
    assert np.degrees(ax.get_xlim()) == pytest.approx([0, opening])
    assert ax.get_ylim()[0] == 0
    assert ax.get_ylim()[1] >= 4
    assert [text.split(",")[0] for text in names(figure)] == [*NAMES, "start"]
    assert names(figure)[0].endswith(f"{np.degrees(widest):.3g}°")
    assert not overlaps(figure)


def test_specialisation_shows_rows_as_classes():
    matrix = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [np.nan] * 3])
    figure = drawn(plots.specialisation(matrix, ["cat", "dog", "bird"]))
    ax, bar = figure.axes
    np.testing.assert_array_equal(np.ma.filled(image(ax), np.nan), matrix)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["cat", "dog", "bird"]
    assert ax.get_ylabel() == "labels of class"
    assert ax.get_xlabel() == "kernel of output"
    cells = {
        (round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in ax.texts
    }
    known = zip(*np.nonzero(np.isfinite(matrix)), strict=True)
    assert cells == {(int(i), int(j)): f"{matrix[i, j]:.2f}" for i, j in known}
    assert ax.images[0].norm(np.array([1 / 3])) == pytest.approx(0.5)
    assert "1/c = 0.33" in bar.get_ylabel()
    many = drawn(plots.specialisation(np.full((21, 21), 1 / 21), [str(i) for i in range(21)]))
    assert not many.axes[0].texts


def test_velocity_spans_each_interval():
    times = np.array([0, 1, 5, 20])
    values = {name: 10.0 ** -np.arange(3) * (i + 1) for i, name in enumerate(NAMES)}
    figure = plots.velocity(times, values)
    (ax,) = figure.axes
    for name, step in zip(NAMES, ax.patches, strict=True):
        assert isinstance(step, StepPatch)
        heights, edges, _ = step.get_data()
        np.testing.assert_array_equal(edges, times)
        np.testing.assert_array_equal(heights, values[name])
        assert to_hex(step.get_edgecolor()) == plots.colors(NAMES)[name]
    assert ax.get_yscale() == "log"
    assert "/ step]" in ax.get_ylabel()
    assert names(figure) == list(NAMES)
    assert not overlaps(figure)


@pytest.mark.parametrize("n2", [6, 4])
def test_kernel_takes_all_three_forms(n2):
    full = np.random.default_rng(2).normal(size=(6, n2, 3, 3))
    diagonal = np.stack([full[:, :, a, a] for a in range(3)], -1)
    mean = np.add.reduce([full[:, :, a, a] for a in range(3)]) / 3
    titles = {}
    for matrix in (full, diagonal, mean):
        figure = drawn(plots.kernel(matrix, "dense"))
        np.testing.assert_allclose(image(figure.axes[0]), mean, rtol=1e-12)
        titles[matrix.ndim] = figure.get_suptitle()
        spectra = [line for ax in figure.axes for line in ax.lines if points(line).size > 4]
        assert len(spectra) == (n2 == 6)  # of a square kernel only
        for line in spectra:
            found = np.linalg.svd(mean, compute_uv=False)
            np.testing.assert_allclose(points(line)[1], found, rtol=1e-9)
    assert titles == {4: "dense: mean over outputs", 3: "dense: mean over outputs", 2: "dense"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.kernel(np.ones(3), "x"), r"\[n1, n2, c\] or"),
        (lambda: plots.eigenvectors(np.ones((2, 4, 4, 1)), np.ones(3)), "one for each picture"),
        (lambda: plots.polar({"a": np.ones(3)}, {"a": np.ones(2)}), "as many as radii"),
        (lambda: plots.polar({"a": np.ones(3)}, {"b": np.ones(3)}), "as many as radii"),
        (lambda: plots.specialisation(np.ones((2, 3)), ["a", "b"]), r"shape \(2, 2\)"),
        (lambda: plots.velocity(np.arange(3), {"a": np.ones(3)}), "velocities of a: expected 2"),
    ],
)
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_saved_figures_are_the_same_byte_by_byte(tmp_path):
    for name in ("one", "two"):
        plots.save(plots.polar({"dense": np.ones(2)}, {"dense": np.arange(2.0)}), tmp_path, name)
    for suffix in ("svg", "png"):
        one, two = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two


def test_networks_of_one_colour_have_different_markers():
    many = ["dense", "random", *(f"network {i}" for i in range(20))]
    colors, markers = plots.colors(many), plots.markers(many)
    assert len({(colors[name], markers[name]) for name in many}) == len(many)


def test_relations_shows_every_mask_and_density():
    many = [f"network {i}" for i in range(12)]
    rows = [
        {"network": name, "target_density": density, "a": 10.0**i, "b": i + density}
        for i, name in enumerate(many)
        for density in (0.1, 0.3)
    ]
    figure = drawn(plots.relations([{"network": "dense"}, *rows], [("a", "b")]))
    (ax,) = figure.axes
    for i, cloud in enumerate(ax.collections):
        assert isinstance(cloud, PathCollection)
        offsets = np.asarray(cloud.get_offsets(), np.float64)
        np.testing.assert_allclose(offsets, [[10.0**i, i + p] for p in (0.1, 0.3)])
        small, large = cloud.get_sizes()
        assert small < large
    assert names(figure) == many
    assert not overlaps(figure)


def test_figures_of_twenty_networks_have_room():
    many = [f"network {i}" for i in range(20)]
    layers = [{"name": "dense1/kernel", "density": 0.1}, {"name": "dense2/kernel", "density": 0.2}]
    results = {
        name: {
            "density": 0.1,
            "layers": layers,
            **{f"{part}_accuracy": 0.5 for part in ("natural", "robust")},
            **{f"{part}_interval": [0.4, 0.6] for part in ("natural", "robust")},
        }
        for name in many
    }
    record = {"radii": [[0.0, 0.9], [0.1, 0.5]], "steps": [[1, 0.8], [10, 0.5]], "images": 500}
    rows = [
        {"network": name, "step": step, "loss": 1.0, "dynamics_gap": 1.0, "kernel_drift": 1.0}
        | dict.fromkeys(("relative_kernel_distance", "relative_target_distance"), 1.0)
        | dict.fromkeys(("validation_natural", "validation_robust"), 0.5)
        for name in many
        for step in (1, 2)
    ]
    for figure in (
        plots.layer_densities(results),
        plots.accuracies(results),
        plots.robustness(dict.fromkeys(many, record)),
        plots.training_curves(rows),
        plots.dynamics(rows),
        plots.search(rows),
    ):
        assert not overlaps(figure)  # a layout that collapses warns, which is an error here


def test_every_figure_is_found_and_matplotlib_loads_with_the_first():
    for name in plots.__all__:
        assert callable(getattr(plots, name))
    with pytest.raises(AttributeError, match="no attribute 'pie'"):
        _ = plots.pie
    code = (
        "import sys; from ntk_awt.app import plots; from ntk_awt.app.report import page\n"
        "print([m for m in ('matplotlib', 'jinja2', 'jax') if m in sys.modules])\n"
        "plots.save; print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "True"]
