"""Settings: composition of presets and overrides, refusals in one line, and `config.yaml` back and forth."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moe_compress import checks, settings
from moe_compress.config import Config, LrMultiplier, StageConfig
from moe_compress.errors import UserError
from moe_compress.schema import fields_of, find, flatten, known_keys, walk


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        settings.compose(overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_default_is_the_reference_model_and_needs_no_hub() -> None:
    config = settings.compose()
    assert isinstance(config, Config)
    assert config.model.name == "reference"
    assert config.compression.target_ratio is not None
    assert config.distillation.dataset.name == config.compression.calibration.dataset.name == "stdlib"
    assert config.evaluation.perplexity.name == "stdlib" and config.evaluation.perplexity.split == "test"
    assert config.distillation.dataset.max_length == 512
    assert all(isinstance(stage, StageConfig) for stage in config.distillation.stages)
    assert "wikitext" not in config.evaluation.tasks


def test_another_model_has_the_documented_defaults() -> None:
    """The numbers of the original description, which the presets of the reference model must not leak into."""
    config = settings.compose(["model=some/model", "evaluation=wikitext"])
    bare = Config()
    bare.model.name = "some/model"
    assert asdict(config) == asdict(bare)
    assert (config.compression.rank, config.compression.num_steps, config.compression.lr) == (64, 1000, 1e-3)
    training = config.distillation.training
    assert (training.num_train_epochs, training.learning_rate, training.warmup_steps) == (3, 5e-5, 100)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 8)
    assert config.evaluation.tasks == {"wikitext": -1}


@pytest.mark.parametrize("group", settings.GROUPS)
def test_every_preset_composes(group: str) -> None:
    extra = ["distillation.dataset.name=a.txt", "evaluation.perplexity.name=b.txt"]
    for name in settings.presets(group):
        settings.compose([f"{group}={name}", *(extra if name == "local" else [])])
        if name != "local":
            settings.compose([f"{group}={name}"], base=Config())


def test_presets_set_what_they_are_named_for() -> None:
    qwen = settings.compose(["model=qwen3_30b_a3b"])
    assert (qwen.model.name, qwen.compression.rank) == ("Qwen/Qwen3-30B-A3B", 64)
    assert qwen.distillation.dataset.name == "Salesforce/wikitext"
    assert qwen.evaluation.tasks == {"wikitext": -1}
    assert settings.compose(["model=mixtral_8x7b"]).model.name == "mistralai/Mixtral-8x7B-v0.1"
    assert settings.compose(["model=olmoe_1b_7b"]).model.name == "allenai/OLMoE-1B-7B-0924"
    svd = settings.compose(["compression=svd"]).compression
    assert (svd.cores, svd.alignment) == (0, "none")
    assert svd.target_ratio == settings.compose([]).compression.target_ratio
    assert settings.compose(["compression.cores=4"]).compression.cores == 4
    assert settings.compose(["compression.cores=auto"]).compression.cores == "auto"
    basis = [settings.compose([f"compression.input_basis={value}"]).compression.input_basis for value in ("0", "0.5")]
    assert basis == [0.0, 0.5] and all(type(value) is float for value in basis)
    adam = settings.compose(["compression=adam"]).compression
    assert (adam.method, adam.parameterization) == ("adam", "wrapper")
    assert [stage.name for stage in settings.compose(["distillation=router_only"]).distillation.stages] == ["router"]


def test_a_preset_of_the_command_line_wins_over_the_one_of_the_model() -> None:
    assert settings.compose(["data=wikitext"]).distillation.dataset.name == "Salesforce/wikitext"
    assert settings.compose(["data=stdlib", "model=qwen3_30b_a3b"]).distillation.dataset.name == "stdlib"
    assert settings.compose(["evaluation=none", "model=qwen3_30b_a3b"]).evaluation.tasks == {}
    assert "hellaswag" in settings.compose(["data=wikitext", "evaluation=harness"]).evaluation.tasks


def test_local_data_is_asked_for_and_shared() -> None:
    assert "distillation.dataset.name has no value" in refusal("data=local")
    assert "evaluation.perplexity.name has no value" in refusal("data=local", "distillation.dataset.name=a.txt")
    config = settings.compose(["data=local", "distillation.dataset.name=a.txt", "evaluation.perplexity.name=b.txt"])
    assert config.compression.calibration.dataset.name == "a.txt"
    assert config.evaluation.perplexity.name == "b.txt"


def test_values_are_read_in_their_types() -> None:
    config = settings.compose(
        [
            "compression.lr=2e-3",
            "compression.rank=null",
            "gpu_ids=[0,3]",
            "evaluation.batch_size=8",
            "evaluation.devices=[cuda:0,cuda:1]",
            "distillation.stages=[{name: a, steps: 5, trainable: ['\\.gate\\.']}, {name: b, steps: 6}]",
            "distillation.stages.1.steps=7",
            "distillation.parameter_lr_multipliers=[{pattern: x, lr_multiplier: 0}]",
        ]
    )
    assert (config.compression.lr, config.compression.rank, config.gpu_ids) == (2e-3, None, [0, 3])
    assert config.evaluation.batch_size == "8" and config.evaluation.devices == ["cuda:0", "cuda:1"]
    first, second = config.distillation.stages
    assert (first.trainable, first.steps, first.alpha) == (["\\.gate\\."], 5, None)
    assert (second.steps, second.trainable) == (7, [".*"])
    assert config.distillation.parameter_lr_multipliers == [LrMultiplier("x", 0.0)]


def test_a_mapping_is_replaced_as_a_whole_and_edited_by_entry() -> None:
    model = "model=a/b"
    assert settings.compose([model, "evaluation.tasks={}"]).evaluation.tasks == {}
    assert settings.compose([model, "evaluation.tasks={piqa: 0}"]).evaluation.tasks == {"piqa": 0}
    edited = settings.compose([model, "evaluation=wikitext", "+evaluation.tasks.piqa=0", "~evaluation.tasks.wikitext"])
    assert edited.evaluation.tasks == {"piqa": 0}
    assert "it holds: wikitext" in refusal(model, "evaluation=wikitext", "~evaluation.tasks.piqa")


PATHS = [
    "/a b/c,d",
    "C:\\models\\x\\",
    "it's",
    'a"b',
    "(x)",
    "[1]",
    "~/m=1",
    "x#y",
    "a{b}",
    "null-model",
    "1e5",
    "$HOME",
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_need_no_quotes(path: str) -> None:
    config = settings.compose([f"model={path}", f"run={path}", f"distillation.teacher.cache_dir={path}"])
    assert (config.model.name, config.run, config.distillation.teacher.cache_dir) == (path, path, path)


@hypothesis_settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda text: text.strip()))
def test_any_text_is_taken_as_it_stands(text: str) -> None:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if quoted or "$" in text or text in ("null", "???"):
        return
    _, (assignment,) = settings.parse_overrides([f"evaluation.prompt={text}"])
    assert assignment.value == text


def test_quotes_of_hydra_are_understood() -> None:
    assert settings.compose(["model='a b'"]).model.name == "a b"
    assert settings.compose(['evaluation.prompt="def "']).evaluation.prompt == "def "


def test_interpolations_are_resolved_at_once() -> None:
    config = settings.compose(["experiment_name=x", "run=out/${experiment_name}"])
    assert config.run == "out/x"
    assert "nope" in refusal("run=${nope}")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("compression.rnak=3", "did you mean 'compression.rank'"),
        ("rank=3", "did you mean 'compression.rank'"),
        ("distillation.training.learing_rate=1", "did you mean 'distillation.training.learning_rate'"),
        ("distilation.loss.alpha=1", "did you mean 'distillation.loss.alpha'"),
        ("distillation.stages=[{nme: x}]", "did you mean 'distillation.stages.0.name'"),
        ("compression={rnk: 3}", "did you mean 'compression.rank'"),
        ("compression=sdv", "did you mean 'svd'"),
        ("data=wikitxt", "did you mean 'wikitext'"),
        ("compression.rank=abc", "compression.rank=abc is not possible: expected integer or null"),
        ("compression.rank=1,2", "write a list as compression.rank=[a,b]"),
        ("compression.rank=[1", "cannot be read"),
        ("seed=null", "seed=null is not possible"),
        ("gpu_ids=3", "expected list of integers"),
        ("evaluation.tasks={a: x}", "expected {name: integer}"),
        ("evaluation.tasks=3", "expected {name: integer}"),
        ("distillation.stages=[3]", "distillation.stages.0 is a group of settings"),
        ("distillation.stages.7.steps=1", "distillation.stages has 2 entries"),
        ("compression.method=magic", "is not one of: closed_form, adam"),
        ("compression.cores=-1", "compression.cores=-1 must be a whole number from 0, auto or groups"),
        ("compression.cores=some", "compression.cores=some must be a whole number from 0, auto or groups"),
        ("compression.input_basis=1", "compression.input_basis=1.0 must be from 0 to below 1, or auto"),
        ("compression.input_basis=some", "compression.input_basis=some must be from 0 to below 1, or auto"),
        ("compression={cores: 2, input_basis: 0.5}", "compression.input_basis=0.5 goes with at most one core"),
        ("compression={method: adam, input_basis: 0.5}", "compression.input_basis=0.5 needs compression.method=closed"),
        ("compression.iterations=0", "compression.iterations=0 must be at least 1"),
        ("compression.cores=1.5", "compression.cores=1.5 is not possible: expected integer or text"),
        ("compression.rank=0", "compression.rank=0 must be at least 1"),
        ("compression.target_ratio=0", "compression.target_ratio=0.0 must be between 0 and 1"),
        ("compression.target_ratio=1", "compression.target_ratio=1.0 must be between 0 and 1"),
        ("compression.lr=nan", "compression.lr is not a number"),
        ("compression.target_bytes=5", "are both set"),
        ("compression.dtype=int3", "must be one of auto, bfloat16"),
        ("distillation.loss.alpha=1.5", "distillation.loss.alpha=1.5 must be between 0 and 1"),
        ("distillation.loss.temperature=0", "distillation.loss.temperature=0.0 must be above 0"),
        ("distillation.stages.1.alpha=-1", "distillation.stages.1.alpha=-1.0 must be between 0 and 1"),
        ("distillation.stages.0.trainable=['(']", "must be regular expressions"),
        ("distillation.training.max_steps=0", "must be -1 or at least 1"),
        ("distillation.teacher.generation.worker_id=1", "must be below total_workers=1"),
        ("evaluation.perplexity.max_length=1", "evaluation.perplexity.max_length=1 must be at least 2"),
        ("evaluation.batch_size=none", "must be auto or at least 1"),
        ("seed", "'seed' is not a setting"),
        ("~seed", "only an entry of a mapping"),
        ("model=", "model.name='' must be a name"),
        ("run=", "run='' must be a name"),
    ],
)
def test_nonsense_is_refused_in_one_line_that_names_the_key(override: str, words: str) -> None:
    assert words in refusal("distillation=factors_then_all", override)  # two stages


def test_a_size_must_be_given() -> None:
    assert "no size is set" in refusal("model=a/b", "compression.rank=null")


def test_rules_are_about_settings_that_exist() -> None:
    for cls, rules in checks._RULES.items():
        assert set(rules) <= set(fields_of(cls)), cls


def test_every_setting_is_documented_and_known() -> None:
    for info in walk():
        assert len(info.help) > 10, info.key
        if "[]" not in info.key:
            assert find(info.key) is not None and info.key in known_keys()
    assert find("compression.nothing") is None and find("compression.rank.x") is None
    assert set(flatten(Config())) <= set(known_keys())


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=qwen3_30b_a3b", "compression=adam", "compression.lr=1e-7"],
        ["evaluation.prompt=a $b \\ c: #d é\n'", "distillation.stages=[]", "evaluation.tasks={}", "run=x/y z"],
    ],
)
def test_config_yaml_round_trip(tmp_path: Path, overrides: list[str]) -> None:
    config = settings.compose(overrides)
    path = tmp_path / "config.yaml"
    settings.write(path, config)
    assert asdict(settings.read(path)) == asdict(config)
    assert set(yaml.safe_load(path.read_text())) == set(asdict(config))
    assert asdict(settings.from_values(flatten(config))) == asdict(config)


def test_what_is_resolved_is_not_interpolated_again(tmp_path: Path) -> None:
    config = Config()
    config.evaluation.prompt = "echo \\${HOME} ${seed} $"
    settings.write(tmp_path / "config.yaml", config)
    assert settings.read(tmp_path / "config.yaml").evaluation.prompt == config.evaluation.prompt
    assert settings.compose([], base=config).evaluation.prompt == config.evaluation.prompt


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text, words in [
        ("{", "is not YAML"),
        ("- 1", "does not hold settings"),
        ("compression: {rnak: 3}", "did you mean 'compression.rank'"),
        ("compression: 3", "is a group of settings"),
        ("seed: -4", "seed=-4 must be"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=str(path)) as error:
            settings.read(path)
        assert words in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        settings.read(tmp_path / "none.yaml")


def test_a_file_lies_between_presets_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 7\ncompression: {rank: 5, target_ratio: null}\n")
    config = settings.compose(["compression.rank=6"], file=path)
    assert (config.seed, config.compression.rank, config.compression.target_ratio) == (7, 6, None)
    assert config.model.name == "reference" and config.distillation.dataset.max_length == 512


def test_on_frozen_settings_only_named_presets_apply() -> None:
    base = settings.compose(["model=a/b", "compression.rank=9", "seed=3"])
    assert asdict(settings.compose([], base=base)) == asdict(base)
    changed = settings.compose(["distillation=router_only", "evaluation=harness"], base=base)
    assert [stage.name for stage in changed.distillation.stages] == ["router"]
    assert "piqa" in changed.evaluation.tasks and "wikitext" not in changed.evaluation.tasks
    assert (changed.model.name, changed.compression.rank, changed.seed) == ("a/b", 9, 3)
    model = settings.compose(["model=reference"], base=base)
    assert (model.model.name, model.compression.target_ratio) == ("reference", None)
    assert settings.compose(["data=wikitext"], base=base).distillation.dataset.name == "Salesforce/wikitext"


def test_a_named_default_takes_back_what_other_presets_have_set() -> None:
    defaults = [f"{group}=default" for group in ("compression", "distillation", "evaluation")]
    base = settings.compose(["compression=adam", "distillation=router_only", "evaluation=harness", "seed=3"])
    assert asdict(settings.compose(defaults, base=base)) == asdict(settings.compose([*defaults, "seed=3"]))
    base.compression.target_ratio = 0.5  # of no preset of the group
    assert settings.compose(defaults, base=base).compression.target_ratio == 0.5
    assert settings.compose([*defaults, "compression.cores=2"], base=base).compression.cores == 2
