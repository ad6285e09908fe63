"""Linear classifiers of Gaussian classes: adversarial and strong adversarial examples by formula.

Classes y = ±1 with x | y ~ N(μ_y, Σ_y); the classifier is sign(wᵀx + b), of any length ‖w‖, and its
margin M = y(wᵀx + b) is Gaussian. A perturbation v of a threat set V can turn a point around if
and only if M ≤ r, where r = max_{v ∈ V} wᵀv is the set's reach. There is no pixel box here.

Source: Shi and Ding, "Understanding and Quantifying Adversarial Examples Existence in Linear
Classification" (2019); theory L1–L5, where each statement is derived.
"""

from ntk_awt.theory.linear.angles import (
    LOSSES,
    hard_margin_cosine,
    mean_difference_cosine,
    ridge_cosine,
    svm_cosine,
)
from ntk_awt.theory.linear.margins import (
    Counts,
    Rates,
    binomial_interval,
    certified_radius,
    rates,
    simulate,
    worst_perturbation,
)
from ntk_awt.theory.linear.separability import (
    Best,
    Phases,
    best_classifier,
    best_isotropic_error,
    phase_diagram,
)
from ntk_awt.theory.linear.sets import (
    Ball,
    Gaussians,
    LinearClassifier,
    Strong,
    Threat,
    classifier_of,
    dual,
    reach,
    signs,
    symmetric,
)
from ntk_awt.theory.linear.studies import (
    SvmCase,
    knowledge_case,
    knowledge_experiment,
    svm_experiment,
)
from ntk_awt.theory.linear.svm import (
    METHODS,
    discriminant_basis,
    knowing_svms,
    penalised_svm,
    robust_svm,
    signal_svm,
    train_svm,
)

__all__ = [
    "LOSSES",
    "METHODS",
    "Ball",
    "Best",
    "Counts",
    "Gaussians",
    "LinearClassifier",
    "Phases",
    "Rates",
    "Strong",
    "SvmCase",
    "Threat",
    "best_classifier",
    "best_isotropic_error",
    "binomial_interval",
    "certified_radius",
    "classifier_of",
    "discriminant_basis",
    "dual",
    "hard_margin_cosine",
    "knowing_svms",
    "knowledge_case",
    "knowledge_experiment",
    "mean_difference_cosine",
    "penalised_svm",
    "phase_diagram",
    "rates",
    "reach",
    "ridge_cosine",
    "robust_svm",
    "signal_svm",
    "signs",
    "simulate",
    "svm_cosine",
    "svm_experiment",
    "symmetric",
    "train_svm",
    "worst_perturbation",
]
