"""Claims: one owner at a time, dead owners replaced, live ones respected, also under a race of processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_compress.evaluation import claims
from moe_compress.evaluation.claims import claimed, is_alive, owner_of, presence, process_identity


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave_claim(directory: Path, name: str, number: int = 0, **changes: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.{number}.json"
    path.write_text(json.dumps({**process_identity(), **changes}))
    return path


def test_a_claim_excludes_others_until_it_ends(tmp_path):
    with claimed(tmp_path, "a") as first, claimed(tmp_path, "a") as second, claimed(tmp_path, "b") as other:
        assert (first, second, other) == (True, False, True)
    with claimed(tmp_path, "a") as again:
        assert again
    assert not list(tmp_path.iterdir())


def test_the_owner_is_known_while_it_works(tmp_path):
    assert owner_of(tmp_path / "none", "a") is None and owner_of(tmp_path, "a") is None
    with claimed(tmp_path, "a", device="cuda:1"):
        owner = owner_of(tmp_path, "a")
        assert owner is not None and (owner["pid"], owner["device"]) == (os.getpid(), "cuda:1")
    assert owner_of(tmp_path, "a") is None
    leave_claim(tmp_path, "a", pid=dead_pid())
    assert owner_of(tmp_path, "a") is None


def test_attempts_count_the_dead_until_the_work_is_done(tmp_path):
    for number in range(2):
        leave_claim(tmp_path, "a", number, pid=dead_pid())
    with pytest.raises(ZeroDivisionError), claimed(tmp_path, "a") as attempt:
        assert attempt == 3
        raise ZeroDivisionError  # not done: the dead still count
    with claimed(tmp_path, "a") as attempt:
        assert attempt == 3
    with claimed(tmp_path, "a") as attempt:
        assert attempt == 1


def test_the_claim_of_a_dead_process_is_taken_over(tmp_path):
    stale = leave_claim(tmp_path, "a", pid=dead_pid())
    with claimed(tmp_path, "a") as ours:
        assert ours
        assert stale.exists() and (tmp_path / "a.1.json").exists()  # outnumbered, not deleted
        with claimed(tmp_path, "a") as other:
            assert not other


def test_a_reused_process_number_is_not_the_owner(tmp_path):
    leave_claim(tmp_path, "a", started="1")
    with claimed(tmp_path, "a") as ours:
        assert ours


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"namespace": "pid:[1]"}])
def test_elsewhere_the_heartbeat_decides(tmp_path, changes):
    claim = leave_claim(tmp_path, "a", pid=dead_pid(), **changes)
    with claimed(tmp_path, "a") as ours:
        assert not ours
    old = time.time() - claims.STALE_SECONDS - 1
    os.utime(claim, (old, old))
    with claimed(tmp_path, "a") as ours:
        assert ours


def test_a_heartbeat_keeps_a_claim_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.02)
    with claimed(tmp_path, "a"):
        path = tmp_path / "a.0.json"
        os.utime(path, (1, 1))
        end = time.time() + 5
        while path.stat().st_mtime < 2 and time.time() < end:
            time.sleep(0.02)
        assert path.stat().st_mtime > 2


def test_half_a_claim_counts_while_it_is_fresh(tmp_path):
    path = tmp_path / "a.0.json"
    path.write_text('{"pid": 1')
    assert is_alive(path)
    os.utime(path, (1, 1))
    assert not is_alive(path)
    assert not is_alive(tmp_path / "none")


CONTENDERS = 6


def _contend(directory: Path, number: int, start: float) -> None:
    """Try to claim, and hold on to the claim until all others have tried as well."""
    time.sleep(max(0.0, start - time.time()))
    with claimed(directory / "claims", "a") as ours:
        (directory / f"{'won' if ours else 'lost'}-{number}").write_text("")
        end = time.time() + 60
        while ours and len(list(directory.glob("*-*"))) < CONTENDERS and time.time() < end:
            time.sleep(0.01)


def test_of_many_that_see_the_same_stale_claim_one_wins(tmp_path):
    leave_claim(tmp_path / "claims", "a", pid=dead_pid())
    context = multiprocessing.get_context("fork")
    start = time.time() + 0.3
    contenders = [context.Process(target=_contend, args=(tmp_path, n, start)) for n in range(CONTENDERS)]
    for contender in contenders:
        contender.start()
    for contender in contenders:
        contender.join()
    assert len(list(tmp_path.glob("won-*"))) == 1
    assert len(list(tmp_path.glob("lost-*"))) == CONTENDERS - 1


def test_a_killed_owner_is_found_out_at_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from moe_compress.evaluation.claims import claimed\n"
        "with claimed(Path(sys.argv[1]), 'a'):\n    print('claimed', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "claimed\n"
    with claimed(tmp_path, "a") as ours:
        assert not ours
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with claimed(tmp_path, "a") as ours:
        assert ours


def test_presence_outlasts_a_directory_that_is_taken_away(tmp_path, monkeypatch):
    directory, alive = tmp_path / "watchers", claims.is_alive
    leave_claim(directory, "ghost", pid=dead_pid())

    def leave(path):
        path.unlink()
        directory.rmdir()
        return alive(path)

    monkeypatch.setattr(claims, "is_alive", leave)
    with presence(directory) as path:
        assert path.exists()


def test_presence_is_seen_and_leaves_nothing(tmp_path):
    directory = tmp_path / "watchers"
    leave_claim(directory, "ghost", pid=dead_pid())
    with presence(directory) as path:
        assert [file.name for file in directory.iterdir()] == [f"{socket.gethostname()}-{os.getpid()}.json"]
        assert is_alive(path)
    assert not directory.exists()
