"""Figures of tangent kernels and of their measures."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from ntk_awt.app.plots.style import GRID, colors, legend_above, new_figure
from ntk_awt.errors import InputError

__all__ = ["eigenvectors", "kernel", "polar", "specialisation", "spectrum", "velocity"]

_KERNEL_UNIT = "[logits² / parameter²]"


def kernel(matrix: np.ndarray, title: str) -> Figure:
    """A kernel as a picture of its mean over outputs, and its spectrum if square.

    Args:
        matrix: the kernel [n1, n2, c, c], its diagonal blocks [n1, n2, c], or one matrix [n1, n2]
            (of one output, or a mean already), in squared logits per squared parameter.
        title: of the figure; "mean over outputs" is added where the mean is taken here.

    Raises:
        InputError: another number of axes.
    """
    if matrix.ndim not in (2, 3, 4):
        raise InputError(
            "kernel",
            expected="axes [n1, n2], [n1, n2, c] or [n1, n2, c, c]",
            got=f"shape {matrix.shape}",
        )
    diagonal = np.diagonal(matrix, axis1=2, axis2=3) if matrix.ndim == 4 else matrix
    mean = diagonal.mean(2) if diagonal.ndim == 3 else diagonal
    square = mean.shape[0] == mean.shape[1]
    figure, axes = new_figure(2 if square else 1, height=3.6)
    image = axes[0].imshow(mean, cmap="magma", interpolation="nearest")
    axes[0].grid(False)
    axes[0].set(xlabel="column image", ylabel="row image")
    title = title if matrix.ndim == 2 else f"{title}: mean over outputs"
    figure.suptitle(title, fontsize=11, parse_math=False)  # it has names of files
    figure.colorbar(image, ax=axes[0], label=f"Θ  {_KERNEL_UNIT}")
    if square:
        values = np.linalg.svd(mean, compute_uv=False)
        axes[1].semilogy(np.arange(1, len(values) + 1), values, marker=".")
        axes[1].set(xlabel="index", ylabel=f"singular value  {_KERNEL_UNIT}")
    return figure


def spectrum(values: Mapping[str, np.ndarray]) -> Figure:
    """Eigenvalues (or singular values) by rank, and the share of the trace in the first ones.

    Sizes |λ| are drawn, largest first. Those that are zero up to rounding (|λ| ≤ m·u·max|λ|, u the
    spacing of floats at 1) are left out of the first picture: a logarithmic axis would show noise.

    Args:
        values: the m eigenvalues of each network's kernel, in squared logits per squared parameter.
    """
    figure, (sizes, mass) = new_figure(2, height=3.6)
    for name, color in colors(list(values)).items():
        found = np.sort(np.abs(values[name]))[::-1]
        rank = np.arange(1, len(found) + 1)
        shown = found > len(found) * np.finfo(found.dtype).eps * found[0]
        sizes.loglog(rank[shown], found[shown], ".-", color=color, label=name)
        mass.semilogx(rank, np.cumsum(found) / found.sum(), color=color)
    sizes.set(xlabel="rank k", ylabel=f"eigenvalue $|λ_k|$  {_KERNEL_UNIT}")
    mass.set(xlabel="rank k", ylabel="share of the trace in ranks 1…k", ylim=(0, 1.02))
    legend_above(figure, sizes)
    return figure


def eigenvectors(pictures: np.ndarray, values: np.ndarray) -> Figure:
    """Eigenvectors of a kernel as pictures Σ_i u_i x_i, each scaled to its own largest pixel.

    Args:
        pictures: [k, height, width, channels], or flat features [k, d], drawn as one row; signed.
        values: their k eigenvalues, in squared logits per squared parameter.

    Raises:
        InputError: not one eigenvalue for each picture.
    """
    if len(pictures) != len(values):
        raise InputError(
            "values", expected=f"{len(pictures)}, one for each picture", got=f"{len(values)}"
        )
    columns = min(len(pictures), 6)
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.4 * columns + 1.4, 1.6 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    flat = list(grid.ravel())
    for ax in flat:
        ax.set_axis_off()
    image = None
    for i, (ax, picture) in enumerate(zip(flat, pictures, strict=False)):
        pixels = picture / (np.abs(picture).max() or 1.0)
        if pixels.ndim == 1:
            image = ax.imshow(pixels[None], cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        elif pixels.shape[-1] == 3:
            ax.imshow((pixels + 1) / 2, interpolation="nearest")
        else:
            image = ax.imshow(pixels[..., 0], cmap="RdBu_r", vmin=-1, vmax=1)
        ax.set_title(f"$λ_{{{i + 1}}}$ = {values[i]:.3g}", fontsize=9)
    figure.suptitle(f"$Σ_i u_i x_i$ (gray or white: 0), λ in {_KERNEL_UNIT[1:-1]}", fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=grid, label="pixel / largest pixel", ticks=(-1, 0, 1))
    return figure


def polar(radius: Mapping[str, np.ndarray], angle: Mapping[str, np.ndarray]) -> Figure:
    """Paths of kernels from their start: radius ‖Θ_t‖/‖Θ_0‖, angle between Θ_t and Θ_0.

    The cross is Θ_0, a large dot the last record. The sector opens as far as the paths need.

    Args:
        radius: along the training of each network, without unit.
        angle: of the same networks and times, in radians from 0 to π.

    Raises:
        InputError: other networks or times in one than in the other.
    """
    lengths = [{name: len(path) for name, path in paths.items()} for paths in (radius, angle)]
    if lengths[0] != lengths[1]:
        raise InputError("angle", expected=f"as many as radii, {lengths[0]}", got=f"{lengths[1]}")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.add_subplot(projection="polar")
    for name, color in colors(list(radius)).items():
        label = f"{name}, last {np.degrees(angle[name][-1]):.3g}°"
        ax.plot(angle[name], radius[name], ".-", color=color, label=label, linewidth=1)
        ax.plot(angle[name][-1], radius[name][-1], "o", color=color)
    ax.plot(0, 1, "kx", label="start", clip_on=False, zorder=3)
    widest = np.degrees(max(path.max() for path in angle.values()))
    opening = next(a for a in (30, 60, 90, 180) if widest <= a or a == 180)
    ax.set(thetamin=0, thetamax=opening, rmin=0)
    ax.set_xticks(np.radians(np.arange(0, opening + 1, opening // 6)))
    ax.grid(color=GRID, linewidth=0.6)
    ax.set_xlabel("radius: ‖$Θ_t$‖ / ‖$Θ_0$‖")
    ax.set_title("angle between $Θ_t$ and $Θ_0$", fontsize=10)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def specialisation(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """How the alignment with each class' labels is shared among the outputs' kernels: a heat map.

    White is 1/c, no specialisation; red is more, blue less; undefined shares (NaN) are left blank.
    The shares are written into the cells of up to 20 classes.

    Args:
        matrix: [c, c], row = class, column = output, rows sum to 1.
        classes: the c names.

    Raises:
        InputError: a matrix that is not square, or not one name for each row.
    """
    count = len(classes)
    if matrix.shape != (count, count):
        raise InputError("matrix", expected=f"shape {(count, count)}", got=f"shape {matrix.shape}")
    size = 2.0 + 0.38 * min(count, 20)
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    ax = figure.subplots()
    known = matrix[np.isfinite(matrix)]
    norm = CenteredNorm(1 / count, np.abs(known - 1 / count).max(initial=0.2 / count))
    image = ax.imshow(matrix, cmap="RdBu_r", norm=norm, interpolation="nearest")
    for i, j in np.argwhere(np.isfinite(matrix)) if count <= 20 else ():
        color = "white" if abs(norm(matrix[i, j]) - 0.5) > 0.35 else "black"
        ax.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(range(count), classes, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(count), classes)
    ax.set(xlabel="kernel of output", ylabel="labels of class")
    figure.colorbar(image, ax=ax, label=f"share of alignment (1/c = {1 / count:.2g})")
    return figure


def velocity(times: np.ndarray, values: Mapping[str, np.ndarray]) -> Figure:
    """Kernel velocity in each interval between two records.

    Args:
        times: of the t records, in steps.
        values: t − 1 velocities of each network, cosine distance per step.

    Raises:
        InputError: not one velocity for each interval.
    """
    figure, (ax,) = new_figure(1, height=3.6)
    for name, color in colors(list(values)).items():
        if len(values[name]) != len(times) - 1:
            raise InputError(
                f"velocities of {name}", expected=f"{len(times) - 1}", got=f"{len(values[name])}"
            )
        ax.stairs(values[name], times, baseline=None, color=color, label=name, linewidth=1.4)
    ax.set(xlabel="step", ylabel="kernel velocity  [cosine distance / step]", yscale="log")
    legend_above(figure, ax)
    return figure
