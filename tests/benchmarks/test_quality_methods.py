"""The rivals of the quality benchmark, each against a property that its paper states, on tiny tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu
from transformers import OlmoeForCausalLM

from benchmarks.quality.calibration import collect_layers
from benchmarks.quality.forms import Bases, FormExperts, Merged, expert_bytes
from benchmarks.quality.methods import METHODS, Task
from benchmarks.quality.methods.d2moe import diagonal_fisher, merged_base
from benchmarks.quality.methods.fisher import Whitened, best_ranks, fisher_factors
from benchmarks.quality.methods.merging import clusters, groups_by_router, merge
from benchmarks.quality.methods.mobe import best_bases, inner_size
from benchmarks.quality.methods.pruning import saliency
from benchmarks.quality.methods.svd import low_rank
from moe_compress.factorization import permute_neurons


@pytest.fixture(scope="module")
def teacher(tiny_olmoe):
    torch.manual_seed(0)
    model = OlmoeForCausalLM(tiny_olmoe(vocab_size=64, norm_topk_prob=True)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name:
                parameter.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def shared(teacher, rows):
    return {"layers": collect_layers(teacher, rows)}


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_every_method_meets_the_budget_and_runs(name, ratio, teacher, rows, shared):
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    method = METHODS[name]
    if name == "mobe":
        method = SimpleNamespace(compress=lambda task: _mobe_with_few_steps(task))
    model = method.compress(Task(teacher, rows, ratio, 0, shared))
    kept = expert_bytes(model) / expert_bytes(teacher)
    assert 0.8 * ratio < kept <= ratio * 1.01
    logits = model(input_ids=rows).logits
    logits.sum().backward()
    assert torch.isfinite(logits).all() and not torch.equal(logits, teacher(input_ids=rows).logits)
    assert all(
        parameter.grad is not None
        for module in model.modules()
        if isinstance(module, FormExperts)
        for parameter in module.parameters()
    )
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def _mobe_with_few_steps(task):
    from benchmarks.quality.methods.mobe import mobe

    return mobe(task, steps=20, lr=2e-2)


def test_a_full_budget_changes_nothing(teacher, rows, shared):
    expected = teacher(input_ids=rows).logits
    for name in ("reap", "hc-smoe", "m-smoe"):
        model = METHODS[name].compress(Task(teacher, rows, 1.0, 0, shared))
        torch.testing.assert_close(model(input_ids=rows).logits, expected, atol=1e-5, rtol=1e-5)


def test_collected_layers_hold_what_the_experts_computed(teacher, rows, shared):
    layer = shared["layers"][1]
    assert layer.inputs.shape == layer.gradients.shape == (rows.numel(), 32)
    output = torch.zeros_like(layer.inputs)
    for expert in range(layer.num_experts):
        tokens, gates = layer.routed(expert)
        output.index_add_(0, tokens, layer.outputs(expert, layer.inputs[tokens]) * gates[:, None])
    expected = teacher.get_submodule(layer.name)(layer.inputs, layer.chosen, layer.gates)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


def test_svd_llm_loss_is_the_norm_of_the_singular_values_left_out(shared):
    layer = shared["layers"][0]
    weight, inputs = layer.weights["gate_up_proj"][:1], torch.randn(200, 32) @ torch.randn(32, 32)
    gram = (inputs.mT @ inputs)[None]
    form = low_rank(weight, 4, gram=gram)
    loss = ((weight[0] - form()[0]) @ inputs.mT).square().sum()
    values = torch.linalg.svdvals(weight[0] @ inputs.mT)
    torch.testing.assert_close(loss, values[4:].square().sum(), rtol=1e-2, atol=0.0)
    plain = low_rank(weight, 4)
    assert loss < 0.9 * ((weight[0] - plain()[0]) @ inputs.mT).square().sum()


def test_d2moe_base_minimizes_the_fisher_weighted_distance(shared):
    layer = shared["layers"][0]
    weight, fisher = layer.weights["down_proj"], diagonal_fisher(layer)["down_proj"]
    base = merged_base(weight, fisher)

    def distance(candidate):
        return (fisher * (weight - candidate).square()).sum()

    assert distance(base) < distance(weight.mean(0))
    for direction in torch.randn(3, *base.shape):
        assert distance(base) <= distance(base + 1e-2 * direction)


def test_diagonal_fisher_is_the_squared_gradient_of_one_token(teacher):
    # With one token in the batch, the sum over tokens is the square of the ordinary gradient.
    rows = torch.tensor([[5, 7]])
    layer = collect_layers(teacher, rows, seed=3)[1]
    layer.gradients[1].zero_()  # keep position 0 alone
    fisher = diagonal_fisher(layer)["down_proj"]
    weight = teacher.get_submodule(layer.name).down_proj
    output = teacher.get_submodule(layer.name)(layer.inputs, layer.chosen, layer.gates)
    (gradient,) = torch.autograd.grad((output * layer.gradients).sum(), weight)
    torch.testing.assert_close(fisher, gradient.square(), atol=1e-9, rtol=1e-3)


def test_mobe_recovers_weights_of_its_own_form():
    generator = torch.Generator().manual_seed(0)
    form = Bases(
        torch.randn(8, 12, 4, generator=generator),
        3 * torch.randn(8, 2, generator=generator),
        torch.randn(2, 4, 16, generator=generator),
        transposed=False,
    )
    weight = form().detach()
    mixed = silu((form.logits.softmax(-1)[0, :, None, None] * form.bases).sum(0))
    torch.testing.assert_close(form.outer[0] @ mixed, form()[0])
    budget = 8 * 12 * 4 + 8 * 2 + 2 * 4 * 16
    assert inner_size((8, 12, 16), 2, budget) == 4
    found = best_bases(weight, budget, steps=800, lr=3e-2, seed=0)
    assert sum(p.numel() for p in found.parameters()) <= budget
    assert (found() - weight).square().sum() < 0.1 * weight.square().sum()
    # The paper's square A_e and as many bases as there is room for, where there is room for two.
    wide = weight[:, :4]
    found = best_bases(wide, 8 * 4 * 4 + 3 * (8 + 4 * 16), steps=1, lr=3e-2, seed=0)
    assert found.outer.shape == (8, 4, 4) and found.bases.shape == (3, 4, 16)


def test_reap_drops_the_experts_that_add_least(teacher, rows, shared):
    layer = shared["layers"][0]
    found = saliency(layer)
    tokens, gates = layer.routed(3)
    parts = [gates[i] * layer.outputs(3, layer.inputs[t : t + 1]).norm() for i, t in enumerate(tokens)]
    torch.testing.assert_close(found[3], torch.stack(parts).mean())
    model = METHODS["reap"].compress(Task(teacher, rows, 0.5, 0, shared))
    keep = found.topk(4).indices.sort().values
    experts, router = model.get_submodule(layer.name), model.model.layers[0].mlp.gate
    assert torch.equal(experts.forms["down_proj"].weight, layer.weights["down_proj"][keep])
    assert torch.equal(router.weight, teacher.model.layers[0].mlp.gate.weight[keep])


def test_hc_smoe_clusters_experts_of_like_outputs():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    features = centres[[0, 1, 2, 0, 1, 2, 2]] + 0.1 * torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    found = clusters(features, 3)
    assert found[0] == found[3] and found[1] == found[4] and found[2] == found[5] == found[6]
    assert len(found.unique()) == 3


def test_m_smoe_aligns_permuted_copies_before_it_merges(shared):
    layer = shared["layers"][0]
    up, down = layer.weights["gate_up_proj"][:1].clone(), layer.weights["down_proj"][:1].clone()
    copies = [permute_neurons(up, down, torch.randperm(16)[None], interleaved=False, gates=2) for _ in range(3)]
    fake = SimpleNamespace(
        weights={
            "gate_up_proj": torch.cat([up, *(copy[0] for copy in copies)]),
            "down_proj": torch.cat([down, *(copy[1] for copy in copies)]),
        },
        up_name="gate_up_proj",
        num_experts=4,
        interleaved=False,
        gate_count=2,
        counts=lambda: torch.tensor([9, 3, 2, 1]),
    )
    group = torch.zeros(4, dtype=torch.long)
    merged = merge(fake, group, torch.tensor([0]))
    torch.testing.assert_close(merged["gate_up_proj"].weight, up)
    torch.testing.assert_close(merged["down_proj"].weight, down)
    assert not torch.allclose(merge(fake, group)["down_proj"].weight, down)


def test_m_smoe_groups_by_router_logits_around_the_most_frequent():
    logits = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, dim=1)
    logits = logits + 0.01 * torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    centres, group = groups_by_router(torch.tensor([5, 1, 2, 7]), logits, 2)
    assert centres.tolist() == [0, 3] and group.tolist() == [0, 0, 1, 1]


def test_merged_experts_weigh_members_by_frequency(shared):
    layer = shared["layers"][0]
    group = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1])
    form = merge(layer, group)["down_proj"]
    counts = layer.counts().float().clamp_min(1)
    expected = (layer.weights["down_proj"][:2] * counts[:2, None, None]).sum(0) / counts[:2].sum()
    torch.testing.assert_close(form.weight[0], expected)
    assert isinstance(form, Merged) and torch.equal(form()[0], form()[1])


def test_fisher_values_are_the_errors_of_truncation_in_its_norm(shared):
    layer = shared["layers"][0]
    inputs, outputs = fisher_factors(layer)["down_proj"]
    weight = layer.weights["down_proj"]
    whitened = Whitened(weight, inputs, outputs)
    ranks = torch.tensor([0, 1, 2, 3, 4, 5, 16, 8])
    form = whitened.factors(ranks)
    assert len(form.delta_in) == int(ranks.sum())
    difference = (weight - form()).double()
    torch.testing.assert_close(form()[6], weight[6], atol=1e-4, rtol=1e-4)
    error = (outputs @ difference @ inputs * difference).sum((1, 2)) / 2
    left = torch.stack([values[rank:].sum() for values, rank in zip(whitened.values, ranks, strict=True)])
    assert ((error <= left * 1.001) & (error > 0.5 * left))[:6].all()  # less by what the damping added
    plain = low_rank(weight, 2, gram=layer.grams("down_proj"))()[2].double()
    worse = (outputs[2] @ (weight[2] - plain) @ inputs[2] * (weight[2] - plain)).sum() / 2
    assert error[2] < worse


def test_ranks_go_where_they_keep_most_for_their_price():
    values = {"a": torch.tensor([[9.0, 5.0, 1.0], [4.0, 3.0, 0.5]]), "b": torch.tensor([[12.0, 2.0, 0.1]])}
    found = best_ranks(values, {"a": 1, "b": 2}, budget=6)
    assert found["a"].tolist() == [2, 2] and found["b"].tolist() == [1]


@pytest.mark.parametrize("name", ["down_proj", "gate_up_proj"])
def test_a_shared_basis_of_full_size_loses_nothing_and_a_smaller_one_what_it_says(name, shared):
    layer = shared["layers"][0]
    inputs, outputs = fisher_factors(layer)[name]
    weight = layer.weights[name]
    full = Whitened(weight, inputs, outputs, weight.shape[2])
    plain = Whitened(weight, inputs, outputs)
    torch.testing.assert_close(full.values[:, : plain.values.shape[1]], plain.values, rtol=1e-4, atol=1e-12)
    small = Whitened(weight, inputs, outputs, 10)
    form = small.factors(torch.full((8,), 10))
    assert form.basis.shape == (10, weight.shape[2]) and form.delta_in.shape == (80, 10)
    difference = small.root_out.mT @ (weight - form()).double() @ small.root_in
    assert float(difference.square().sum() / 2) == pytest.approx(small.lost, rel=1e-3)
    assert small.price == weight.shape[1] + 10 and small.fixed == 10 * weight.shape[2]
