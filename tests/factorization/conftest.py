"""Experts with known structure for the tests of the factorization."""

import pytest
import torch

from moe_compress.factorization import DeltaFactors, WrapperFactors


def _random(generator, *shape):
    return torch.randn(*shape, generator=generator)


@pytest.fixture(scope="session")
def random_delta():
    """Factory of `DeltaFactors` whose delta is as large as the core."""

    def make(experts, rows, columns, rank, *, cores=1, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return DeltaFactors(
            core=_random(generator, rows, columns) if cores else None,
            delta_out=_random(generator, experts, rows, rank) / max(1, rank) ** 0.5,
            delta_in=_random(generator, experts, rank, columns),
        )

    return make


@pytest.fixture(scope="session")
def random_wrapper():
    """Factory of `WrapperFactors` whose wrappers change about half of what the core does in their subspace."""

    def make(experts, rows, columns, side_rank, *, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def side(size):
            return _random(generator, experts, size, side_rank) / size**0.5

        return WrapperFactors(_random(generator, rows, columns), side(rows), side(rows), side(columns), side(columns))

    return make


@pytest.fixture(scope="session")
def anisotropic_grams():
    """Factory of Gram matrices [E, in, in] of inputs that vary more in some directions, each expert's in others."""

    def make(experts, columns, *, tokens=200, seed=0):
        generator = torch.Generator().manual_seed(seed)
        mixing = _random(generator, columns, columns) * torch.logspace(0, -1.5, columns)[:, None]
        scales = torch.rand(experts, 1, columns, generator=generator) + 0.1
        inputs = _random(generator, experts, tokens, columns) * scales @ mixing
        return inputs.mT @ inputs

    return make
