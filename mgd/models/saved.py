"""Saved models: where one lies, and its `config.json`, read without its weights."""

import json
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mgd.errors import UserError, did_you_mean, one_line
from mgd.recipe import parse_model
from mgd.sections import ModelSection

FORMAT = 1


def find_model(source: str | Path, weights: bool = True, **download) -> Path:
    """Return the folder that holds `config.json`: `source`, its `model/`, or a hub snapshot, without weights or with.

    Raises:
        UserError: nothing of the kind is there.
    """
    for folder in (Path(source), Path(source) / "model"):
        if (folder / "config.json").is_file():
            return folder
    text = str(source)
    if (Path(source) / "recipe.toml").is_file():
        raise UserError(f"{source}: a run that is not finished; its command goes on with it, and writes model/")
    if Path(source).exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise UserError(
            f"{source}: no config.json there or in its model/; expected a run, a model folder or a hub id"
            + _beside(text)
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["config.json", "recipe.toml", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(text, allow_patterns=wanted, **download))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{source}: neither a folder here nor a model that the hub gives us ({type(error).__name__}){_beside(text)}"
        ) from error


def _beside(missing: str) -> str:
    """Name the runs and models in the folder where one was looked for."""
    folder = Path(missing).parent
    models = {path.parent for path in folder.glob("*/config.json")}
    runs = {path.parent.parent for path in folder.glob("*/model/config.json")}
    names = sorted(map(str, models | runs))
    return f"; {did_you_mean(missing, names)}" if names else ""


def model_section(source: str | Path) -> ModelSection:
    """Return the `[student]` section of a saved segmenter, without its weights.

    Raises:
        UserError: nothing there, or no configuration of ours.
    """
    path = find_model(source, weights=False) / "config.json"
    return parse_model(read_config(path)["model"], source=str(path))


class _Input(BaseModel):
    """Keys of `config.json` that say what pixels the network was trained on; older models lack them."""

    model_config = ConfigDict(allow_inf_nan=False)
    image_scale: Annotated[float, Field(gt=0, le=8)] = 1.0
    crop: Annotated[int, Field(gt=0)] | None = None
    mean: Annotated[list[float], Field(min_length=3, max_length=3)] | None = None
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)] | None = None


def read_config(path: Path) -> dict:
    """Return what a model's `config.json` holds, checked but for `model`, which `parse_model` checks.

    Raises:
        UserError: it cannot be read, or is no configuration of ours.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is no model's config.json")
    missing = [key for key in ("format", "model", "classes", "colors") if key not in config]
    if missing or config["format"] != FORMAT:
        raise UserError(
            f"{path}: not a model of this version (format {config.get('format')!r}, ours {FORMAT}); "
            "install the version of mgd that wrote it"
        )
    classes, colors = config["classes"], config["colors"]
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    painted = isinstance(colors, list) and all(isinstance(color, list) and len(color) == 3 for color in colors)
    painted = painted and all(type(part) is int and 0 <= part <= 255 for color in colors for part in color)
    if not (named and painted and len(classes) == len(colors) and isinstance(config["model"], dict)):
        raise UserError(f"{path}: classes must be names and colors as many [r, g, b] of 0 to 255")
    if not 1 <= len(classes) <= 255:
        raise UserError(f"{path}: {len(classes)} classes; a mask holds 1 to 255")
    beside = path.parent / "recipe.toml"
    if "image_scale" not in config and beside.exists():  # as models were written before
        try:
            data = tomllib.loads(beside.read_text(encoding="utf-8"))["data"]
            config |= {key: data[key] for key in ("image_scale", "crop") if key in data}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{beside} cannot be read: {one_line(error)}") from error
    try:
        return config | _Input.model_validate(config).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {first['loc'][0]} = {config[first['loc'][0]]!r}: {first['msg']}") from error
