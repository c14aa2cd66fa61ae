"""A recipe file as JSON Schema, for editors."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, create_model

from mgd.recipe import Eval, ModelSection, Optim, Partition, Reference, Run, Section, Teacher, TeacherCache
from mgd.registry import DATASETS, HEADS, METHODS


class _TeacherTables(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Teacher]
    mode: Literal["online", "cached"] = "online"


def json_schema() -> dict[str, Any]:
    """Return a JSON Schema of a recipe file, the built-in data sets, heads and methods included."""

    def choice(models: list[type[Section]]) -> Any:
        union = models[0]
        for model in models[1:]:
            union = union | model
        return union

    heads = choice([HEADS.get(name).Config for name in HEADS.names()])
    model = create_model(
        "Recipe",
        __config__=ConfigDict(extra="forbid"),
        run=(Run, ...),
        data=(choice([DATASETS.get(name) for name in DATASETS.names()]), ...),
        partition=(Partition, ...),
        student=(create_model("Student", __base__=ModelSection, head=(heads, ...)), ...),
        method=(choice([METHODS.get(name).Config for name in METHODS.names()]), ...),
        optim=(Optim, ...),
        eval=(Eval, Eval()),
        teachers=(_TeacherTables, {}),
        cache=(TeacherCache, TeacherCache()),
        reference=(Reference | None, None),
    )
    return model.model_json_schema()
