"""Show a model, or two side by side, on images that are uploaded or taken: a page for the browser.

python stages/demo.py --model runs/quickstart-s0 --compare runs/quickstart_supervised-s0
"""

import argparse
import os
import signal
import sys

# This folder stands first on sys.path when a stage is started as a script, and would hide packages.
sys.path[:] = [p for p in sys.path if os.path.realpath(p) != os.path.dirname(os.path.realpath(__file__))]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads; spinning starves the workers
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until cli.run: Ctrl-C while torch loads is no traceback

import importlib.util  # noqa: E402
import threading  # noqa: E402

from accelerate import Accelerator  # noqa: E402

from mgd import cli  # noqa: E402
from mgd.errors import Stopped, UserError  # noqa: E402
from mgd.models.segmenter import Segmenter  # noqa: E402


def main() -> None:
    """Load the models and serve the page until a signal comes."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--model", required=True, help="run folder, model folder or hub id")
    flags.add_argument("--compare", help="a second one, shown beside it")
    flags.add_argument("--port", type=cli.at_least(1), default=7860, help="of the page, on this machine")
    args = flags.parse_args()
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the demo needs gradio: pip install -e '.[demo]'")
    from mgd.demo import build

    device = Accelerator().device
    models = [(name, Segmenter.from_pretrained(name).to(device)) for name in (args.model, args.compare) if name]
    page = build(models)
    try:
        quiet = {"share": False, "run_history": False, "footer_links": [], "quiet": True}
        page.launch(server_port=args.port, ssr_mode=False, prevent_thread_lock=True, **quiet)
    except (OSError, OverflowError) as error:
        raise UserError(f"port {args.port} cannot be used; choose another by --port") from error
    print(f"{page.local_url} shows the page; Ctrl-C ends it", flush=True)
    try:
        threading.Event().wait()
    except Stopped:  # the one way to end it
        print("the page is closed", flush=True)
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    cli.run(main)
