"""The JSON Schema of recipes, and the command that checks them: `python -m mgd.schema`."""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, create_model

from mgd.errors import UserError
from mgd.needed import needed_recipes
from mgd.recipe import load, network_keys
from mgd.registry import DATASETS, HEADS, METHODS
from mgd.sections import Eval, ModelSection, Optim, Partition, Reference, Run, Section, Teacher, TeacherCache


class _TeacherTables(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Teacher]
    mode: Literal["online", "cached"] = "online"


def json_schema() -> dict[str, Any]:
    """Return a JSON Schema of a recipe file, with all data sets, heads and methods, those of plug-ins included."""

    def choice(models: list[type[Section]]) -> Any:
        union = models[0]
        for model in models[1:]:
            union = union | model
        return union

    heads = choice([head.Config for head in HEADS.usable().values()])
    student = create_model("Student", __base__=ModelSection, head=(heads, ...))

    def described(config: type[Section]) -> type[Section]:
        """Return a method's keys, the heads of its networks described."""
        networks = {key: (dict[str, student], config.model_fields[key]) for key in network_keys(config)}
        return create_model(config.__name__, __base__=config, **networks) if networks else config

    model = create_model(
        "Recipe",
        __config__=ConfigDict(extra="forbid"),
        run=(Run, ...),
        data=(choice(list(DATASETS.usable().values())), ...),
        partition=(Partition, ...),
        student=(student, ...),
        method=(choice([described(method.Config) for method in METHODS.usable().values()]), ...),
        optim=(Optim, ...),
        eval=(Eval, Eval()),
        teachers=(_TeacherTables, {}),
        cache=(TeacherCache, TeacherCache()),
        reference=(Reference | None, None),
    )
    return model.model_json_schema()


def main(argv: Sequence[str] | None = None) -> None:
    """Print the JSON Schema, or check the recipes that are named."""
    parser = argparse.ArgumentParser(prog="python -m mgd.schema", description="Check recipes, or print their schema.")
    parser.add_argument("recipes", nargs="*", help="recipes to check")
    parser.add_argument("--schema", action="store_true", help="print a JSON Schema for editors")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one key of each"
    )
    args = parser.parse_args(argv)
    if args.schema:
        print(json.dumps(json_schema(), indent=2))
    elif not args.recipes:
        parser.error("name a recipe, or --schema")
    wrong = 0
    for name in args.recipes:
        try:
            needed_recipes(load(name, args.set))
            print(f"{name}: ok")
        except UserError as error:
            wrong += 1
            print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
    sys.exit(2 if wrong else 0)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` has seen enough
    main()
