"""The watcher with real processes: beside a real training, killed in the middle, told to stop, given bad devices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_compress.config import DatasetConfig
from moe_compress.errors import UserError
from moe_compress.evaluation import watch
from moe_compress.evaluation.results import append_result, read_results, settings_fingerprint
from moe_compress.evaluation.watch import device_groups, watch_run
from moe_compress.freeze import store
from moe_compress.run import Run

SOURCE = Path(__file__).parents[2] / "src"

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that starts a command of moe-compress; what still runs at the end is killed."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")])),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "moe_compress", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                start_new_session=True,
                # A suite that a shell started in the background ignores Ctrl-C, and its children would inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            for pid in (*children(process.pid), process.pid):  # also those that were stopped
                os.kill(pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def until(condition: Callable[[], object], seconds: float = 600.0) -> object:
    """Wait for something to become true, and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError("it did not happen in time")


def children(pid: int) -> set[int]:
    """The processes that a process has started and that still live."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.add(int(stat.parent.name))
    return found


def claims_of(run: Run, pid: int) -> list[Path]:
    """The claims to students that a process holds."""
    found = []
    for path in (run.evals_dir / "claims").glob("student-*.json"):
        try:
            if json.loads(path.read_text())["pid"] == pid:
                found.append(path)
        except (OSError, ValueError):
            continue
    return found


def test_training_and_two_watchers_of_which_one_is_killed(make_run, text_file, started):
    run = make_run()
    config = run.config
    config.distillation.teacher.use_cached_logits = False
    config.distillation.dataset = DatasetConfig(name=str(text_file), max_length=32)
    training = config.distillation.training
    training.max_steps, training.save_steps, training.save_total_limit = 8, 2, 1
    training.per_device_train_batch_size, training.gradient_accumulation_steps = 2, 1
    training.bf16, training.warmup_steps = False, 0
    store(run.path, config)
    with run.stage("compress"):  # the student is there already
        pass
    doomed = started("watch", f"run={run.path}")
    # Not the first child that is seen: one may live for a moment only.
    held = until(lambda: [(pid, claim) for pid in children(doomed.pid) for claim in claims_of(run, pid)])
    ((worker, claim),) = held  # type: ignore[misc]
    os.kill(worker, signal.SIGSTOP)  # in the middle of an evaluation, and it stays there
    assert claim.exists()
    watcher, trainer = started("watch", f"run={run.path}"), started("distill", f"run={run.path}")
    until(lambda: read_results(run.evals_dir) or trainer.poll())
    assert not trainer.poll(), trainer.communicate()[0]
    assert [record["step"] for record in read_results(run.evals_dir)] != [0]  # the claim of the living is respected
    for pid in (doomed.pid, worker):
        os.kill(pid, signal.SIGKILL)
    assert trainer.wait(600) == 0, trainer.communicate()[0]
    assert watcher.wait(600) == 0, watcher.communicate()[0]
    steps = Counter((record["step"], "error" in record) for record in read_results(run.evals_dir))
    assert steps == {(step, False): 1 for step in (0, 2, 4, 6, 8)}
    assert (run.path / "best").exists() and not list((run.evals_dir / "claims").iterdir())
    assert "training is complete, everything is evaluated" in watcher.communicate()[0]


def test_a_worker_that_dies_is_started_again_and_ctrl_c_ends_all(make_run, started):
    run = make_run(0)
    watcher = started("watch", f"run={run.path}", "evaluation.devices=[cpu,cpu]")
    workers = until(lambda: len(children(watcher.pid)) == 2 and children(watcher.pid))
    assert isinstance(workers, set)
    killed = min(workers)
    os.kill(killed, signal.SIGKILL)
    until(lambda: len(children(watcher.pid) - {killed}) == 2)
    until(lambda: len(read_results(run.evals_dir)) == 1)
    alive = children(watcher.pid)
    watcher.send_signal(signal.SIGINT)
    output = watcher.communicate(timeout=300)[0]
    assert watcher.returncode == 130
    assert "was killed by signal 9; starting it again" in output
    assert "  student at step 0: perplexity" in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in alive)
    assert not list((run.evals_dir / "claims").iterdir()) and not (run.evals_dir / "watchers").exists()


class NoWorker:
    """Stands in for a worker that has nothing to do."""

    def __init__(self, run: Run, *_: object) -> None:
        self.run = run

    def __enter__(self) -> NoWorker:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stop(self) -> None:
        pass

    def look_after(self) -> bool:
        return False


def test_one_pass_names_what_could_not_be_measured(make_run, monkeypatch):
    monkeypatch.setattr(watch, "Worker", NoWorker)
    run = make_run(0, 2)
    common = {"model": "student", "path": "a", "settings": settings_fingerprint(run.config)}
    append_result(run.evals_dir, {**common, "step": 0, "perplexity": 3.0})
    watch_run(run, once=True)
    append_result(run.evals_dir, {**common, "step": 2, "error": "no memory"})
    with pytest.raises(UserError, match="^student at step 2 could not be measured: no memory"):
        watch_run(run, once=True)


def test_sigterm_ends_it_like_ctrl_c(make_run, monkeypatch):
    class Told(NoWorker):
        def look_after(self):
            assert list((self.run.evals_dir / "watchers").iterdir())
            os.kill(os.getpid(), signal.SIGTERM)
            return True

    monkeypatch.setattr(watch, "Worker", Told)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM was not taken"))
    try:
        with pytest.raises(KeyboardInterrupt):
            watch_run(run := make_run(0))
        assert signal.getsignal(signal.SIGTERM) is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (run.evals_dir / "watchers").exists()


def test_workers_do_not_outlive_a_killed_watcher(make_run, started):
    run = make_run(0)
    watcher = started("watch", f"run={run.path}")
    (worker,) = until(lambda: children(watcher.pid))  # type: ignore[misc]
    watcher.kill()
    watcher.wait()
    until(lambda: not Path(f"/proc/{worker}").exists())


def test_what_a_worker_finds_wrong_is_one_line_of_the_watcher(make_run, monkeypatch):
    run = make_run(0)
    run.config.evaluation.perplexity.name = "/nowhere.txt"
    monkeypatch.setenv("PYTHONPATH", str(SOURCE), prepend=os.pathsep)
    with pytest.raises(UserError, match="/nowhere.txt"):
        watch_run(run, once=True)
    assert not (run.evals_dir / "watchers").exists()


def test_devices_are_divided_among_workers(config):
    assert device_groups(config) == [[]]
    config.evaluation.devices = ["cpu", "cpu"]
    assert device_groups(config) == [["cpu"], ["cpu"]]
    config.evaluation.devices = ["cpu", "cuda:7"]
    with pytest.raises(UserError, match="evaluation.devices names 'cuda:7', but this machine has"):
        device_groups(config)
    for name in ("gpu0", "meta", "mps", "xpu:1"):
        config.evaluation.devices = [name]
        with pytest.raises(UserError, match=f"evaluation.devices names '{name}'; use cpu, cuda"):
            device_groups(config)


def test_several_gpus_for_one_model(config, monkeypatch):
    monkeypatch.setattr("moe_compress.evaluation.watch.choose_device", lambda config: None)
    config.evaluation.devices = [f"cuda:{number}" for number in range(4)]
    config.evaluation.gpus_per_model = 2
    assert device_groups(config) == [["cuda:0", "cuda:1"], ["cuda:2", "cuda:3"]]
    config.evaluation.devices.pop()
    with pytest.raises(UserError, match="names 3 GPUs, which evaluation.gpus_per_model=2 does not divide"):
        device_groups(config)


def test_refusals_before_anything_is_started(make_run, tmp_path, config):
    with pytest.raises(UserError, match="no checkpoint to evaluate"):
        watch_run(Run.create(tmp_path / "empty", config), once=True)
    run = make_run(0)
    run.config.evaluation.tasks = {"stdlib_next_lime": 0}
    with pytest.raises(UserError, match="nearest names are: stdlib_next_line"):
        watch_run(run)
    assert not list(run.logs_dir.glob("*"))
