"""Factorization of experts into a shared core and low-rank deltas: pure tensors, no Transformers."""

from moe_compress.factorization.align import align_neurons, neuron_rows, permute_columns, permute_neurons, permute_rows
from moe_compress.factorization.allocation import Budget, Choice, greedy_choices, uniform_choices
from moe_compress.factorization.budget import (
    Form,
    check_rank,
    largest_rank,
    projection_bytes,
    rank_within,
    uniform_ranks,
)
from moe_compress.factorization.curves import error_curve, error_curves
from moe_compress.factorization.factors import DeltaFactors, Factors, WrapperFactors
from moe_compress.factorization.fit import METHODS, FitResult, FitSpec, fit
from moe_compress.factorization.grams import shrink_grams
from moe_compress.factorization.groups import group_experts

__all__ = [
    "METHODS",
    "Budget",
    "Choice",
    "DeltaFactors",
    "Factors",
    "FitResult",
    "FitSpec",
    "Form",
    "WrapperFactors",
    "align_neurons",
    "check_rank",
    "error_curve",
    "error_curves",
    "fit",
    "greedy_choices",
    "group_experts",
    "largest_rank",
    "neuron_rows",
    "permute_columns",
    "permute_neurons",
    "permute_rows",
    "projection_bytes",
    "rank_within",
    "shrink_grams",
    "uniform_choices",
    "uniform_ranks",
]
