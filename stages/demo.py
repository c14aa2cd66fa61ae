"""Show a model, or two side by side, on images that are uploaded or taken: a page for the browser.

python stages/demo.py --model runs/quickstart-s0 --compare runs/quickstart_supervised-s0
"""

import mgd.bootstrap  # noqa: F401

# isort: split

import importlib.util
import threading

from accelerate import Accelerator

from mgd import cli
from mgd.errors import Stopped, UserError
from mgd.models.segmenter import Segmenter


def main() -> None:
    """Load the models and serve the page until a signal comes."""
    flags = cli.Flags(description=__doc__.splitlines()[0])
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
