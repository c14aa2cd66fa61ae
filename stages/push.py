"""Push a finished run to the Hugging Face hub: weights, card, recipe and metrics, in one commit.

python stages/push.py --run runs/quickstart-s0 --repo org/name --private
"""

import mgd.bootstrap  # noqa: F401

# isort: split

from pathlib import Path

from mgd import cli
from mgd.hub import open_run, push, write_folder


def main() -> None:
    """Push one run, or write what would be pushed."""
    flags = cli.Flags(description=__doc__.splitlines()[0])
    flags.add_argument("--run", required=True, metavar="DIR", help="folder of a finished run")
    flags.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository; made if it is not there")
    flags.add_argument(
        "--private",
        action="store_true",
        help="make it private; overlays.png shows val images, which may not be yours to publish",
    )
    flags.add_argument(
        "--license", metavar="ID", help="of the weights, e.g. apache-2.0; left out, the card states none"
    )
    flags.add_argument(
        "--dry-run", metavar="DIR", type=cli.output_folder, help="only write the files into an empty folder"
    )
    args = flags.parse_args()
    if args.dry_run:
        write_folder(open_run(Path(args.run)), args.repo, args.license, Path(args.dry_run))
        print(f"{args.dry_run}: what would be pushed to {args.repo}")
    else:
        print(push(Path(args.run), args.repo, args.private, args.license))


if __name__ == "__main__":
    cli.run(main)
