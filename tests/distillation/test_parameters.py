"""Parameter groups, stages and training order: who trains how fast, when, and on what."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn, zeros

from moe_compress.config import DistillationConfig, LrMultiplier, StageConfig
from moe_compress.distillation.data import TrainingOrder
from moe_compress.distillation.parameters import ParameterGroup, group_table, parameter_groups, set_trainable
from moe_compress.distillation.stages import resolve_stages
from moe_compress.errors import UserError


class Toy(nn.Module):
    """Names and shapes as an MoE has them."""

    SHAPES: dict[str, tuple[int, ...]] = {  # noqa: RUF012
        "model.embed_tokens.weight": (7, 4),
        "model.layers.0.input_layernorm.weight": (4,),
        "model.layers.0.mlp.gate.weight": (2, 4),
        "model.layers.0.mlp.experts.gate_up_proj": (6, 4),
        "model.layers.0.mlp.experts.gate_up_proj_bias": (2, 6),
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "lm_head.weight": (7, 4),
    }

    def __init__(self) -> None:
        super().__init__()
        self.named = {name: nn.Parameter(zeros(shape)) for name, shape in self.SHAPES.items()}
        for number, parameter in enumerate(self.named.values()):
            self.register_parameter(f"p{number}", parameter)


def groups_of(model: Toy, **changes: Any) -> list[ParameterGroup]:
    defaults = DistillationConfig()
    options: dict[str, Any] = {
        "trainable": [".*"],
        "multipliers": defaults.parameter_lr_multipliers,
        "default_multiplier": 1.0,
        "stage": "test",
    }
    return parameter_groups(list(model.named.items()), **{**options, **changes})


def test_first_match_wins_and_norms_and_biases_do_not_decay() -> None:
    groups = groups_of(Toy())
    found = {name: (group.lr_multiplier, group.decay) for group in groups for name in group.names}
    assert found == {
        "model.embed_tokens.weight": (0.1, True),
        "model.layers.0.input_layernorm.weight": (0.5, False),
        "model.layers.0.mlp.gate.weight": (0.5, True),
        "model.layers.0.mlp.experts.gate_up_proj": (1.0, True),
        "model.layers.0.mlp.experts.gate_up_proj_bias": (1.0, False),
        "model.layers.0.self_attn.q_proj.weight": (1.0, True),
        "lm_head.weight": (0.1, True),
    }
    rules = [LrMultiplier("embed", 3.0), LrMultiplier("weight", 2.0)]
    found = {name: group.lr_multiplier for group in groups_of(Toy(), multipliers=rules) for name in group.names}
    assert found["model.embed_tokens.weight"] == 3.0 and found["lm_head.weight"] == 2.0
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == 1.0


def test_zero_freezes_and_a_stage_sets_every_parameter_anew() -> None:
    model = Toy()
    rules = [LrMultiplier("embed", 0.0)]
    set_trainable(model, groups_of(model, multipliers=rules, trainable=["experts"]))
    assert [name for name, parameter in model.named.items() if parameter.requires_grad] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.gate_up_proj_bias",
    ]
    set_trainable(model, groups_of(model, multipliers=rules))
    assert [name for name, parameter in model.named.items() if not parameter.requires_grad] == [
        "model.embed_tokens.weight"
    ]


def test_table_counts_parameters_and_shows_rates() -> None:
    model = Toy()
    groups = groups_of(model, trainable=["experts", "gate"])
    stream = io.StringIO()
    Console(file=stream, width=120).print(group_table(model, groups, title="t", learning_rate=2e-3))
    lines = stream.getvalue().splitlines()
    assert [field.strip() for field in next(line for line in lines if "router" in line).split("│")[1:-1]] == [
        r"\.(gate|router)\.", "1", "8", "1.00e-03", "yes",
    ]  # fmt: skip
    assert [field.strip() for field in next(line for line in lines if "frozen" in line).split("│")[1:3]] == [
        "(frozen)",
        "4",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": ["experts", "nothing_like_it"]}, r"stages \(test\).trainable: 'nothing_like_it' matches no"),
        ({"trainable": ["("]}, "is not a regular expression"),
        ({"multipliers": [LrMultiplier("router_typo", 0.5)]}, "lr_multipliers: 'router_typo' matches no parameter"),
        ({"multipliers": [LrMultiplier("gate", -1.0)]}, "must not be negative"),
        ({"multipliers": [LrMultiplier("experts", 0.0)], "trainable": ["experts"]}, "nothing trains in stage test"),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        groups_of(Toy(), **changes)


def test_default_patterns_may_match_nothing() -> None:
    model = Toy()
    model.named = {name: p for name, p in model.named.items() if "gate" not in name and "norm" not in name}
    assert groups_of(model)


def test_stages_follow_each_other_and_take_defaults() -> None:
    config = DistillationConfig(
        stages=[
            StageConfig(name="experts", trainable=["experts"], steps=30, learning_rate=1e-3, alpha=1.0),
            StageConfig(steps=50, lr_scheduler_type="linear", warmup_steps=0, temperature=1.0),
        ]
    )
    first, second = resolve_stages(config, sequences=10, sequences_per_step=2)
    assert (first.name, first.first_step, first.last_step, first.learning_rate) == ("experts", 0, 30, 1e-3)
    assert (first.alpha, first.temperature, first.lr_scheduler_type, first.warmup_steps) == (1.0, 2.0, "cosine", 100)
    assert (second.name, second.first_step, second.last_step, second.learning_rate) == ("stage2", 30, 80, 5e-5)
    assert (second.alpha, second.temperature, second.lr_scheduler_type, second.warmup_steps) == (0.5, 1.0, "linear", 0)


def test_one_stage_by_steps_or_epochs() -> None:
    config = DistillationConfig()
    (stage,) = resolve_stages(config, sequences=10, sequences_per_step=4)
    assert stage.steps == 8 and stage.trainable == (".*",)  # three epochs of ten sequences, four a step
    config.training.max_steps = 5
    assert resolve_stages(config, sequences=10, sequences_per_step=4)[0].steps == 5


@pytest.mark.parametrize(
    "changes",
    [{"steps": 0}, {"alpha": 1.5}, {"temperature": 0.0}, {"learning_rate": 0.0}, {"lr_scheduler_type": "magic"}],
)
def test_bad_stages_are_named(changes: dict[str, Any]) -> None:
    config = DistillationConfig(stages=[StageConfig(**{"name": "mine", "steps": 3, **changes})])
    with pytest.raises(UserError, match=f"stage 'mine': {next(iter(changes))}"):
        resolve_stages(config, sequences=10, sequences_per_step=2)


@given(st.integers(1, 20), st.integers(0, 30), st.integers(0, 40), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_training_order_is_one_sequence_of_permutations(sequences: int, first: int, count: int, seed: int) -> None:
    source = [{"input_ids": [index]} for index in range(sequences)]
    whole = TrainingOrder(source, seed=seed, first=0, count=first + count)
    order = [int(whole[item]["input_ids"][0]) for item in range(len(whole))]
    for epoch in range(len(order) // sequences):
        assert sorted(order[epoch * sequences : (epoch + 1) * sequences]) == list(range(sequences))
    part = TrainingOrder(source, seed=seed, first=first, count=count)
    assert [part.index(item) for item in range(count)] == order[first:]
    with pytest.raises(IndexError):
        part[count]


def test_epochs_and_seeds_differ() -> None:
    source = [{"input_ids": [index]} for index in range(50)]
    one = TrainingOrder(source, seed=1, first=0, count=100)
    order = [one.index(item) for item in range(100)]
    assert order[:50] != order[50:]
    other = TrainingOrder(source, seed=2, first=0, count=50)
    assert order[:50] != [other.index(item) for item in range(50)]
