"""Who does what: shares of the work, signs of life, and taking over.

A study's work is a list of units, each with a key in the store; the list depends on the settings
and the cases alone, so all workers have the same one. Worker i of n first does the units whose
number is i modulo n, in order, and then takes what is still missing of the others' shares, the last
first. Whoever computes a unit, the result is the same, so nothing has to be agreed on.

Each worker leaves a sign of life, a small file in the store's folder ``workers`` that names the
unit it is at and is touched every few seconds. A unit that a living worker is at is not begun by
another; if nothing else is missing, the others wait for it. A worker counts as dead once its file
is older than STALE seconds, or at once if its process is gone and ran on this machine. So a missing
or killed worker delays the others by at most that time, and costs at most the unit it was at.

Times are compared between files of the one folder, so clocks of machines need not agree.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from ..files import atomic_path

STALE = 30.0
_TOUCH = 3.0
_POLL = 0.2


@dataclass(frozen=True)
class Share:
    """Which part of the work a worker does first.

    Attributes:
        index: Its number, from 0.
        of: How many workers there are.
        device: Its number on its machine, which chooses the GPU.

    Raises:
        ValueError: ``index`` is not below ``of``, or negative.
    """

    index: int = 0
    of: int = 1
    device: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise ValueError(
                f"shard {self.index}/{self.of} does not exist: shards of {self.of} are "
                f"0/{max(self.of, 1)} to {max(self.of, 1) - 1}/{max(self.of, 1)}."
            )

    @classmethod
    def of_text(cls, text: str) -> Share:
        """A share written "i/n", as ``--shard`` takes it.

        Args:
            text: Such as "0/4" to "3/4".

        Raises:
            ValueError: It is not written so, or there is no such share.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if not match:
            raise ValueError(f"shard {text!r} is not written i/n, such as 0/4, 1/4, 2/4 and 3/4.")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Share:
        """The share that torchrun, ``accelerate launch`` and their kin give to a process.

        They set RANK, WORLD_SIZE and LOCAL_RANK. Nothing else of theirs is used: no process group
        is opened, because in one a worker that dies would stop all others.

        Args:
            environment: Variables, such as ``os.environ``.

        Raises:
            ValueError: The variables are no numbers, or contradict each other.
        """
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            return cls()
        try:
            index, of = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            return cls(index, of, int(environment.get("LOCAL_RANK", "0")))
        except ValueError as error:
            raise ValueError(
                f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, and together a share: "
                f"{error}. Unset them, or give --shard i/n."
            ) from None
        except KeyError as error:
            raise ValueError(
                f"RANK and WORLD_SIZE go together, but {error} is not set; start the study with "
                "accelerate launch or torchrun, or give --shard i/n."
            ) from None

    def first(self, number: int) -> bool:
        """Whether unit ``number`` is in this share."""
        return number % self.of == self.index


class Worker:
    """One worker's sign of life, and what it knows of the others.

    Args:
        folder: The store's folder.
        share: Its share.
    """

    def __init__(self, folder: Path, share: Share) -> None:
        self.share = share
        self._folder = folder / "workers"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._folder / f"{uuid4().hex}.json"
        self._host = socket.gethostname()
        self._ended = threading.Event()
        self._key = ""

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Give signs of life while the block runs, and take them away afterwards."""
        self.at("")
        thread = threading.Thread(target=self._touch, name="sign of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            self._file.unlink(missing_ok=True)

    def at(self, key: str) -> None:
        """Say which unit this worker is at."""
        self._key = key
        text = json.dumps({"key": key, "host": self._host, "pid": os.getpid()})
        with atomic_path(self._file) as temporary:
            temporary.write_text(text, "utf-8")

    def _touch(self) -> None:
        while not self._ended.wait(_TOUCH):
            with suppress(FileNotFoundError):
                os.utime(self._file)

    def taken(self) -> set[str]:
        """The units that other living workers are at."""
        try:
            os.utime(self._file)
        except FileNotFoundError:  # this process was stopped for long, and taken for dead
            self.at(self._key)
        now, keys = self._file.stat().st_mtime, set()
        for path in self._folder.glob("*.json"):
            if path == self._file:
                continue
            # A file that vanishes, or is just being replaced, is of a worker that goes on.
            with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                age = now - path.stat().st_mtime
                data = json.loads(path.read_text("utf-8"))
                if age > STALE or (data["host"] == self._host and not _runs(data["pid"])):
                    path.unlink(missing_ok=True)
                elif data["key"]:
                    keys.add(data["key"])
        return keys

    def work(
        self,
        keys: Sequence[str],
        numbers: Sequence[int],
        is_done: Callable[[str], bool],
        compute: Callable[[int], bool],
        seen: Callable[[int], None] = lambda missing: None,  # noqa: ARG005
    ) -> None:
        """Do this worker's share of some units, and then what is missing of the others'.

        It returns when every unit is done or has failed here.

        Args:
            keys: Key of each unit.
            numbers: Number of each unit, which decides whose share it is in.
            is_done: Whether a key's result is in the store, and can be read.
            compute: Computes the unit at that place in ``keys`` and stores it; False if it failed.
            seen: Called with the number of units that are missing, now and then.
        """
        own = [i for i, number in enumerate(numbers) if self.share.first(number)]
        rest = [i for i, number in enumerate(numbers) if not self.share.first(number)]
        queue, failed = own + rest[::-1], set[int]()
        while True:
            queue = [i for i in queue if i not in failed and not is_done(keys[i])]
            seen(len(queue))
            if not queue:
                return
            if not self._pass_through(queue, keys, is_done, compute, failed, seen):
                time.sleep(_POLL)

    def _pass_through(
        self,
        queue: list[int],
        keys: Sequence[str],
        is_done: Callable[[str], bool],
        compute: Callable[[int], bool],
        failed: set[int],
        seen: Callable[[int], None],
    ) -> bool:
        """Compute what nobody is at; whether there was anything."""
        computed = False
        for place, i in enumerate(queue):
            # In this order: a result is there before its worker stops naming it.
            if keys[i] in self.taken() or is_done(keys[i]):
                continue
            self.at(keys[i])
            try:
                if not compute(i):
                    failed.add(i)
            finally:
                self.at("")
            computed = True
            seen(len(queue) - place - 1)
        return computed


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user
        return True
    return True
