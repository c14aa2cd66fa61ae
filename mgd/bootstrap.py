"""What a stage sets up before it loads anything else: its first import."""

import os
import signal
import sys

# The script's folder stands first on the search path and would hide packages, as stages/evaluate.py does `evaluate`.
if os.path.isfile(sys.argv[0]):  # and not what __main__ is, under a profiler
    _FOLDER = os.path.dirname(os.path.realpath(sys.argv[0]))
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != _FOLDER]

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads; spinning starves the data workers

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until cli.run: Ctrl-C while torch loads is no traceback
