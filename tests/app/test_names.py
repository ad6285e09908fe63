"""Networks by name: presets, variants, and those that need the trained dense network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt import attacks, masks, models, tickets
from ntk_awt.app import names as methods
from ntk_awt.app.config import (
    MaskConfig,
    ModelConfig,
    RunConfig,
    TicketConfig,
    TrainConfig,
    VariantConfig,
)
from ntk_awt.app.names import Trained
from ntk_awt.app.run.methods import Baseline, Dense, File, Pipeline, Search, check_names, resolve
from ntk_awt.attacks import PGD
from ntk_awt.errors import InputError
from ntk_awt.threats import Linf


@pytest.mark.parametrize(
    ("name", "kind", "method"),
    [
        ("dense", Dense, "dense"),
        ("ticket", Search, "awt"),
        ("awt-scores", Search, "awt-scores"),
        ("ntt", Search, "awt"),
        ("snip", Baseline, "snip"),
        ("hydra", Pipeline, "hydra"),
        ("some/file.safetensors", File, "some/file.safetensors"),
    ],
)
def test_names(name, kind, method):
    found = resolve(RunConfig(), name)
    assert (type(found), found.name) == (kind, method)
    assert kind is not Search or found.ticket.solver == method


def test_variants_change_the_run_s_settings():
    variants = {
        "long": VariantConfig("awt", ticket={"ticket_steps": 900}),
        "wide": VariantConfig("ntt", mask={"allocation": "global"}, ticket={"patience": 2}),
        "mine": VariantConfig("ticket"),
        "rnd": VariantConfig("random", mask={"allocation": "uniform"}),
    }
    config = RunConfig(ticket=TicketConfig(solver="concrete", kernel_weight=0.3), variants=variants)
    long = resolve(config, "long")
    expected = dataclasses.replace(config.ticket, solver="awt", ticket_steps=900)
    assert (long.ticket, long.mask) == (expected, config.mask)
    wide = resolve(config, "wide")
    assert (wide.mask.allocation, wide.mask.gain) == ("global", "none")
    assert (wide.ticket.jacobian, wide.ticket.patience, wide.ticket.solver) == ("full", 2, "awt")
    assert resolve(config, "mine").name == "concrete"
    assert resolve(config, "rnd").mask.allocation == "uniform"
    check_names(config)


@pytest.mark.parametrize(
    ("variants", "networks", "message"),
    [
        ({}, ("dense", "snap"), "network: expected one of .*snip"),
        ({"awt": VariantConfig("awt")}, ("dense",), "variant: expected a name of its own"),
        ({"a": VariantConfig("awd")}, ("dense",), "method of variant a"),
        ({"a": VariantConfig("awt", ticket={"stpes": 1})}, ("dense",), "variant a.ticket"),
        ({"a": VariantConfig("awt", ticket={"start": "b"})}, ("dense",), "start of the search"),
        ({"a": VariantConfig("awt", mask={"density": 2.0})}, ("dense",), "density"),
        ({"a": VariantConfig("awt")}, ("dense", "x/a.safetensors"), "network file"),
    ],
)
def test_bad_names_and_variants(variants, networks, message):
    config = RunConfig(networks=networks, variants=variants)
    with pytest.raises(InputError, match=message):
        check_names(config)


# ---------------------------------------------------------------- after dense training


@pytest.fixture(scope="module")
def start():
    """A small network on two separable classes; its trained weights are made up."""
    config = ModelConfig(widths=(10,))
    network = models.build(config, (4, 4, 1), 2, jax.random.key(0))
    other = models.build(config, (4, 4, 1), 2, jax.random.key(1))
    rng = np.random.default_rng(0)
    y = np.arange(64) % 2
    x = np.clip(0.3 + 0.4 * y[:, None] * np.eye(16)[3] + 0.1 * rng.uniform(size=(64, 16)), 0, 1)
    return Trained(
        network.apply,
        network.params,
        other.params,
        x.reshape(-1, 4, 4, 1).astype(np.float32),
        y,
        Linf(0.05),
        PGD(steps=2),
        jax.random.key(2),
        MaskConfig(density=0.2),
        TrainConfig(epochs=6, batch_size=16, learning_rate=0.05),
    )


def kernels_of(tree):
    return {name: np.asarray(leaf["kernel"]) for name, leaf in tree.items()}


@pytest.mark.parametrize("name", ["rewind", "prune"])
def test_the_largest_trained_weights_are_kept(start, name):
    found = methods.PIPELINES[name](start)
    trained, mask = kernels_of(start.params), kernels_of(found.mask)
    sizes = {n: m.size for n, m in mask.items()}
    assert sum(m.sum() for m in mask.values()) == round(0.2 * sum(sizes.values()))
    values = kernels_of(start.initial if name == "rewind" else start.params)
    for layer in mask:
        kept = np.abs(trained[layer])[mask[layer]]
        assert kept.min() >= np.abs(trained[layer])[~mask[layer]].max()
        np.testing.assert_array_equal(found.params[layer]["kernel"], values[layer] * mask[layer])
    unit = all(float(g) == 1 for g in jax.tree.leaves(found.gain))
    assert unit == (name == "prune")


def test_hydra_learns_which_trained_weights_to_keep(start):
    found = methods.hydra(start)
    mask, trained = kernels_of(found.mask), kernels_of(start.params)
    first = kernels_of(methods.prune(start).mask)
    assert {n: m.sum() for n, m in mask.items()} == {n: m.sum() for n, m in first.items()}
    assert any((mask[n] != first[n]).any() for n in mask)
    for layer in mask:
        np.testing.assert_array_equal(found.params[layer]["kernel"], trained[layer] * mask[layer])

    def loss(ticket):
        logits = start.apply(masks.effective(*ticket), jnp.asarray(start.x))
        return float(attacks.CRITERIA["cross-entropy"](logits, jnp.asarray(start.y)).mean())

    assert loss(found) < loss(methods.prune(start))


def test_every_name_has_a_way_and_a_contract(start):
    """Exact density, booleans, pruned weights at zero, for all pipelines."""
    for make in methods.PIPELINES.values():
        ticket = make(start)
        prunable = [m for m in jax.tree.leaves(ticket.mask) if m.ndim > 1]
        total = sum(m.size for m in prunable)
        assert sum(int(m.sum()) for m in prunable) == round(0.2 * total)
        assert all(m.dtype == bool for m in prunable)
        pruned = jax.tree.map(lambda w, m: np.abs(np.asarray(w)[~np.asarray(m)]).sum(), *ticket[:2])
        assert sum(jax.tree.leaves(pruned)) == 0


def test_presets_are_known_methods():
    for name in tickets.PRESETS:
        assert isinstance(resolve(RunConfig(), name), Search)
