"""Faults from outside: killed or failed at every call that changes the disk, disk full, second runs.

The promise: after any fault the same command again gives the same bytes, and what stands at the
output path is complete at every moment. `strace` injects the faults into the unmodified program.
"""

from __future__ import annotations

import collections
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commit_script import NAMES, PLAN, run

import pymerge.errors
from pymerge.checkpoint.manifest import MANIFEST_NAME
from pymerge.checkpoint.staging import LOCK_NAME, Staging
from pymerge.errors import OutputError, PymergeError

HERE = Path(__file__).parent
SCRIPT = HERE / "commit_script.py"
PYTHON = (sys.executable, "-S", "-B")  # no site packages: they cost time and the protocol needs none
CALLS = ("pwrite64", "fsync", "rename", "unlink", "fallocate", "mkdir", "ftruncate", "flock")
FAILS_FOR_SPACE = {"pwrite64", "fallocate", "mkdir"}
ENVIRONMENT = {
    "PYTHONPATH": f"{Path(pymerge.errors.__file__).parents[1]}:{HERE}",
    "PATH": os.environ.get("PATH", ""),
}


def strace(*options: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = ["strace", "-f", "-qq", *options, *PYTHON, str(SCRIPT), str(out)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of runs flush every file."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines of a whole run under strace; skips visibly where tracing is impossible."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    folder = tmp_path_factory.mktemp("traced")
    names = ",".join(f"?{call}" for call in CALLS)
    subprocess.run([*PYTHON, str(SCRIPT), str(folder / "plain")], env=ENVIRONMENT, check=True)
    done = strace("-y", "-o", str(folder / "log"), "-e", f"trace={names}", out=folder / "out")
    if done.returncode or not (folder / "out").is_dir():
        pytest.skip(f"strace cannot trace here: {done.stderr.strip()[:200]}")
    return (folder / "log").read_text().splitlines()


def call_of(line: str) -> str | None:
    found = re.match(r"\d+ +(\w+)\(", line)
    return found[1] if found else None


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_staging(folder: Path, expected: dict[str, bytes]) -> None:
    """What looks finished in the staging folder is finished."""
    found = files(folder) if folder.is_dir() else {}
    for name in NAMES:
        if name + ".done" in found or MANIFEST_NAME in found:
            assert found[name] == expected[name]
    if MANIFEST_NAME in found:
        assert {name: found.get(name) for name in expected} == expected


def injections(lines: list[str]) -> list[tuple[str, int, str]]:
    """(call, which one, what): kill and EIO at every call, ENOSPC where the kernel may say so."""
    counts = collections.Counter(map(call_of, lines))
    assert counts["fsync"] >= 18
    points = []
    for call in CALLS:
        errors = ["signal=KILL", "error=EIO"] + ["error=ENOSPC"] * (call in FAILS_FOR_SPACE)
        points += [(call, number, what) for number in range(1, counts[call] + 1) for what in errors]
    return points


@pytest.mark.slow
def test_every_fault_is_survived(traced: list[str], place: Path) -> None:
    run(place / "expected")
    expected = files(place / "expected")
    out, staging = place / "out", place / "out.partial"
    visible = 0
    for call, number, what in injections(traced):
        where = f"{call} number {number}, {what}"
        done = strace(
            "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{what}:when={number}", out=out
        )
        if what == "signal=KILL":
            assert done.returncode == -signal.SIGKILL, where
        elif done.returncode:  # an error may be harmless, but one that matters is told in a sentence
            assert done.stderr.startswith("error: "), f"{where}: {done.stderr}"
        else:
            assert out.is_dir(), where
        if out.exists():
            visible += 1
            assert files(out) == expected, where
        check_staging(staging, expected)
        try:
            run(out)
        except PymergeError as error:
            pytest.fail(f"{where}: the second run says {error}")
        assert files(out) == expected, where
        assert not staging.exists(), where
        shutil.rmtree(out)
    assert visible >= 4  # the faults after the last rename


def test_killed_twice(traced: list[str], place: Path) -> None:
    """The resumed run is killed as well, at a third of its calls and with every call of the clean-up."""
    run(place / "expected")
    expected = files(place / "expected")
    out = place / "out"
    for first, second in [(3, 2), (6, 4), (9, 6), (12, 5), (15, 3), (17, 2), (20, 2)]:
        for number in (first, second):
            strace(
                "-o",
                "/dev/null",
                "-e",
                "trace=fsync",
                "-e",
                f"inject=fsync:signal=KILL:when={number}",
                out=out,
            )
            check_staging(place / "out.partial", expected)
        run(out)
        assert files(out) == expected
        shutil.rmtree(out)


def test_everything_is_flushed_before_what_vouches_for_it(traced: list[str]) -> None:
    """Against power loss: a file is flushed before its rename, a folder before the next marker's."""
    dirty_files: set[str] = set()
    dirty_folders: set[str] = set()
    renames = 0
    for line in traced:
        call = call_of(line)
        path = re.search(r"\(\d+<([^>]*)>", line)
        if call in ("pwrite64", "ftruncate", "fallocate") and path and not path[1].endswith(LOCK_NAME):
            dirty_files.add(path[1])
        elif call == "fsync" and path:
            dirty_files.discard(path[1])
            dirty_folders.discard(path[1])
        elif call == "rename":
            source, target = re.findall(r'"([^"]*)"', line)[:2]
            renames += 1
            assert source not in dirty_files, f"{source} was renamed before it was flushed"
            if target.endswith((".done", MANIFEST_NAME, "/out")):
                assert not dirty_folders, f"{dirty_folders} not flushed before {target}"
                assert not dirty_files, f"{dirty_files} not flushed before {target}"
            dirty_folders.add(os.path.dirname(target))
        elif call in ("mkdir", "unlink"):
            changed = re.search(r'"([^"]*)"', line)
            assert changed
            if not changed[1].endswith((".part", "/out/" + LOCK_NAME)):
                dirty_folders.add(os.path.dirname(changed[1]))
    assert renames == 9  # plan, 2 shards, 2 records, 2 side files, manifest, folder
    assert dirty_folders == set()


def test_files_are_created_whole_and_exclusively(place: Path, traced: list[str]) -> None:
    done = strace("-o", str(place / "log"), "-e", "trace=openat", out=place / "out")
    assert done.returncode == 0
    written = [
        line for line in (place / "log").read_text().splitlines() if "O_CREAT" in line and "/out" in line
    ]
    parts = [line for line in written if '.part"' in line]
    assert len(parts) == 8
    assert all("O_EXCL" in line and "O_CLOEXEC" in line and "0666" in line for line in parts)
    assert [line for line in written if line not in parts and f'{LOCK_NAME}"' not in line] == []


# Space that really runs out.


def start_with(prepare: Callable[[], None], out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PYTHON, str(SCRIPT), str(out)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=prepare,
    )


@pytest.mark.parametrize("limit", [0, 10, 400, 9_000])
def test_file_size_limit(limit: int, place: Path) -> None:
    done = start_with(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), place / "out")
    assert done.returncode == 1
    assert re.fullmatch(r"error: /\S+: cannot be written: File too large\n", done.stderr)
    assert os.listdir(place) == []
    run(place / "out")


def test_full_disk(place: Path) -> None:
    """On a filesystem of 16 KiB the first shard is refused before a byte of it is written."""
    script = (
        f"mount -t tmpfs -o size=16k tmpfs {place} || exit 77;"
        f" {' '.join(PYTHON)} {SCRIPT} {place}/out; code=$?; ls -A {place}; exit $code"
    )
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no private mounts here: {done.stderr.strip()}")
    assert done.returncode == 1
    words = r"No space left on device, (\d+) bytes are needed, (\d+) bytes are free"
    found = re.search(words, done.stderr)
    assert found, done.stderr
    assert int(found[1]) > int(found[2])
    assert done.stdout == ""


# Other processes.

HOLD = """
import sys, time
from pathlib import Path
from commit_script import NAMES, PLAN, Staging, layout, write_shard

staging = Staging.open(Path(sys.argv[1]), PLAN)
write_shard(staging, layout(NAMES[0]))
staging.create(layout(NAMES[1]))
print("ready", flush=True)
time.sleep(60)
"""


def test_second_process_and_stale_lock(place: Path) -> None:
    out = place / "out"
    command = [*PYTHON, "-c", HOLD, str(out)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "ready\n"
        before = files(place / "out.partial")
        with pytest.raises(OutputError, match=f"another run is writing it .'pid {holder.pid} on "):
            Staging.open(out, PLAN)
        assert files(place / "out.partial") == before
        holder.kill()
    with Staging.open(out, PLAN) as staging:
        assert os.listdir(place) == ["out.partial"]
        assert NAMES[0] in os.listdir(staging.folder)
    run(out)
    assert set(os.listdir(out)) == {*NAMES, "config.json", "README.md", MANIFEST_NAME}


def test_killed_at_random_moments(place: Path) -> None:
    """No tracing here: runs killed by the clock, each resuming the one before."""
    run(place / "expected")
    expected = files(place / "expected")
    out = place / "out"
    interrupted = 0
    for number in range(25):
        with subprocess.Popen([*PYTHON, str(SCRIPT), str(out)], env=ENVIRONMENT) as process:
            deadline = time.monotonic() + 10
            while not (place / "out.partial").exists() and not out.exists():
                assert time.monotonic() < deadline
            time.sleep(0.0002 * number)
            process.kill()
        check_staging(place / "out.partial", expected)
        if out.exists():
            assert files(out) == expected
            shutil.rmtree(out)
        else:
            interrupted += 1
    assert interrupted > 0
    run(out)
    assert files(out) == expected


def test_read_only_place(place: Path) -> None:
    place.chmod(0o755)
    (place / "locked").mkdir(mode=0o555)
    with not_root(), pytest.raises(OutputError) as caught:
        run(place / "locked" / "out")
    assert str(caught.value) == f"{place}/locked/out: cannot be written: Permission denied"
    assert os.listdir(place / "locked") == []


@contextmanager
def not_root() -> Iterator[None]:
    """Root may write everywhere; be nobody for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
