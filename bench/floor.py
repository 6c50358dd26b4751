"""The floor under any merge: read every input byte, write as many bytes as the output has, nothing else.

Two threads, their buffers reused; --fsync makes the output durable, as a merge on disk must.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK = 1 << 20


def read_and_write(jobs: list[tuple[int, int, int]], out: int, begin: int, end: int) -> int:
    """Reads the chunks (descriptor, offset, size) and writes bytes begin..end of the output among them."""
    buffer = memoryview(bytearray(CHUNK))
    at, read = begin, 0
    for number, (fd, offset, size) in enumerate(jobs, 1):
        done = 0
        while done < size:
            done += os.preadv(fd, [buffer[done:size]], offset + done)
        read += done
        due = begin + (end - begin) * number // len(jobs)
        while at < due:
            at += os.pwrite(out, buffer[: min(CHUNK, due - at)], at)
    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("inputs", type=Path, nargs="+", help="files, or folders of safetensors files")
    parser.add_argument("--write", type=int, required=True, help="bytes of the output")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fsync", action="store_true")
    given = parser.parse_args()
    began = time.perf_counter()
    files = [
        f for path in given.inputs for f in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])
    ]
    fds = [os.open(file, os.O_RDONLY) for file in files]
    sizes = [os.fstat(fd).st_size for fd in fds]
    jobs = [
        (fd, offset, min(CHUNK, size - offset))
        for fd, size in zip(fds, sizes, strict=True)
        for offset in range(0, size, CHUNK)
    ]
    out = os.open(given.out, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    n = given.threads
    with ThreadPoolExecutor(n) as pool:
        parts = [
            pool.submit(read_and_write, jobs[t::n], out, given.write * t // n, given.write * (t + 1) // n)
            for t in range(n)
        ]
        read = sum(part.result() for part in parts)
    if given.fsync:
        os.fsync(out)
    os.close(out)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "bytes_read": read, "bytes_written": given.write}))


if __name__ == "__main__":
    main()
