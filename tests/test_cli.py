"""What every stage does around its own work."""

import os
import subprocess
import sys

from conftest import ROOT

ENDLESS = "from mgd import cli; cli.run(lambda: [print('gain ±', flush=True) for _ in range(10**6)])"


def test_a_closed_pipe_and_an_ascii_terminal_give_no_traceback():
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    stage = [sys.executable, "-c", ENDLESS]
    with subprocess.Popen(stage, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=ROOT) as running:
        assert running.stdout.readline() == b"gain ?\n"
        running.stdout.close()  # as `| head -1` does
        assert running.wait(timeout=60) == 128 + 13
        assert running.stderr.read() == b""
