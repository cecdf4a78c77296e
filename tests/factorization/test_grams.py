"""Gram matrices: shrinkage, and the norm they define."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_compress.errors import UserError
from moe_compress.factorization import grams, shrink_grams
from moe_compress.factorization.grams import Metric, chunks


def test_shrinkage_moves_towards_the_mean_of_the_layer(anisotropic_grams):
    gram = anisotropic_grams(3, 5)
    torch.testing.assert_close(shrink_grams(gram, 0.0), gram)
    torch.testing.assert_close(shrink_grams(gram, 0.25), 0.75 * gram + 0.25 * gram.mean(0))
    torch.testing.assert_close(shrink_grams(gram, 1.0), gram.mean(0).expand_as(gram))


@pytest.mark.parametrize("with_counts", [False, True])
def test_experts_without_tokens_get_the_mean_of_the_others(anisotropic_grams, with_counts):
    gram = anisotropic_grams(4, 5)
    gram[2] = 0
    counts = torch.tensor([200, 200, 0, 200]) if with_counts else None
    shrunk = shrink_grams(gram, 0.1, counts)
    mean = gram[[0, 1, 3]].mean(0)
    torch.testing.assert_close(shrunk[2], mean)
    torch.testing.assert_close(shrunk[0], 0.9 * gram[0] + 0.1 * mean)


def test_low_precision_grams_are_shrunk_in_fp32():
    gram = torch.tensor([[[1.0]], [[0.0]]], dtype=torch.bfloat16)
    shrunk = shrink_grams(gram, 0.001, torch.tensor([1, 1]))
    assert shrunk.dtype == torch.float32
    torch.testing.assert_close(shrunk.flatten(), torch.tensor([0.9995, 0.0005]))
    assert shrink_grams(gram.double(), 0.1).dtype == torch.float64


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1, float("nan")])
def test_shrinkage_out_of_range(shrinkage):
    with pytest.raises(UserError, match="shrinkage"):
        shrink_grams(torch.ones(1, 1, 1), shrinkage)


def test_norm_of_the_metric_is_that_of_the_outputs(monkeypatch):
    """Up to the common scale: |D x|^2 summed over the inputs."""
    monkeypatch.setattr(grams, "_DAMPING", 1e-6)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 50, 6, generator=generator) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    change = torch.randn(3, 4, 6, generator=generator)
    metric = Metric(inputs.mT @ inputs)
    experts = slice(0, 3)
    norms = metric.squared_norms(change, experts)
    outputs = (inputs @ change.mT).square().sum((1, 2)).double()
    torch.testing.assert_close(norms / norms.sum(), outputs / outputs.sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(metric.root @ metric.root.mT, metric.gram)
    torch.testing.assert_close((metric.apply(change, experts) * change).sum((1, 2)).double(), norms)
    torch.testing.assert_close(metric.unwhiten(metric.whiten(change, experts), experts), change)


def test_with_out_grams_one_expert_at_a_time_is_in_fp64():
    """The norm is that of the input matrices over the traces of the output matrices, never there as a whole."""
    generator = torch.Generator().manual_seed(0)
    inputs, gradients = torch.randn(5, 40, 12, generator=generator), torch.randn(5, 40, 7, generator=generator)
    gram, out_gram = inputs.mT @ inputs, gradients.mT @ gradients
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for made in result if isinstance(result, tuple) else (result,):
                if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                    largest = max(largest, made.numel())
            return result

    with Watch():
        metric = Metric(gram, out_gram)
    assert largest == 12 * 12
    traces = out_gram.diagonal(dim1=1, dim2=2).double().sum(1)
    divided = Metric(gram.double() / traces[:, None, None])
    assert torch.equal(metric.gram, divided.gram) and torch.equal(metric.root, divided.root)
    assert metric.unit == pytest.approx(divided.unit * Metric(out_gram).unit, rel=1e-12)


def test_without_gram_the_norm_is_frobenius():
    change, metric = torch.ones(2, 3, 4), Metric()
    assert metric.squared_norms(change, slice(0, 2)).tolist() == [12, 12]
    assert metric.apply(change, slice(0, 2)) is metric.whiten(change, slice(0, 2)) is change
    assert metric.unwhiten(change, slice(0, 2)) is change


def test_singular_and_slightly_indefinite_grams_have_a_root():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 3, 20, generator=generator)  # fewer inputs than dimensions
    gram = inputs.mT @ inputs
    gram[0] -= 0.02 * gram[0].diagonal().mean() * torch.eye(20)
    gram[1] = gram[1].bfloat16().float()
    metric = Metric(gram)
    assert bool(torch.isfinite(metric.root).all())
    assert float(torch.linalg.eigvalsh(metric.gram).min()) > 0


def test_unusable_grams_are_refused():
    with pytest.raises(UserError, match="all zero"):
        Metric(torch.zeros(2, 3, 3))
    with pytest.raises(UserError, match="NaN"):
        Metric(torch.full((2, 3, 3), float("nan")))


@pytest.mark.parametrize("size", [1, 10**8, 10**12])
def test_chunks_cover_all_experts_once(size):
    covered = [expert for part in chunks(11, size) for expert in range(11)[part]]
    assert covered == list(range(11))
