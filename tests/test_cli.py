"""The command line: exit codes, one-line errors, help without torch, and the scripts that lead to it."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from moe_compress import settings
from moe_compress.cli import main
from moe_compress.cli.commands import COMMANDS
from moe_compress.config import Config
from moe_compress.errors import UserError
from moe_compress.run import Run
from moe_compress.schema import walk
from moe_compress.stages import STAGES, Stage

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "run_compression.py": "compress",
    "generate_teacher_logits.py": "teacher-logits",
    "run_distillation.py": "distill",
    "run_async_eval.py": "watch",
}


def environment(**extra: str) -> dict[str, str]:
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", **extra}


def execute(*command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=environment(**extra), timeout=120)


class Recorder:
    """Stands for the functions of the stages: remembers calls, leaves a file, or raises."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Run, dict[str, Any]]] = []
        self.error: BaseException | None = None

    def load(self, stage: Stage) -> Any:
        def function(run: Run, **options: Any) -> None:
            self.calls.append((stage.name, run, options))
            if self.error is not None:
                raise self.error
            with run.stage(stage.name):
                (run.path / f"{stage.name}.out").write_text("")

        return function


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(Stage, "load", lambda stage: recorder.load(stage))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "unset by the test")
    return recorder


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints; it must exit with 2 and print nothing else."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_every_stage_is_reached_with_its_settings(recorder: Recorder) -> None:
    order = ["compress", "teacher-logits", "distill", "evaluate", "watch", "report", "run"]
    assert main(["compress", "run=r", "model=/some where/model", "compression.rank=4"]) == 0
    for name in order[1:]:
        assert main([name, "run=r"]) == 0
    assert [name for name, _, _ in recorder.calls] == order
    for _, run, _ in recorder.calls:
        assert run.path == Path("r")
        assert (run.config.model.name, run.config.compression.rank) == ("/some where/model", 4)
    assert set(order) == set(STAGES)


def test_flags_may_stand_anywhere(recorder: Recorder, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 8")
    assert main(["compress", "run=r", "--config", "mine.yaml", "compression.rank=4"]) == 0
    run = recorder.calls[0][1]
    assert (run.config.seed, run.config.compression.rank) == (8, 4)
    assert main(["watch", "--once", "run=r"]) == 0
    assert main(["watch", "run=r", "--once", "evaluation.poll_seconds=1"]) == 0
    assert main(["watch", "run=r"]) == 0
    assert [options for _, _, options in recorder.calls[1:]] == [{"once": True}, {"once": True}, {}]


def test_a_user_error_is_one_line_and_exit_code_2(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'compress'" in error_of(capsys, "compres", "run=r")
    assert "did you mean 'compression.rank'" in error_of(capsys, "compress", "run=r", "compression.rnak=3")
    assert "--wat" in error_of(capsys, "compress", "run=r", "--wat")
    assert "is not a setting" in error_of(capsys, "compress", "run=r", "rank")
    assert "run first: moe-compress compress run=r" in error_of(capsys, "distill", "run=r")
    assert "cannot be read" in error_of(capsys, "compress", "--config", "none.yaml")
    assert not Path("r").exists() and recorder.calls == []
    recorder.error = UserError("the model\nis dense")
    assert error_of(capsys, "compress", "run=r") == "error: the model is dense\n"
    assert not Path("r/config.yaml").exists(), "nothing was made from these settings"


def test_a_frozen_setting_is_refused(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "run=r", "compression.iterations=3"]) == 0
    line = error_of(capsys, "evaluate", "run=r", "compression.iterations=4")
    assert "compression.iterations is frozen at 3" in line and "given as 4" in line
    assert len(recorder.calls) == 1


def test_a_default_preset_is_no_silent_nothing_on_a_frozen_run(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "run=r", "evaluation=harness", "distillation=router_only"]) == 0
    assert main(["teacher-logits", "run=r", "distillation=default"]) == 0  # no stage has used it yet
    assert yaml.safe_load(Path("r/config.yaml").read_text())["distillation"]["stages"] == []
    assert main(["evaluate", "run=r"]) == 0
    assert "evaluation.tasks is frozen at" in error_of(capsys, "evaluate", "run=r", "evaluation=default")


def test_an_interruption_exits_with_130(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    recorder.error = KeyboardInterrupt()
    assert main(["compress", "run=r"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_defect_keeps_its_traceback(recorder: Recorder) -> None:
    recorder.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        main(["compress", "run=r"])


def test_what_the_system_refuses_is_one_line(
    recorder: Recorder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("afile").write_text("")
    assert error_of(capsys, "compress", "run=afile/x").startswith("error: Not a directory: 'afile/x'")
    recorder.error = OSError(errno.ENOSPC, "No space left on device")
    assert error_of(capsys, "compress", "run=r").startswith("error: No space left on device (")
    monkeypatch.setenv("MOE_COMPRESS_TRACEBACK", "1")
    with pytest.raises(OSError, match="No space left"):
        main(["compress", "run=r"])
    monkeypatch.delenv("MOE_COMPRESS_TRACEBACK")
    recorder.error = OSError("a library's own words")
    with pytest.raises(OSError, match="a library's own words"):
        main(["compress", "run=r"])


def test_a_reader_that_has_gone_ends_the_command_quietly() -> None:
    result = execute("bash", "-c", f"{sys.executable} -m moe_compress settings | true; echo ${{PIPESTATUS[0]}}")
    assert (result.stdout, result.stderr) == ("141\n", "")


def test_an_output_that_cannot_be_written_fails_before_the_work(
    recorder: Recorder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after it: the modules that would do the work are not even imported."""
    for module in ("evaluation", "report", "modeling"):
        monkeypatch.setitem(sys.modules, f"moe_compress.{module}", None)
    Path("afile").write_text("")
    for command in (("bench",), ("evaluate", "reference"), ("report", "a", "b")):
        assert error_of(capsys, *command, "--output", "afile").startswith("error: File exists: 'afile'")
    assert "File exists: 'afile'" in error_of(capsys, "export", "model=m", "--dense", "afile/x")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "out cannot be written to" in error_of(capsys, "bench", "--output", "out")


def test_gpu_ids_are_all_that_the_process_sees(recorder: Recorder) -> None:
    main(["compress", "run=r"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "unset by the test"
    main(["compress", "run=r", "gpu_ids=[2,3]"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_gpus_that_are_not_here_are_refused(
    recorder: Recorder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert "gpu_ids=[0, 7] names GPUs that are not here" in error_of(capsys, "compress", "run=r", "gpu_ids=[0,7]")
    assert recorder.calls == [] and not Path("r/config.yaml").exists()
    assert main(["compress", "run=r", "gpu_ids=[7]"]) == 0
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)  # another machine
    assert main(["report", "run=r"]) == 0, "it uses no GPU"
    assert "give others, or gpu_ids=[]" in error_of(capsys, "evaluate", "run=r")
    assert main(["evaluate", "run=r", "gpu_ids=[]"]) == 0


def test_other_ranks_are_silent(recorder: Recorder, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    main(["compress", "run=r"])
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    with pytest.raises(SystemExit) as exit_code:
        main(["compress", "run=r", "seed=1"])
    assert exit_code.value.code == 2
    recorder.error = UserError("only here")
    assert main(["compress", "run=r"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "[rank 3] error: only here\n" and captured.out == ""


def test_plan_and_bench_take_settings_of_a_run(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Config] = []
    monkeypatch.setitem(sys.modules, "moe_compress.compression", SimpleNamespace(plan=seen.append))
    monkeypatch.setitem(
        sys.modules, "moe_compress.evaluation", SimpleNamespace(bench_model=lambda config, output: seen.append(config))
    )
    assert main(["compress", "run=r", "compression.iterations=3"]) == 0
    assert main(["plan", "run=r", "compression.target_ratio=0.4"]) == 0
    assert main(["bench", "run=r"]) == 0
    assert main(["plan"]) == 0
    preset = settings.compose([]).compression.target_ratio
    assert [(config.compression.iterations, config.compression.target_ratio) for config in seen] == [
        (3, 0.4),
        (3, preset),
        (5, preset),
    ]
    assert yaml.safe_load(Path("r/config.yaml").read_text())["compression"]["target_ratio"] == preset
    for command in ("plan", "bench", "inspect", "settings"):
        assert "typo is not a run directory" in error_of(capsys, command, "run=typo")
    assert len(seen) == 3


def test_evaluate_and_report_take_models_and_runs(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    report = SimpleNamespace(
        compare_models=lambda models, config, output, teacher: seen.append((models, config.seed, output, teacher)),
        compare_runs=lambda runs, output: seen.append((runs, output)),
    )
    monkeypatch.setitem(sys.modules, "moe_compress.report", report)
    assert main(["evaluate", "some/model", "seed=3", "./dir", "--vs", "reference"]) == 0
    assert main(["evaluate", "x", "--output", "out"]) == 0
    assert main(["report", "a", "b"]) == 0
    assert main(["report", "a", "b", "--output", "out"]) == 0
    assert seen == [
        (["some/model", "./dir"], 3, Path("evaluation"), "reference"),
        (["x"], 42, Path("out"), None),
        ([Path("a"), Path("b")], Path("comparison")),
        ([Path("a"), Path("b")], Path("out")),
    ]
    assert main(["compress", "run=r"]) == 0
    assert main(["report", "r"]) == 0  # one run: the stage
    assert [name for name, _, _ in recorder.calls] == ["compress", "report"]
    assert "evaluate MODEL ... --vs TEACHER" in error_of(capsys, "evaluate", "run=r", "--vs", "reference")
    assert "comparison of several runs" in error_of(capsys, "report", "r", "--output", "out")
    assert "named and given as run=" in error_of(capsys, "report", "run=a", "r")
    for extra in (("nonsense=1",), ("run=c",), ("--config", "r/config.yaml")):
        assert "a comparison takes no settings" in error_of(capsys, "report", "a", "b", *extra)
    assert len(seen) == 4


def test_export(recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, Path, bool]] = []

    def export_dense(source: Path | str, output: Path, *, trust_remote_code: bool) -> None:
        seen.append((str(source), output, trust_remote_code))

    modeling = SimpleNamespace(export_dense=export_dense)
    monkeypatch.setitem(sys.modules, "moe_compress.modeling", modeling)
    assert "export needs --dense OUT" in error_of(capsys, "export", "run=r")
    assert "export needs run=RUN" in error_of(capsys, "export", "--dense", "out")
    assert "is not a run directory" in error_of(capsys, "export", "run=r", "--dense", "out")
    main(["compress", "run=r", "model.trust_remote_code=true"])
    capsys.readouterr()
    assert "no checkpoint yet" in error_of(capsys, "export", "run=r", "--dense", "out")
    checkpoint = Path("r/checkpoints/checkpoint-0")
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_text("")
    assert main(["export", "run=r", "--dense", "out"]) == 0
    assert main(["export", f"model={checkpoint}", "--dense", "out"]) == 0
    assert seen == [(str(checkpoint), Path("out"), True), (str(checkpoint), Path("out"), False)]
    assert "saves no memory" in capsys.readouterr().out
    assert "exists already" in error_of(capsys, "export", "run=r", "--dense", "r")


def test_reference_train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = SimpleNamespace(train_reference=lambda output: output)
    monkeypatch.setitem(sys.modules, "moe_compress.reference.recipe", recipe)
    monkeypatch.chdir(tmp_path)
    assert "reference train" in error_of(capsys, "reference")
    assert main(["reference", "train", "--output", "m"]) == 0
    assert capsys.readouterr().out == "the reference MoE is in m\n"
    Path("m").mkdir()
    assert "m exists already" in error_of(capsys, "reference", "train", "--output", "m")


def test_settings_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings"]) == 0
    listing = capsys.readouterr().out
    for info in walk():
        assert f"  {info.key} = " in listing
    for preset in ("qwen3_30b_a3b", "mixtral_8x7b", "olmoe_1b_7b", "reference", "svd", "wikitext", "router_only"):
        assert preset in listing


def test_settings_of_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "distillation.loss", "distillation.loss.alpha=0.25"]) == 0
    listing = capsys.readouterr().out
    assert "distillation.loss.alpha = 0.25   (number; 0.5 without presets)" in listing
    assert "keep | ignore" in listing and "compression.rank" not in listing
    assert "did you mean 'compression'" in error_of(capsys, "settings", "compresion")
    assert main(["settings", "--yaml", "seed=3"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 3


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert main(arguments) == 0
        page = capsys.readouterr().out
        for name, command in COMMANDS.items():
            assert f"  {name} " in page and command.summary in page
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        page = capsys.readouterr().out
        assert page.startswith(f"usage: moe-compress {name} ")
        for info in walk():
            if "[]" not in info.key:
                assert (f"  {info.key} = " in page) == COMMANDS[name].reads(info.key)
    assert main(["watch", "--help"]) == 0
    assert "--once" in capsys.readouterr().out
    assert main(["compress", "--help", "model=qwen3_30b_a3b"]) == 0
    assert "model.name = Qwen/Qwen3-30B-A3B   (text; reference without presets)" in capsys.readouterr().out


def test_help_names_what_a_stage_reads() -> None:
    assert COMMANDS["compress"].reads("compression.rank") and not COMMANDS["compress"].reads("distillation.loss.alpha")
    assert COMMANDS["teacher-logits"].reads("distillation.teacher.generation.top_k")
    assert not COMMANDS["teacher-logits"].reads("distillation.loss.alpha")
    assert COMMANDS["distill"].reads("fsdp.enabled") and COMMANDS["evaluate"].reads("evaluation.tasks")
    assert COMMANDS["run"].reads("evaluation.tasks") and COMMANDS["run"].reads("compression.rank")


@pytest.mark.parametrize("arguments", [["--help"], ["distill", "--help"], ["settings"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'lm_eval', 'matplotlib'}"
    code = f"""
import sys
from moe_compress.cli import main
assert main({arguments!r}) == 0
print("heavy:", sorted({heavy} & set(sys.modules)))
"""
    result = execute(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith("heavy: []")


def test_python_m(tmp_path: Path) -> None:
    result = execute(sys.executable, "-m", "moe_compress", "distill", f"run={tmp_path / 'none'}")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: distill needs a run") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(("script", "command"), SCRIPTS.items())
def test_scripts_are_the_same_commands(script: str, command: str) -> None:
    result = execute(sys.executable, str(ROOT / "scripts" / script), "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: moe-compress {command} ")


PARALLEL = ROOT / "scripts" / "generate_teacher_logits_parallel.sh"
# Stands for the interpreter: writes its arguments and GPUs, then does what the test told this worker to do.
WORKER = """#!/usr/bin/env bash
for argument in "$@"; do [[ "$argument" == *worker_id=* ]] && id="${argument#*worker_id=}"; done
echo "$@" >"$OUT/arguments-$id"; echo "${CUDA_VISIBLE_DEVICES:-none}" >"$OUT/gpus-$id"
eval "$(cat "$OUT/do-$id" 2>/dev/null)"
"""


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(WORKER)
    path.chmod(0o755)
    return path


def parallel(worker: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return execute(str(PARALLEL), *arguments, PYTHON=str(worker), OUT=str(worker.parent), **extra)


def test_parallel_workers_share_the_work(worker: Path) -> None:
    out = worker.parent
    result = parallel(worker, "2", f"run={out}/a run", "seed=1", GPUS="4 5 6 7", GPUS_PER_WORKER="2")
    assert result.returncode == 0, result.stderr
    for index in range(2):
        arguments = (out / f"arguments-{index}").read_text()
        assert "scripts/generate_teacher_logits.py" in arguments and f"run={out}/a run seed=1" in arguments
        assert f"generation.worker_id={index} " in arguments and "generation.total_workers=2" in arguments
        assert "gpu_ids=[]" in arguments and "distillation.teacher.device_map=auto" in arguments
        assert (out / "a run" / "logs" / f"teacher-logits-{index}.log").exists()
    assert [(out / f"gpus-{index}").read_text() for index in range(2)] == ["4,5\n", "6,7\n"]


def test_parallel_workers_leave_the_spreading_of_the_teacher_to_the_user(worker: Path) -> None:
    device_map = "distillation.teacher.device_map"
    for given, per_worker, found in ((f"{device_map}=balanced", "2", f"{device_map}=balanced"), ("seed=1", "1", None)):
        result = parallel(worker, "1", f"run={worker.parent}/run", given, GPUS="0 1", GPUS_PER_WORKER=per_worker)
        assert result.returncode == 0, result.stderr
        words = (worker.parent / "arguments-0").read_text().split()
        assert [word for word in words if device_map in word] == ([found] if found else [])


def test_a_failing_worker_ends_the_others(worker: Path) -> None:
    out = worker.parent
    (out / "do-0").write_text('echo $$ >"$OUT/pid"; exec sleep 100')
    (out / "do-1").write_text('while [[ ! -s "$OUT/pid" ]]; do sleep 0.05; done; echo no memory; exit 3')
    result = parallel(worker, "2", LOG_DIR=str(out / "l"))
    assert result.returncode == 1
    assert "worker 1 of 2 failed with exit code 3" in result.stderr and "no memory" in result.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((out / "pid").read_text()), 0)


def test_parallel_arguments_are_checked(worker: Path) -> None:
    assert "scripts/generate_teacher_logits_parallel.sh N" in parallel(worker, "--help").stdout
    for arguments, extra in (([], {}), (["0"], {}), (["run=x"], {}), (["3"], {"GPUS": "0 1"})):
        result = parallel(worker, *arguments, **extra)
        assert result.returncode == 2 and result.stderr.startswith("error: "), arguments
    assert not list(worker.parent.glob("arguments-*"))
