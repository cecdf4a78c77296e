"""The run directory: frozen settings, the manifest, resuming, locks, and which stage must come first."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

import moe_compress
from moe_compress import settings
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.run import Run, open_run
from moe_compress.stages import STAGES, freezing_stages, is_free


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def stage(name: str, path: Path, *overrides: str) -> Run:
    """Open a run for a stage and go through it, leaving one file."""
    run = open_run(name, [f"run={path}", *overrides])
    with run.stage(name):
        (path / f"{name}.out").write_text("")
    return run


def refusal(name: str, path: Path, *overrides: str) -> str:
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} if path.exists() else {}
    with pytest.raises(UserError) as error:
        open_run(name, [f"run={path}", *overrides])
    after = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} if path.exists() else {}
    assert before == after, "a refused command changed the run"
    return str(error.value)


def test_the_first_stage_freezes_and_later_ones_read(path: Path) -> None:
    stage("compress", path, "compression.rank=8", "compression.target_ratio=null", "seed=5")
    assert yaml.safe_load((path / "config.yaml").read_text())["compression"]["rank"] == 8
    later = open_run("teacher-logits", [f"run={path}"])
    assert (later.config.compression.rank, later.config.seed) == (8, 5)
    assert later.config.run == str(path) == str(later.path)
    assert Run.open(path).config.compression.rank == 8


def test_a_frozen_setting_is_refused_with_both_values(path: Path) -> None:
    stage("compress", path, "compression.rank=8", "compression.target_ratio=null")
    message = refusal("teacher-logits", path, "compression.rank=16")
    assert "compression.rank is frozen at 8" in message and "given as 16" in message and "config.yaml" in message
    message = refusal("compress", path, "compression=svd", "seed=1")
    assert "seed is frozen at 42" in message and "compression.input_basis" in message
    assert "model.name is frozen at reference" in refusal("compress", path, "model=/other")
    assert "model.name is frozen at reference" in refusal("compress", path, "model=mixtral_8x7b")


def test_the_same_values_are_fine(path: Path) -> None:
    first = ["model=olmoe_1b_7b", "data=c4", "compression=svd", "compression.target_ratio=0.5"]
    stage("compress", path, *first)
    frozen = (path / "config.yaml").read_bytes()
    for again in (
        first,
        [],
        ["compression.target_ratio=0.5"],
        ["model=olmoe_1b_7b"],
        ["model.name=allenai/OLMoE-1B-7B-0924"],
    ):
        open_run("compress", [f"run={path}", *again])
        assert (path / "config.yaml").read_bytes() == frozen


def test_repeating_a_command_whose_presets_overlap_changes_nothing(path: Path) -> None:
    """data=c4 sets max_samples, the reference model sets it again: over frozen settings only the former is applied."""
    first = ["model=reference", "data=c4"]
    preset = settings.compose(["model=reference"]).distillation.dataset.max_samples
    stage("teacher-logits", path, *first)
    assert Run.open(path).config.distillation.dataset.max_samples == preset
    assert open_run("teacher-logits", [f"run={path}", *first]).config.distillation.dataset.max_samples == preset


def test_a_group_is_open_until_its_stage_has_run(path: Path) -> None:
    stage("compress", path)
    run = stage("teacher-logits", path, "distillation.dataset.max_samples=10", "distillation.loss.alpha=0.7")
    assert (run.config.distillation.dataset.max_samples, run.config.distillation.loss.alpha) == (10, 0.7)
    assert Run.open(path).config.distillation.dataset.max_samples == 10
    assert "distillation.dataset.max_samples is frozen at 10" in refusal(
        "distill", path, "distillation.dataset.max_samples=20"
    )
    assert "distillation.teacher.generation.top_k" in refusal(
        "distill", path, "distillation.teacher.generation.top_k=8"
    )
    run = stage("distill", path, "distillation=router_only", "distillation.loss.alpha=0.9", "fsdp.enabled=true")
    assert (run.config.distillation.loss.alpha, run.config.distillation.stages[0].name) == (0.9, "router")
    assert "distillation.loss.alpha is frozen at 0.9" in refusal("distill", path, "distillation.loss.alpha=0.5")
    assert "fsdp.enabled is frozen at true" in refusal("evaluate", path, "fsdp.enabled=false")
    stage("evaluate", path, "evaluation.limit=3", "evaluation=harness")
    assert Run.open(path).config.evaluation.tasks["piqa"] == 0
    assert "evaluation.limit is frozen at 3" in refusal("evaluate", path, "evaluation.limit=4")
    assert "evaluation.tasks is frozen" in refusal("report", path, "evaluation.tasks={piqa: 0}")


def test_watching_freezes_the_evaluation(path: Path) -> None:
    stage("compress", path)
    stage("watch", path, "evaluation.limit=3")
    assert "evaluation.limit is frozen at 3" in refusal("evaluate", path, "evaluation.limit=4")


def test_settings_of_a_process_are_never_frozen(path: Path) -> None:
    generation = "distillation.teacher.generation"
    first = open_run("teacher-logits", [f"run={path}", f"{generation}.worker_id=1", f"{generation}.total_workers=4"])
    assert first.config.distillation.teacher.generation.worker_id == 1
    stored = yaml.safe_load((path / "config.yaml").read_text())
    assert stored["run"] is None
    assert stored["distillation"]["teacher"]["generation"]["worker_id"] == 0
    assert stored["distillation"]["teacher"]["generation"]["total_workers"] == 1
    with first.stage("teacher-logits"):
        (path / "x").write_text("")
    second = open_run(
        "teacher-logits",
        [
            f"run={path}",
            f"{generation}.worker_id=2",
            f"{generation}.total_workers=4",
            f"{generation}.force_regenerate=true",
            f"{generation}.batch_size=3",
            "gpu_ids=[1]",
            "output.base_dir=elsewhere",
        ],
    )
    assert second.config.distillation.teacher.generation.worker_id == 2
    assert second.config.distillation.teacher.generation.force_regenerate and second.config.gpu_ids == [1]
    assert yaml.safe_load((path / "config.yaml").read_text()) == stored


def test_a_run_is_named_by_experiment_or_path(tmp_path: Path, path: Path) -> None:
    run = open_run("compress", ["experiment_name=a", f"output.base_dir={tmp_path}"])
    assert run.path == tmp_path / "a" and (tmp_path / "a" / "config.yaml").exists()
    with run.stage("compress"):
        (run.path / "x").write_text("")
    again = open_run(
        "teacher-logits", ["experiment_name=a", f"output.base_dir={tmp_path}", "distillation.loss.alpha=1"]
    )
    assert again.path == run.path and again.config.distillation.loss.alpha == 1
    assert open_run("compress", [f"run={run.path}"]).config.experiment_name == "a"


def test_a_directory_of_something_else_is_refused(path: Path) -> None:
    path.mkdir()
    (path / "logs").mkdir()
    (path / "logs" / "a.log").write_text("logs may be there first")
    (path / "precious.txt").write_text("mine")
    assert "is not a run" in refusal("compress", path)
    assert not (path / "config.yaml").exists()
    (path / "precious.txt").unlink()
    open_run("compress", [f"run={path}"])
    file = path.with_name("file")
    file.write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_run("compress", [f"run={file}"])


@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if not stage.starts_run])
def test_a_later_stage_does_not_start_a_run(path: Path, name: str) -> None:
    assert f"run first: moe-compress compress run={path}" in refusal(name, path)
    assert not path.exists()


def test_a_stage_says_which_one_it_needs(path: Path) -> None:
    open_run("compress", [f"run={path}"])
    assert "distill needs compress, which has not run" in refusal("distill", path)
    with pytest.raises(KeyError), Run.open(path).stage("compress"):
        (path / "half").write_text("")
        raise KeyError
    assert "distill needs compress, which was interrupted" in refusal("distill", path)
    stage("compress", path)
    message = refusal("distill", path, "distillation.loss.alpha=0.1")
    assert f"run first: moe-compress teacher-logits run={path}" in message
    open_run("distill", [f"run={path}", "distillation.teacher.use_cached_logits=false"])
    open_run(
        "distill", [f"run={path}", "distillation.teacher.use_cached_logits=true", "distillation.teacher.cache_dir=/c"]
    )


@pytest.mark.parametrize("alone", ["distillation.loss.alpha=0", "distillation=blockwise_first"])
def test_a_distillation_needs_no_cache_that_it_will_not_read(path: Path, alone: str) -> None:
    stage("compress", path)
    assert "teacher-logits" in refusal("distill", path)
    if "blockwise" in alone:
        assert "teacher-logits" in refusal("distill", path, alone)
        alone = "distillation.stages=[{kind: blockwise, steps: 3}]"
    open_run("distill", [f"run={path}", alone])


def test_manifest(path: Path) -> None:
    run = open_run("compress", [f"run={path}"])
    with run.stage("compress"):
        during = json.loads((path / "manifest.json").read_text())["stages"]["compress"]
        assert during["status"] == "running" and not run.finished("compress")
        run.record("compress", bytes=3, where=Path("x"))
        run.record("compress", more=[1])
    entry = json.loads((path / "manifest.json").read_text())["stages"]["compress"]
    assert entry["status"] == "finished" and entry["seconds"] >= 0
    assert entry["started"] <= entry["finished"]
    assert set(entry["versions"]) == {"python", "moe_compress", "torch", "transformers"}
    assert entry["facts"] == run.facts("compress") == {"bytes": 3, "where": "x", "more": [1]}
    assert len(entry["settings"]) == 16
    assert run.finished("compress") and Run.open(path).finished("compress")
    assert not run.finished("distill") and run.facts("distill") == {}


def test_finished_means_with_these_settings(path: Path) -> None:
    run = stage("compress", path)
    assert run.finished("compress")
    other = settings.compose(["compression.iterations=9"])
    assert not Run(path, other).finished("compress")
    unread = settings.compose(["distillation.loss.alpha=0.1", "evaluation.limit=3", "compression.device=cuda"])
    assert Run(path, unread).finished("compress"), "settings that a stage does not read do not undo it"


def test_settings_that_only_a_later_stage_freezes_do_not_undo_an_earlier_one(path: Path) -> None:
    assert stage("teacher-logits", path).finished("teacher-logits")
    live = settings.compose(["distillation.teacher.use_cached_logits=false"])
    assert Run(path, live).finished("teacher-logits")
    assert not Run(path, settings.compose(["distillation.teacher.generation.top_k=3"])).finished("teacher-logits")


def test_a_failed_stage_can_be_run_again(path: Path) -> None:
    stage("compress", path)
    run = open_run("teacher-logits", [f"run={path}"])
    with pytest.raises(RuntimeError), run.stage("teacher-logits"):
        (path / "half").write_text("")
        raise RuntimeError("no\nmemory")
    entry = json.loads((path / "manifest.json").read_text())["stages"]["teacher-logits"]
    assert (entry["status"], entry["error"], entry["finished"]) == ("interrupted", "RuntimeError: no memory", None)
    assert not run.finished("teacher-logits")
    assert "frozen" in refusal("teacher-logits", path, "distillation.dataset.max_samples=3")
    stage("teacher-logits", path)
    entry = json.loads((path / "manifest.json").read_text())["stages"]["teacher-logits"]
    assert (entry["status"], entry["error"]) == ("finished", None)


def test_a_stage_that_left_nothing_has_frozen_nothing(path: Path) -> None:
    stage("compress", path)
    run = open_run("teacher-logits", [f"run={path}", "distillation.teacher.model_path=/wrong"])
    with pytest.raises(UserError), run.stage("teacher-logits"):
        raise UserError("no model at /wrong")
    run.discard_if_untouched()
    assert open_run("teacher-logits", [f"run={path}", "distillation.teacher.model_path=/right"])
    assert Run.open(path).config.distillation.teacher.model_path == "/right"
    assert "frozen" in refusal("teacher-logits", path, "seed=1")


def test_a_first_stage_that_left_nothing_leaves_no_settings(path: Path) -> None:
    run = open_run("compress", [f"run={path}", "model=/dense", "seed=9"])
    with pytest.raises(UserError), run.stage("compress"):
        raise UserError("a dense model")
    run.discard_if_untouched()
    assert open_run("compress", [f"run={path}", "model=/moe"]).config.seed == 42
    run = stage("compress", path, "model=/moe")
    run.discard_if_untouched()
    assert (path / "config.yaml").exists()


def test_a_lost_manifest_thaws_nothing(path: Path) -> None:
    stage("compress", path)
    (path / "manifest.json").unlink()
    assert "frozen" in refusal("compress", path, "seed=1")
    assert "frozen" in refusal("compress", path, "distillation.loss.alpha=0.1")
    (path / "manifest.json").write_text("{")
    assert "manifest.json is damaged" in refusal("compress", path)


def test_workers_finish_a_stage_together(path: Path) -> None:
    generation = "distillation.teacher.generation"

    def worker(index: int) -> Run:
        overrides = [f"run={path}", f"{generation}.worker_id={index}", f"{generation}.total_workers=2"]
        return open_run("teacher-logits", overrides)

    with worker(0).stage("teacher-logits"), worker(1).stage("teacher-logits"):
        worker(0).record("teacher-logits", a=1)
    assert Run.open(path).finished("teacher-logits")
    entry = json.loads((path / "manifest.json").read_text())["stages"]["teacher-logits"]
    assert set(entry["parts"]) == {"0/2", "1/2"} and entry["facts"] == {"a": 1}


def test_one_worker_alone_does_not_finish_the_stage(path: Path) -> None:
    generation = "distillation.teacher.generation"
    run = open_run("teacher-logits", [f"run={path}", f"{generation}.worker_id=1", f"{generation}.total_workers=2"])
    with run.stage("teacher-logits"):
        (path / "x").write_text("")
    assert run.finished("teacher-logits") and run.has_run("teacher-logits")
    assert not Run.open(path).finished("teacher-logits")


HOLD = """
import sys, time
from moe_compress.run import Run
with Run.open(sys.argv[1]).stage("distill"):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_run_one_stage(path: Path) -> None:
    run = stage("compress", path)
    source = str(Path(moe_compress.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            already = f"distill of .* already running in process {process.pid}"
            with pytest.raises(UserError, match=already), run.stage("distill"):
                pass
            with run.stage("watch"):
                pass
        finally:
            process.kill()
    assert json.loads((path / "manifest.json").read_text())["stages"]["distill"]["status"] == "running"
    # It may have left files before it was killed, so its settings stay frozen.
    assert "frozen" in refusal("compress", path, "distillation.loss.alpha=0.1")
    with run.stage("distill"):
        pass
    assert run.finished("distill")


def test_only_rank_0_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    run = open_run("compress", [f"run={path}", "seed=3"])
    with run.stage("compress"):
        run.record("compress", a=1)
    assert run.config.seed == 3 and not path.exists()
    monkeypatch.setenv("RANK", "0")
    stage("compress", path, "seed=3")
    assert (path / "manifest.json").exists()


def test_create_freezes_a_nested_run(path: Path) -> None:
    config = settings.compose(["compression=svd"])
    Run.create(path / "baseline_svd", config)
    assert asdict(Run.open(path / "baseline_svd").config) | {"run": None} == asdict(
        settings.compose(["compression=svd"])
    )
    Run.create(path / "baseline_svd", settings.compose(["compression=svd", "gpu_ids=[1]"]))
    with pytest.raises(UserError, match="compression.cores is frozen at 0 .* given as auto"):
        Run.create(path / "baseline_svd", settings.compose([]))
    with pytest.raises(UserError, match="is not a run directory"):
        Run.open(path)


def _checkpoint(path: Path, shards: int) -> None:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    names = [f"model-{index}.safetensors" for index in range(shards)] or ["model.safetensors"]
    if shards:
        index = {"weight_map": {name: name for name in names}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in names:
        (path / name).write_text("")


def test_complete_checkpoints_by_step(path: Path) -> None:
    run = Run(path, Config())
    assert run.checkpoints() == []
    with pytest.raises(UserError, match="no checkpoint yet"):
        run.student()
    for step, shards in ((10, 0), (0, 2), (9, 3)):
        _checkpoint(run.checkpoint(step), shards)
    _checkpoint(path / "checkpoints" / ".checkpoint-11.partial", 0)
    _checkpoint(path / "checkpoints" / "checkpoint-old", 0)
    _checkpoint(run.checkpoint(12), 2)
    (run.checkpoint(12) / "model-1.safetensors").unlink()
    (run.checkpoint(13)).mkdir()
    _checkpoint(run.checkpoint(14), 1)
    (run.checkpoint(14) / "model.safetensors.index.json").write_text("[]")
    assert [step for step, _ in run.checkpoints()] == [0, 9, 10]
    assert run.checkpoints()[0][1] == path / "checkpoints" / "checkpoint-0"
    assert run.student() == run.checkpoint(10)
    (path / "best").symlink_to("checkpoints/checkpoint-9")
    assert run.student() == run.checkpoint(9).resolve()


def test_directories(path: Path) -> None:
    run = Run(path, Config())
    assert run.teacher_logits_dir == path / "teacher_logits"
    assert (run.checkpoints_dir, run.evals_dir, run.logs_dir) == (path / "checkpoints", path / "evals", path / "logs")
    run.config.distillation.teacher.cache_dir = "/shared"
    assert run.teacher_logits_dir == Path("/shared")


def test_the_table_of_stages_covers_every_setting() -> None:
    from moe_compress.schema import flatten

    for key in flatten(Config()):
        assert freezing_stages(key), key
        if not is_free(key):
            readers = [name for name, stage in STAGES.items() if name != "run" and stage.reads_key(key)]
            assert set(readers) & set(freezing_stages(key)), f"{key} is frozen by a stage that does not read it"
