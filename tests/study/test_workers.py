"""Shares, signs of life and taking over: every unit is done, whoever is missing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tl_contrastive_lrp.study import workers
from tl_contrastive_lrp.study.workers import Share, Worker


def test_shares_are_a_partition() -> None:
    for n in (1, 2, 3, 7):
        owners = [[i for i in range(n) if Share(i, n).first(unit)] for unit in range(20)]
        assert all(len(one) == 1 for one in owners)
    assert Share.of_text("2/4") == Share(2, 4)
    for wrong in ("4/4", "-1/4", "1", "a/b", "1/0", "0/0", "1/2/3"):
        with pytest.raises(ValueError, match="shard"):
            Share.of_text(wrong)


def test_shares_of_launchers() -> None:
    assert Share.of_environment({}) == Share(0, 1)
    launched = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert Share.of_environment(launched) == Share(5, 8, 1)
    with pytest.raises(ValueError, match="go together"):
        Share.of_environment({"RANK": "1"})
    with pytest.raises(ValueError, match="shard 8/8"):
        Share.of_environment({"RANK": "8", "WORLD_SIZE": "8"})
    with pytest.raises(ValueError, match=r"must be whole numbers.*'a'"):
        Share.of_environment({"RANK": "a", "WORLD_SIZE": "8"})


class Pool:
    """Units that are done when they are in a set; workers are threads."""

    def __init__(self, n: int, folder: Path, seconds: float = 0.0) -> None:
        self.keys = [f"k{i}" for i in range(n)]
        self.folder, self.seconds = folder, seconds
        self.done: set[str] = set()
        self.log: list[tuple[int, int]] = []

    def run(self, share: Share, failing: int = -1) -> None:
        worker = Worker(self.folder, share)

        def compute(i: int) -> bool:
            time.sleep(self.seconds)
            self.log.append((share.index, i))
            if i == failing:
                return False
            self.done.add(self.keys[i])
            return True

        with worker.alive():
            worker.work(self.keys, range(len(self.keys)), lambda key: key in self.done, compute)


def test_one_worker_of_several_does_its_share_first_and_then_the_rest(tmp_path: Path) -> None:
    pool = Pool(7, tmp_path)
    pool.run(Share(1, 3))
    assert [i for _, i in pool.log] == [1, 4, 6, 5, 3, 2, 0]
    assert pool.done == set(pool.keys)
    assert not list((tmp_path / "workers").iterdir())


def test_what_failed_is_not_tried_again_by_the_same_worker(tmp_path: Path) -> None:
    pool = Pool(3, tmp_path)
    pool.run(Share(), failing=1)
    assert [i for _, i in pool.log] == [0, 1, 2]


def test_workers_do_no_unit_twice_and_share_evenly(tmp_path: Path) -> None:
    pool = Pool(12, tmp_path, seconds=0.05)
    threads = [threading.Thread(target=pool.run, args=(Share(i, 3),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert pool.done == set(pool.keys)
    # Only at the end, between the look at the others and the own sign, can two begin the same one.
    assert len(pool.log) <= 12 + 2
    assert len({worker for worker, _ in pool.log}) == 3


def sign(folder: Path, key: str, *, pid: int, host: str, age: float = 0.0) -> Path:
    path = folder / "workers" / "other.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"key": key, "host": host, "pid": pid}))
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def test_who_counts_as_alive(tmp_path: Path) -> None:
    worker = Worker(tmp_path, Share())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = socket.gethostname()
    with worker.alive():
        worker.at("own")
        for pid, host, age, expected in (
            (os.getpid(), here, 0.0, True),
            (os.getpid(), here, workers.STALE - 5, True),
            (os.getpid(), here, workers.STALE + 5, False),
            (ended.pid, here, 0.0, False),
            (ended.pid, "elsewhere", 0.0, True),
            (ended.pid, "elsewhere", workers.STALE + 5, False),
        ):
            path = sign(tmp_path, "k", pid=pid, host=host, age=age)
            assert (worker.taken() == {"k"}) == expected, (pid, host, age)
            assert path.exists() == expected
        sign(tmp_path, "k", pid=1, host=here).write_text("{")
        assert worker.taken() == set()


def test_a_worker_elsewhere_that_vanished_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "STALE", 1.0)
    monkeypatch.setattr(workers, "_TOUCH", 0.1)
    pool = Pool(4, tmp_path)
    sign(tmp_path, "k2", pid=1, host="elsewhere")
    began = time.monotonic()
    pool.run(Share())
    assert [i for _, i in pool.log] == [0, 1, 3, 2]
    assert 0.5 < time.monotonic() - began < 10


def test_an_interrupted_worker_takes_its_sign_away(tmp_path: Path) -> None:
    worker = Worker(tmp_path, Share())

    def compute(i: int) -> bool:  # noqa: ARG001
        assert json.loads(next((tmp_path / "workers").glob("*")).read_text())["key"] == "k"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), worker.alive():
        worker.work(["k"], [0], lambda key: False, compute)  # noqa: ARG005
    assert not list((tmp_path / "workers").iterdir())
