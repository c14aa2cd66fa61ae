"""The sections of a recipe: one frozen model each; those of data sets, heads and methods stand with these."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, model_validator

from mgd.tables import labeled_amount

FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9._-]|\{seed\})*$")]
Positive = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Scales = Annotated[tuple[Annotated[float, Field(ge=0.01, le=8)], ...], Field(min_length=1)]


PUBLIC_SHARES = ("1/16", "1/8", "1/4", "1/2")


class Section(BaseModel):
    """Base of every recipe section: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __hash__(self) -> int:
        """Hash of its values, tables included."""
        return hash(self.model_dump_json())


class Run(Section):
    """`[run]`: name, seed and bookkeeping."""

    name: FolderName
    """Folder of the run below `output`; `{seed}` in it stands for the seed."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Draws the partition, the initial weights, the order and augmentation of images, CutMix boxes."""
    output: Text = "runs"
    """Folder that holds the runs, relative to the working directory."""
    log_every: Positive = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: Positive = 200
    """Steps between two resume points."""
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """CPU threads a process; 0 shares out the cores this machine lets us use."""
    compile: bool = False
    """Train through torch.compile: faster steps on a GPU, after minutes of compiling at the start."""
    tracker: Literal["trackio", "tensorboard", "wandb"] | None = None
    """Hand the lines of metrics.jsonl to this tracker too."""


class UnlabeledSection(Section):
    """`[data.unlabeled]`: a pool of unlabelled images beside the data set; give one of hub, parquet, webdataset."""

    hub: Text | None = None
    """Data set on the hub ("org/name")."""
    parquet: Text | None = None
    """Folder of *.parquet files, images as bytes."""
    webdataset: Text | None = None
    """Folder of *.tar files; the image column is then the suffix, e.g. "jpg"."""
    split: str = "train"
    """Split of a hub data set."""
    image_column: str = "image"
    """Column of the image."""
    streaming: bool = False
    """Read it as an endless stream, of any length, in place of all other unlabelled images."""
    buffer: Positive = 1000
    """Images that a reader of the stream holds in memory and shuffles."""

    @model_validator(mode="after")
    def _one_source(self) -> "UnlabeledSection":
        if sum(source is not None for source in (self.hub, self.parquet, self.webdataset)) != 1:
            raise ValueError("give one of hub, parquet and webdataset")
        return self

    @property
    def location(self) -> str:
        """Where it is, as the recipe says."""
        return self.hub or self.parquet or self.webdataset


class DataSection(Section):
    """Keys of `[data]` that every data set has; the readers in mgd/data/datasets.py add theirs."""

    same_everywhere: ClassVar[bool] = False
    """The images do not depend on where `root` is: a published data set."""
    name: str
    """Registered data set."""
    image_scale: Annotated[float, Field(ge=0.01, le=4)] = 1.0
    """Every image and mask is first resized by this factor (0.5 = half resolution)."""
    crop: Annotated[int, Field(ge=32)] = 512
    """Side of the square training crop, pixels."""
    scales: Scales = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
    """Random scale factors of the training augmentation."""
    flip: bool = True
    """Random horizontal flip."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Data loading processes a training process."""
    unlabeled: UnlabeledSection | None = None
    """`[data.unlabeled]`: more unlabelled images, as many as there are."""
    on_error: Literal["raise", "skip"] = "raise"
    """An image or mask that cannot be used ends the run before it starts, or is left out and listed."""

    @classmethod
    def image_keys(cls) -> list[str]:
        """Keys of a reader that say which images the data set has, beside its name and the pool's."""
        return [key for key in cls.model_fields if key not in DataSection.model_fields]


class Partition(Section):
    """`[partition]`: which training images are labelled."""

    protocol: Literal["random", "cps", "pseudoseg", "files"] = "random"
    """`random`: drawn by seed, the same on every machine. `cps`, `pseudoseg`: the public lists of VOC
    and Cityscapes. `files`: two lists of your own."""
    labeled: int | float | str | None = None
    """How many labelled images: a count (23), a share (0.0625) or a fraction ("1/16"); for the
    public lists a fraction; for `files` left out."""
    root: str | None = None
    """Folder that holds the public lists; left out, they are fetched once and checked by SHA-256."""
    labeled_list: str | None = None
    """`files`: text file with one labelled image a line, by id or path."""
    unlabeled_list: str | None = None
    """`files`: text file with one unlabelled image a line."""
    balanced: bool = False
    """Choose images so that every class is seen about as often (reads the masks of the pool)."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the draw; left out, the run's seed."""

    @model_validator(mode="after")
    def _fits_the_protocol(self) -> "Partition":
        lists = (self.labeled_list, self.unlabeled_list)
        if self.balanced and self.protocol != "random":
            raise ValueError(f'balanced is a way to draw; it does nothing with protocol = "{self.protocol}"')
        if self.protocol == "files":
            if None in lists or self.labeled is not None:
                raise ValueError('protocol = "files" needs labeled_list and unlabeled_list, and no labeled')
        elif lists != (None, None):
            raise ValueError('labeled_list and unlabeled_list belong to protocol = "files"')
        elif self.labeled is None:
            raise ValueError("labeled: missing")
        elif self.protocol == "random":
            labeled_amount(self.labeled, pool=1)
        elif self.labeled not in PUBLIC_SHARES:
            raise ValueError(f"labeled = {self.labeled!r} has no public list; choices: {', '.join(PUBLIC_SHARES)}")
        return self


class ModelSection(Section):
    """`[student]`: the network that this run trains (in a teacher's recipe: the teacher)."""

    backbone: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Any timm backbone that returns feature maps; a name, never an address that timm would fetch from."""
    pretrained: bool = True
    """Start from timm's ImageNet weights (fetched from the hub, or found in its cache)."""
    output_stride: Literal[8, 16, 32] = 16
    """Input pixels a cell of the deepest feature map."""
    multi_grid: tuple[Positive, ...] = ()
    """Dilations of the 3x3 convolutions in the blocks of a ResNet's last stage, e.g. [2, 4, 8]."""
    head: SerializeAsAny[Section]
    """Registered head by name, and its own keys."""


Networks = dict[str, SerializeAsAny[ModelSection]]
"""Type of a key of `[method]` that holds networks by name; each is a table like `[student]`, checked as that is."""


class Teacher(Section):
    """`[teachers.<name>]`: one frozen teacher, by the recipe that trains it or by its weights."""

    recipe: str | None = None
    """Recipe of the teacher; trained first when its run is not finished."""
    checkpoint: str | None = None
    """Folder with model.safetensors and config.json, or a hub id."""
    seed_offset: int = 0
    """Added to this run's seed, it is the seed of the teacher's run; the partition is always this run's."""

    @model_validator(mode="after")
    def _one_source(self) -> "Teacher":
        if (self.recipe is None) == (self.checkpoint is None):
            raise ValueError("give either recipe or checkpoint")
        return self


class TeacherCache(Section):
    """`[cache]`: the predictions that [teachers] mode = "cached" learns from; stages/cache_teachers.py makes them."""

    folder: FolderName = "teacher_cache-s{seed}"
    """Folder of the cache below [run] output; `{seed}` in it stands for the seed."""
    scales: Scales = (1.0,)
    """Sizes at which the teachers see an image; of several, the mean of what they predict counts."""
    flip: bool = False
    """Let them see the mirrored image too."""
    cell: Annotated[int, Field(ge=4, le=256)] = 16
    """Pixels a side over which `mgd` has logits and features averaged: smaller is closer to online, and larger on
    disk."""


class Optim(Section):
    """`[optim]`: optimiser, schedule, batch and length."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimiser; weight decay spares norms and biases in both."""
    lr: Annotated[float, Field(gt=0, le=1e30)]
    """Learning rate at step 0; it decays as (1 - step / steps) ** power."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD momentum."""
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 5e-4
    """Not applied to norms and biases."""
    power: Annotated[float, Field(ge=0)] = 0.9
    """Exponent of the poly schedule."""
    batch_size: Annotated[int, Field(gt=0, le=10**6)] = 8
    """Labelled images a step over all processes; as many mixed unlabelled ones come beside them."""
    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Length in passes over the larger of the labelled and unlabelled sets."""
    steps: Annotated[int, Field(gt=0, le=10**9)] | None = None
    """Length in optimiser steps, instead of epochs."""
    nonfinite: Literal["raise", "skip"] = "raise"
    """A loss that is not finite ends the run, or its step is skipped and counted."""
    sync_batchnorm: bool = False
    """On several GPUs: batch statistics over all processes' images."""

    @model_validator(mode="after")
    def _one_length(self) -> "Optim":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self

    @model_validator(mode="after")
    def _momentum_is_of_sgd(self) -> "Optim":
        # A run keeps all keys in its recipe, so the default may stand there.
        if self.name != "sgd" and self.momentum != type(self).model_fields["momentum"].default:
            raise ValueError(f"momentum is of name = 'sgd', {self.name!r} has none; leave it out, or at 0.9")
        return self


class Eval(Section):
    """`[eval]`: how val images are predicted, and what the result is compared with."""

    mode: Literal["whole", "slide"] = "whole"
    """Whole image at once, or a sliding window."""
    crop: Annotated[int, Field(ge=32)] | None = None
    """Side of the sliding window, pixels; left out, the training crop."""
    stride: Annotated[float, Field(ge=0.05, le=1)] = 2 / 3
    """Step of the window as a share of its side."""
    batch_size: Annotated[int, Field(gt=0, le=4096)] = 8
    """Images of one size predicted at once a process."""
    scales: Scales = (1.0,)
    """Test-time scales; of several, and of flip, the mean of the class probabilities counts."""
    flip: bool = False
    """Predict the mirrored image too."""
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between two evaluations while training, of which `best/` keeps the best; 0 = only at the end."""
    baselines: tuple[str, ...] = ()
    """Recipes whose results stand beside ours in the last table; trained first when missing."""


class Reference(Section):
    """`[reference]`: the result that this recipe is meant to reach; `stages/report.py` prints it beside ours."""

    miou: Annotated[float, Field(ge=0, le=100)]
    """Val mIoU, %."""
    source: str
    """Whose number it is."""
