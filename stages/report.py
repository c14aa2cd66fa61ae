"""Tables and figures of finished runs: ours beside the recipe's reference, mean and spread over seeds.

python stages/report.py runs --output report
"""

import mgd.bootstrap  # noqa: F401

# isort: split

import re
from collections.abc import Sequence
from pathlib import Path

from mgd import cli
from mgd.cells import Cell, by_title, collect
from mgd.checks import usable_masked
from mgd.data.reading import load_splits
from mgd.errors import UserError
from mgd.experiment import predict_samples
from mgd.files import write_json, write_text
from mgd.markdown import markdown
from mgd.models.segmenter import load_segmenter
from mgd.pictures import evenly
from mgd.plots import plot_costs, plot_partitions, save_overlays
from mgd.report import as_csv, notes, result_rows, tables

MAX_COLUMNS = 12
ONLY_CSV = ("data", "crop", "backbone_gmacs", "reference_source")


def main() -> None:
    """Write report.md, report.csv and the figures, and print the tables."""
    flags = cli.Flags(description=__doc__.splitlines()[0])
    flags.add_argument("runs", nargs="*", default=["runs"], help="run folders, or folders that hold runs")
    flags.add_argument(
        "--output", default="report", metavar="DIR", type=cli.output_folder, help="where the files go (report)"
    )
    flags.add_argument(
        "--samples", type=cli.at_least(0), default=4, metavar="N", help="val images in the picture; 0 = no picture"
    )
    cli.json_flag(flags)
    args = flags.parse_args()
    cells, remarks = collect(args.runs)
    remarks = [f"left out: {line}" for line in remarks] + notes(cells)
    folder = Path(args.output)
    rows = result_rows(cells)

    # ---- tables ----
    parts = ["val mIoU in % of the last weights: mean ± sample standard deviation (n seeds; reference, difference)"]
    for title, table in tables(cells).items():
        parts.append(f"**{title}** (labelled / unlabelled)\n\n{markdown(table)}")
    scored = any(row["unlabeled_miou"] is not None for row in rows)
    hidden = {*ONLY_CSV, *(() if scored else (key for key in rows[0] if key.startswith("unlabeled_")))}
    narrow = [{key: value for key, value in row.items() if key not in hidden} for row in rows]
    legend = "unlabeled: of stages/evaluate.py --split unlabeled; " if scored else ""
    parts.append(
        "**All runs** (gain: over the supervised run of the same seeds, network, images, steps, batch, class balance "
        f"and OHEM, mean and spread; {legend}best_on_val was chosen on the images that it is reported on)\n\n"
        f"{markdown(narrow)}"
    )
    parts += [f"note: {line}" for line in remarks]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    write_text(folder / "report.csv", as_csv(rows))
    print("\n\n".join(parts))
    if args.json:
        write_json(Path(args.json), rows)

    # ---- figures ----
    groups = by_title(cells)
    plot_costs({title: list(map(_cost_point, members)) for title, members in groups.items()}, folder / "cost.png")
    lines: dict[str, dict[str, list]] = {title: {} for title in groups}
    for cell in cells:
        lines[cell.title].setdefault(cell.row_name, []).append((cell.num_labeled, cell.mean, cell.spread))
    plot_partitions(lines, folder / "partitions.png")
    for path in folder.glob("samples_*.png"):
        if re.fullmatch(r"samples_\d+\.png", path.name):
            path.unlink()  # of an earlier report, which may have had more tables
    written = ["report.md", "report.csv", "cost.png", "partitions.png"]
    for number, (title, members) in enumerate(groups.items()):
        if args.samples > 0:
            try:
                qualitative(members, args.samples, folder / f"samples_{number}.png")
                written.append(f"samples_{number}.png")
            except UserError as error:
                print(f"note: no picture of {title}: {error}")
    print(f"\n{folder}: {', '.join(written)}")


def _cost_point(cell: Cell) -> tuple[str, str, float, float, float | None]:
    """Return a point of `plot_costs`."""
    text = f"{cell.row_name}, {cell.num_labeled}"
    return cell.recipe.method.name, text, cell.cost["total"].gmacs, cell.mean, cell.spread


def qualitative(members: Sequence[Cell], samples: int, output: Path) -> None:
    """Draw what each method predicts on the same val images, on the partition that most methods have.

    Of more than `MAX_COLUMNS` the best are drawn.
    """
    partitions = [cell.partition for cell in members]
    chosen = [cell for cell in members if cell.partition == max(partitions, key=partitions.count)]
    chosen = sorted(chosen, key=lambda cell: cell.runs[0].metrics["miou"])[-MAX_COLUMNS:]
    first = chosen[0].recipe
    accelerator = cli.start(first)
    splits = load_splits(first.data)
    images = usable_masked(splits.val, splits.decoder, first.data, "validation", accelerator)
    indices = evenly(len(images), samples)
    pictures: list[tuple] = []
    titles, kinds = ["image", "truth"], list(map(_kind, chosen))
    for cell in chosen:
        run = cell.runs[0]
        network = load_segmenter(run.folder).to(accelerator.device)
        found = predict_samples(network, images, indices, cell.recipe, accelerator.device)
        pictures = pictures or [(image, label) for image, label, _ in found]
        pictures = [(*row, prediction) for row, (_, _, prediction) in zip(pictures, found, strict=True)]
        name = cell.recipe.method.name if kinds.count(_kind(cell)) == 1 else cell.row_name
        titles.append(f"{name}\n{cell.recipe.student.backbone}\nmIoU {run.metrics['miou']:.2f}")
    save_overlays(pictures, splits.classes, splits.colors, output, titles)


def _kind(cell: Cell) -> tuple[str, str]:
    """What tells most methods in a picture apart; where it does not, runs are named."""
    return cell.recipe.method.name, cell.recipe.student.backbone


if __name__ == "__main__":
    cli.run(main)
