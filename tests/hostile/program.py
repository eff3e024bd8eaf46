"""Runs the program in forks of a process that has imported it, which is ten times as fast as new processes."""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Forks for each line of JSON. Prints the pid, then how the process ended.
_SERVER = """
import json, os, sys, traceback
import faulting
from converter.cli.main import convert

faulting.warm_up()
os.fsync = lambda fd: None

def become(arguments, cwd, out, err):
    os.chdir(cwd)
    for fd, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), fd)
    sys.argv = ["dsocr-convert", *arguments]
    code = 1
    try:
        code = convert()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    child = os.fork()
    if not child:
        become(*json.loads(line))
    print(child, flush=True)
    _, status, usage = os.wait4(child, 0)
    seconds = usage.ru_utime + usage.ru_stime
    print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, seconds]), flush=True)
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str
    peak: int  # bytes
    seconds: float  # of the processor


def run(command: Sequence[str | Path], cwd: Path, limit: float) -> Done:
    """Run the program; TimeoutError if it takes more seconds than the limit, by the processor's time."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    answers, requests = server.stdout, server.stdin
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        job = [[os.fspath(word) for word in command], str(cwd), str(out), str(err)]
        requests.write(json.dumps(job).encode() + b"\n")
        child = int(answers.readline())
        # Other processes may take the processor, but not for ever.
        if not select.select([answers], [], [], 10 * limit)[0]:
            os.kill(child, signal.SIGKILL)
        code, peak, seconds = json.loads(answers.readline())
        if code == -signal.SIGKILL or seconds > limit:
            raise TimeoutError(f"more than {limit} s: {command}")
        return Done(code, out.read_text(), err.read_text(), peak, seconds)


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    # Unbuffered: `select` does not see data in a buffer.
    return subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
