"""What every stage does around its own work."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, stage_command

ENDLESS = "from mgd import cli; cli.run(lambda: [print('gain ±', flush=True) for _ in range(10**6)])"


def test_a_closed_pipe_and_an_ascii_terminal_give_no_traceback():
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    stage = [sys.executable, "-c", ENDLESS]
    with subprocess.Popen(stage, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=ROOT) as running:
        assert running.stdout.readline() == b"gain ?\n"
        running.stdout.close()  # as `| head -1` does
        assert running.wait(timeout=60) == 128 + 13
        assert running.stderr.read() == b""


@pytest.mark.parametrize("stage", sorted(path.name for path in (ROOT / "stages").glob("*.py")))
def test_ctrl_c_while_libraries_load_is_no_traceback(tmp_path, stage):
    (tmp_path / "torch.py").write_text(
        "import os, signal\nassert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'\nos.kill(os.getpid(), signal.SIGINT)\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    }
    ended = subprocess.run(
        stage_command(stage, "--help"),
        capture_output=True,
        text=True,
        env=env,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")
