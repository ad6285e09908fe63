"""Kernels over four simulated devices, and over two processes, against those of one device.

The devices of a process are counted when JAX starts, so what needs several runs in processes of its
own (`four_devices`, `one_of_two`), which write what they found; the tests compare it here.
"""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from ntk_awt import kernels
from ntk_awt.errors import InputError
from ntk_awt.kernels import sharded
from ntk_awt.network import Network
from tests.compiled import branch

SLOW = ("test_gradient_sums_over_the_devices mlp-ticket",)

ROOT = Path(__file__).parents[2]
PATIENCE = 1800
"""Seconds after which a process that hangs is ended."""

IMAGE = (6, 6, 1)


# ---------------------------------------------------------------- what is computed


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def layer(seed, *shape):
    kernel = normal(seed, *shape) / np.sqrt(np.prod(shape[:-1]), dtype=np.float32)
    return {"kernel": kernel, "bias": normal(seed + 1, shape[-1])}


def affine(params, x):
    return x.reshape(len(x), -1) @ params["kernel"] + params["bias"]


def mlp(width=7, classes=3):
    def apply(params, x):
        return affine(params["dense2"], jax.nn.relu(affine(params["dense1"], x)))

    return Network(apply, {"dense1": layer(1, 36, width), "dense2": layer(3, width, classes)})


def cnn():
    def apply(params, x):
        kernel, bias = params["conv1"]["kernel"], params["conv1"]["bias"]
        order = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", None, None, order)
        return affine(params["dense1"], jnp.tanh(x + bias))

    return Network(apply, {"conv1": layer(5, 3, 3, 1, 4), "dense1": layer(7, 16, 3)})


def dense(params):
    return {}


def ticket(params):
    mask = jax.tree.map(lambda w: (w.ndim < 2) | (normal(9, *w.shape) > 0.5), params)
    return {"mask": mask, "gain": jax.tree.map(lambda w: np.float32(1 + 0.5 * (w.ndim > 1)), mask)}


def soft(params):
    """Numbers in place of booleans, and no gain."""
    return {"mask": jax.tree.map(lambda w: normal(11, *w.shape), params)}


def images(seed, n) -> Any:
    return np.random.default_rng(seed).uniform(size=(n, *IMAGE)).astype(np.float32)


class Case(NamedTuple):
    """A network, its mask, the numbers of images (one only: symmetric), and options."""

    network: Any
    sparsity: Any
    n1: int
    n2: int | None = None
    options: dict[str, Any] = {}  # noqa: RUF012  never changed
    mesh: str = "line"

    def arguments(self) -> Any:
        net = self.network()
        options = {**self.sparsity(net.params), **self.options}
        x2 = None if self.n2 is None else images(1, self.n2)
        return (net, net.params, images(0, self.n1), x2), options


CASES = {
    "mlp-dense": Case(mlp, dense, 8, 3),
    "mlp-dense-uneven": Case(mlp, dense, 10),
    "mlp-ticket": Case(mlp, ticket, 8),
    "mlp-ticket-mixed-uneven": Case(mlp, ticket, 9, 4),
    "mlp-soft-diagonal": Case(mlp, soft, 4, 5, {"outputs": "diagonal"}),
    "mlp-fewer-images-than-devices": Case(mlp, ticket, 2, 3, {"outputs": 1}),
    "cnn-dense-trace-tiles": Case(cnn, dense, 8, 5, {"outputs": "trace", "batch": 2}),
    "cnn-ticket-uneven": Case(cnn, ticket, 6),
    "cnn-ticket-contraction": Case(cnn, ticket, 4, 3, {"engine": "contraction"}),
    "all-axes-explicit": Case(mlp, dense, 10, 3, {"outputs": "trace"}, "explicit"),
    "one-axis-of-two": Case(mlp, ticket, 8, 3, {"outputs": "trace", "axis": "a"}, "square"),
}


def meshes():
    devices = np.array(jax.devices())
    return {
        "line": Mesh(devices, ("rows",)),
        "square": Mesh(devices.reshape(2, 2), ("a", "b")),
        "explicit": jax.make_mesh((2, 2), ("a", "b")),
    }


def rows_held(kernel):
    """First row, and the one after the last, that each device of this process holds."""
    return {
        str(shard.device.id): [shard.index[0].start or 0, shard.index[0].stop or kernel.shape[0]]
        for shard in kernel.addressable_shards
    }


def gradient(compute, case):
    """Leaves of the gradient of a scalar of a kernel, with respect to the parameters."""
    (apply, params, *x), options = case.arguments()
    scalar = jax.grad(lambda w: jnp.sum(jnp.sin(compute(apply, w, *x, **options))))
    return jax.tree.leaves(scalar(params))


GRADIENTS = ("mlp-ticket-mixed-uneven", "mlp-ticket")


def flops(compute):
    """Of the compiled program of one device."""
    net = mlp(width=64, classes=10)
    x1, x2 = images(0, 64), images(1, 32)
    kernel = jax.jit(lambda w, x1, x2: compute(net, w, x1, x2, engine="layerwise"))
    compiled: Any = kernel.lower(net.params, x1, x2).compile()
    return compiled.cost_analysis()["flops"]


MAPPED = ("mlp-dense", "cnn-dense-trace-tiles", "cnn-ticket-contraction")
"""Cases whose rows are shared by `jax.shard_map` around `kernels.empirical`, with its checks."""


def mapped(case, mesh, call):
    """`call(kernel, params)` on every device, `kernel(params)` of its own images."""
    (apply, params, x1, x2), options = case.arguments()

    def local(params, x1, x2):
        return call(lambda w: kernels.empirical(apply, w, x1, x2, **options), params)

    rows, same = PartitionSpec("rows"), PartitionSpec()
    specs: Any = {"in_specs": (same, rows, same), "mesh": mesh}
    return lambda out: jax.jit(jax.shard_map(local, out_specs=out, **specs))(params, x1, x2)


def mapped_gradient(kernel, params):
    return jax.tree.leaves(jax.grad(lambda w: jnp.sum(jnp.sin(kernel(w))))(params))


def four_devices(folder):
    """The part with four simulated devices: kernels and gradients as .npz, the rest as JSON."""
    assert len(jax.devices()) == 4
    by_name, found, facts = meshes(), {}, {}
    line = by_name["line"]
    for name, case in CASES.items():
        arguments, options = case.arguments()
        kernel = sharded.empirical(*arguments, mesh=by_name[case.mesh], **options)
        found[name] = sharded.gather(kernel)
        facts[name] = {"held": rows_held(kernel), "replicated": kernel.is_fully_replicated}
    for name in GRADIENTS:
        leaves = gradient(partial(sharded.empirical, mesh=line), CASES[name])
        found |= {f"{name}/{i}": leaf for i, leaf in enumerate(leaves)}
    for name in MAPPED:
        kernel = mapped(CASES[name], line, lambda kernel, params: kernel(params))
        found[f"mapped {name}"] = kernel(PartitionSpec("rows"))
    leaves = mapped(CASES["mlp-dense"], line, mapped_gradient)(PartitionSpec())
    found |= {f"mapped gradient/{i}": leaf for i, leaf in enumerate(leaves)}
    # What was computed on several devices must leave no trace in what is computed on one.
    leaves = gradient(kernels.empirical, CASES["mlp-ticket"])
    facts["meshes"] = [str(jax.typeof(leaf).sharding.mesh) for leaf in leaves]
    facts["no mesh"] = str(jax.typeof(jnp.zeros(1)).sharding.mesh)
    facts["flops"] = {
        "one": flops(kernels.empirical),
        "four": flops(partial(sharded.empirical, mesh=line)),
    }
    np.savez(folder / "four.npz", **found)
    (folder / "four.json").write_text(json.dumps(facts))


BETWEEN = ("mlp-ticket", "mlp-ticket-mixed-uneven")


def one_of_two(folder, port, rank):
    """The part of one of two processes with two devices each."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        num_processes=2,
        process_id=rank,
        initialization_timeout=PATIENCE,
        heartbeat_timeout_seconds=PATIENCE,  # compilation on a busy machine stops the heart
    )
    mesh, found, held = Mesh(np.array(jax.devices()), ("rows",)), {}, {}
    for name in BETWEEN:
        arguments, options = CASES[name].arguments()
        kernel = sharded.empirical(*arguments, mesh=mesh, **options)
        found[name] = sharded.gather(kernel)
        held[name] = rows_held(kernel)
    leaves = gradient(partial(sharded.empirical, mesh=mesh), CASES[BETWEEN[1]])
    found |= {f"gradient/{i}": leaf.addressable_data(0) for i, leaf in enumerate(leaves)}
    np.savez(folder / f"rank{rank}.npz", **found)
    (folder / f"rank{rank}.json").write_text(json.dumps(held))


def start(devices, call, log, environment=os.environ):
    """A process with so many simulated devices that calls a function of this file."""
    flags = os.environ.get("XLA_FLAGS", "")
    more = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
    }
    code = f"from pathlib import PosixPath; from tests.kernels import test_sharded as t; t.{call}"
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=environment | more, stdout=file, stderr=file
        )


def finish(processes, logs):
    """Wait for processes; one that fails or hangs ends all of them, and shows what it said."""
    try:
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(PATIENCE) == 0, log.read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


# ---------------------------------------------------------------- four devices


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    finish([start(4, f"four_devices({folder!r})", folder / "log")], [folder / "log"])
    with np.load(folder / "four.npz") as file:
        return dict(file), json.loads((folder / "four.json").read_text())


def agree(found, expected):
    """Equal up to float32 rounding of sums over the parameters."""
    expected = np.asarray(expected)
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    return bool(np.all(np.abs(found - expected) <= 1e-5 * np.abs(expected).max()))


def alone(case):
    arguments, options = case.arguments()
    options.pop("axis", None)
    return np.asarray(kernels.empirical(*arguments, **options))


@pytest.mark.parametrize("name", MAPPED)
def test_inside_shard_map(four, name):
    """Each device has the kernel of its own images, not a sum over the devices."""
    assert agree(four[0][f"mapped {name}"], alone(CASES[name]))


def test_gradient_inside_shard_map(four):
    expected = gradient(kernels.empirical, CASES["mlp-dense"])
    for i, leaf in enumerate(expected):
        assert agree(four[0][f"mapped gradient/{i}"], leaf)


@pytest.mark.parametrize("name", CASES)
def test_four_devices_agree_with_one(four, name):
    found, expected = four[0][name], alone(CASES[name])
    assert agree(found, expected)
    # A share in the wrong place, or rows of the filled-up share left in, would be noticed.
    assert not agree(np.roll(found, 1, axis=0), expected)
    assert not agree(np.concatenate([found, found[-1:]]), expected)


@pytest.mark.parametrize("name", CASES)
def test_rows_stay_on_their_devices(four, name):
    """Device k of D holds rows k·n/D on; JAX has no uneven shares, so those are whole on all."""
    case, facts = CASES[name], four[1][name]
    devices = {"one-axis-of-two": [0, 0, 1, 1]}.get(name, [0, 1, 2, 3])
    share, rest = divmod(case.n1, max(devices) + 1)
    assert facts["replicated"] == (rest > 0)
    expected = [[0, case.n1] if rest else [k * share, (k + 1) * share] for k in devices]
    assert facts["held"] == {str(d): rows for d, rows in enumerate(expected)}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_sums_over_the_devices(four, name):
    expected = gradient(kernels.empirical, CASES[name])
    found = [four[0][f"{name}/{i}"] for i in range(len(expected))]
    assert all(map(agree, found, expected))
    assert not all(map(agree, [leaf / 4 for leaf in found], expected))  # the mean instead


def test_one_device_alone_knows_no_mesh(four):
    assert set(four[1]["meshes"]) == {four[1]["no mesh"]}


def is_quarter(part, whole):
    """A quarter, and what the columns' images cost on every device."""
    return 0.25 <= part / whole < 0.3


def test_each_device_does_a_quarter_of_the_work(four):
    counts = four[1]["flops"]
    assert is_quarter(counts["four"], counts["one"])
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    assert not is_quarter(flops(partial(sharded.empirical, mesh=mesh)), counts["one"])


# ---------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    logs = [folder / f"log{rank}" for rank in (0, 1)]
    with socket.socket() as held:
        try:
            # Held while they run, so that nobody else is given the port; they can share it.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(("127.0.0.1", 0))
        except OSError as error:
            pytest.skip(f"two processes need a socket on this machine: {error}")
        port = held.getsockname()[1]
        calls = [f"one_of_two({folder!r}, {port}, {rank})" for rank in (0, 1)]
        finish([start(2, call, log, branch()) for call, log in zip(calls, logs, strict=True)], logs)
    results = []
    for rank in (0, 1):
        with np.load(folder / f"rank{rank}.npz") as file:
            results.append((dict(file), json.loads((folder / f"rank{rank}.json").read_text())))
    return results


@pytest.mark.parametrize("name", BETWEEN)
def test_two_processes_agree_with_one(two, name):
    expected = alone(CASES[name])
    for found, _ in two:
        assert agree(found[name], expected)
    assert not agree(np.roll(two[0][0][name], 4, axis=0), expected)  # the processes exchanged


def test_each_process_holds_its_own_rows(two):
    held = [list(rows[BETWEEN[0]].values()) for _, rows in two]
    assert held == [[[0, 2], [2, 4]], [[4, 6], [6, 8]]]


def test_gradient_sums_over_the_processes(two):
    expected = gradient(kernels.empirical, CASES[BETWEEN[1]])
    for found, _ in two:
        leaves = [found[f"gradient/{i}"] for i in range(len(expected))]
        assert all(map(agree, leaves, expected))
        assert not all(map(agree, [leaf / 2 for leaf in leaves], expected))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": "row"}, "axis: expected one of rows, got 'row'; did you mean 'rows'"),
        ({"x2": np.zeros((2, 4, 4, 1), np.float32)}, "x2: expected images of shape"),
        ({"gain": {}}, "gain: expected a mask with it"),
        ({"mask": {"dense1": {}}}, "mask dense1/bias: expected a leaf"),
        ({"outputs": "all"}, "outputs: expected one of diagonal, full, trace"),
        ({"outputs": 3}, "number of a logit, 0…2"),
        ({"engine": "magic"}, "engine: expected one of"),
        ({"batch": 0}, "batch: expected a whole number"),
    ],
)
def test_bad_input_says_what_was_expected(options, message):
    net = mlp()
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    with pytest.raises(InputError, match=message):
        sharded.empirical(net, net.params, images(0, 2), mesh=mesh, **options)
    masked = ticket(net.params)
    del masked["gain"]["dense1"]["bias"]
    with pytest.raises(InputError, match="gain dense1/bias: expected a leaf"):
        sharded.empirical(net, net.params, images(0, 2), mesh=mesh, **masked)
