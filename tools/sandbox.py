"""Run a Python program where it can do no harm: for measuring HumanEval, not part of the package.

    from tools.sandbox import sandbox
    open_benchmark("humaneval", path, sandbox=sandbox)

``sandbox(program, seconds)`` answers whether the program ended without an error in time. It runs as
a process of its own in new user, network, process and mount namespaces (``unshare``): without
network, without sight of other processes, with every file read-only and data folders empty, in a
folder in memory, with an empty environment and with limits on CPU time, memory, file size and
number of processes. Before the first program a probe tries to write and to connect; where it can,
or where namespaces are not available, nothing is run. It is no defence against an attacker who
breaks out of Linux namespaces; use a virtual machine for code that may be hostile on purpose.
"""

from __future__ import annotations

import functools
import resource
import shutil
import subprocess
import tempfile

MEMORY = 1 << 30
FILE_SIZE = 1 << 20
PROCESSES = 64
# Folders with people's data, covered by empty file systems; all else is read-only.
HIDDEN = ("/home", "/root", "/mnt", "/media", "/srv", "/var", "/work", "/tmp", "/run")
_ISOLATED = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--ipc", "--mount",
             "--fork", "--kill-child")  # fmt: skip
_ENTER = "; ".join(
    [
        "set -e",
        *(f"if [ -d {path} ]; then mount -t tmpfs -o size=4m none {path}; fi" for path in HIDDEN),
        "mount -o remount,bind,ro /",
        "mount -t proc none /proc",
        "cd /tmp",
        f"ulimit -u {PROCESSES} || true",
        'exec "$0" -I -',
    ]
)
_PROBE = """
import socket
for path in ("/etc", "/usr"):
    try:
        open(path + "/probe-of-sandbox", "w").close()
    except OSError:
        continue
    raise SystemExit("files can be written")
try:
    socket.create_connection(("192.0.2.1", 9), timeout=1)
except OSError as error:
    if error.errno == 101:
        raise SystemExit(0)
raise SystemExit("there is a network")
"""


@functools.cache
def require_isolation() -> None:
    """Refuse to go on where a process cannot be isolated.

    Raises:
        RuntimeError: There is no ``unshare``, this user may make no namespaces, or a program in
            them can still write files or reach a network.
    """
    if shutil.which("unshare") is None:
        raise RuntimeError("There is no unshare (util-linux) here, so no code is run.")
    code, said = _run(_PROBE, 30.0)
    if code != 0:
        raise RuntimeError(f"Programs cannot be isolated here, so none is run: {said[-300:]}")


def _python() -> str:
    """An interpreter outside the hidden folders."""
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")
    if python is None:
        raise RuntimeError("There is no python3 in /usr to run programs with.")
    return python


def _limit(seconds: float) -> None:
    cpu = max(1, round(seconds))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _run(program: str, seconds: float) -> tuple[int, str]:
    with tempfile.TemporaryFile() as errors:
        done = subprocess.run(
            [*_ISOLATED, "sh", "-c", _ENTER, _python()],
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", "OMP_NUM_THREADS": "1"},
            input=program.encode("utf-8", "replace"),
            stdout=subprocess.DEVNULL,
            stderr=errors,
            timeout=seconds,
            preexec_fn=functools.partial(_limit, seconds),
        )
        errors.seek(0)
        return done.returncode, errors.read(10_000).decode("utf-8", "replace").strip()


def sandbox(program: str, seconds: float) -> bool:
    """Whether a program ends without an error, within the time."""
    require_isolation()
    try:
        return _run(program, seconds)[0] == 0
    except subprocess.TimeoutExpired:
        return False
