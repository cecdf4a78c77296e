"""Forms of a layer at the same bytes, and random layers and models of them."""

from __future__ import annotations

import copy

import torch

from moe_compress.config import Config
from moe_compress.evaluation.bench import plan_layouts
from moe_compress.evaluation.layer_forms import (
    CORE,
    FORMS,
    SVD,
    cut_to_aligned_ranks,
    fill_randomly,
    projection_shapes,
    random_layer,
    random_student,
    same_bytes_layouts,
    same_ratio_layouts,
)
from moe_compress.modeling import find_experts, find_shared_cores

from .conftest import make_model, mean_core

LAYOUT = {name: {"delta_rank": 12, "cores": 1} for name in ("gate_up_proj", "down_proj")}


def size(layer):
    return sum(parameter.numel() for parameter in layer.parameters())


def test_forms_get_the_bytes_of_the_layer_and_no_more():
    original = find_experts(make_model())[0].module
    core = random_layer(original, LAYOUT)
    layouts = same_bytes_layouts(core)
    assert list(layouts) == list(FORMS)
    for name, layout in layouts.items():
        assert size(random_layer(original, layout)) <= size(core), name
    more = {name: {"delta_rank": own["delta_rank"] + 8, "cores": 0} for name, own in layouts[SVD].items()}
    assert size(random_layer(original, more)) > size(core)


def test_forms_at_a_share_of_the_bytes():
    shapes = {"gate_up_proj": (64, 2048, 2048), "down_proj": (64, 2048, 1024)}
    quarter = same_ratio_layouts(shapes, 0.25)
    assert quarter[CORE] == {  # (64 / 4 - 1) * 2048 * 2048 / (64 * 4096) and so on, multiples of 8
        "gate_up_proj": {"delta_rank": 240, "cores": 1}, "down_proj": {"delta_rank": 160, "cores": 1},
    }  # fmt: skip
    assert quarter["shared basis H/3"] == {  # (64 / 4 * 2048 - 680) * 2048 / (64 * 2728)
        "gate_up_proj": {"delta_rank": 376, "cores": 0, "basis": 680}, "down_proj": {"delta_rank": 168, "cores": 0},
    }  # fmt: skip
    # A core is 1/64 of gate_up_proj, and a basis of 2H/3 is 1/96.
    bases = ["shared basis H/4", "shared basis H/3", "shared basis H/2"]
    assert list(same_ratio_layouts(shapes, 0.01)) == [SVD, *bases]
    assert list(same_ratio_layouts(shapes, 0.25)) == [CORE, SVD, *bases, "shared basis 2H/3"]
    assert same_ratio_layouts(shapes, 0.0001) == {}


def test_shapes_of_a_compressed_layer():
    facts = find_experts(make_model())[0]
    assert projection_shapes(random_layer(facts.module, LAYOUT)) == facts.projections


def test_random_values_fill_everything_and_repeat():
    module = torch.nn.Linear(2000, 600)
    fill_randomly(module, seed=1)
    assert 0.015 < module.weight.std() < 0.025 and module.bias.abs().max() < 0.2
    other = fill_randomly(torch.nn.Linear(2000, 600), seed=1)
    assert torch.equal(module.weight, other.weight)
    assert not torch.equal(module.weight[0], module.weight[1])


def test_ranks_are_cut_to_multiples_of_eight():
    model = mean_core(make_model(), rank=13, cores=0)
    cut = cut_to_aligned_ranks(copy.deepcopy(model))
    before, after = (next(iter(find_shared_cores(each).values())).factors("down_proj") for each in (model, cut))
    assert (before.delta_rank, after.delta_rank) == (13, 8)
    assert torch.equal(before.delta_out[..., :8], after.delta_out)
    assert torch.equal(before.delta_in[:, :8], after.delta_in)


def test_a_random_student_shares_all_but_the_experts():
    original, config = make_model(), Config()
    config.compression.rank, config.compression.target_ratio = 4, None
    student = random_student(original, plan_layouts(find_experts(original), config, torch.float32))
    assert len(find_shared_cores(student)) == len(find_experts(original))
    assert student.lm_head.weight is original.lm_head.weight
    assert student.model.layers[0].self_attn.q_proj.weight is original.model.layers[0].self_attn.q_proj.weight
