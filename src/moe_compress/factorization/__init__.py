"""Factorization of experts into a shared core and low-rank deltas: pure tensors, no Transformers."""

from moe_compress.factorization.align import align_neurons, neuron_rows, permute_columns, permute_neurons, permute_rows
from moe_compress.factorization.allocation import error_curve, greedy_ranks
from moe_compress.factorization.budget import check_rank, largest_rank, projection_bytes, rank_within, uniform_ranks
from moe_compress.factorization.factors import DeltaFactors, Factors, WrapperFactors
from moe_compress.factorization.fit import METHODS, FitResult, FitSpec, fit
from moe_compress.factorization.grams import shrink_grams
from moe_compress.factorization.groups import group_experts

__all__ = [
    "METHODS",
    "DeltaFactors",
    "Factors",
    "FitResult",
    "FitSpec",
    "WrapperFactors",
    "align_neurons",
    "check_rank",
    "error_curve",
    "fit",
    "greedy_ranks",
    "group_experts",
    "largest_rank",
    "neuron_rows",
    "permute_columns",
    "permute_neurons",
    "permute_rows",
    "projection_bytes",
    "rank_within",
    "shrink_grams",
    "uniform_ranks",
]
