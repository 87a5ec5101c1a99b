"""A run's recipe: YAML checked against a schema, with `key.path=value` overrides from the command line."""

import difflib
import hashlib
import json
import os
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from erann_dist import SAMPLE_RATE
from erann_dist.errors import UsageError, require_no_credentials
from erann_dist.formats import strict_json, strict_yaml
from erann_dist.models.base import Initialisation
from erann_dist.models.mel_config import PAD_SAMPLES
from erann_dist.models.spec import model_name

CacheForm = Literal["flac", "pcm"]  # as the clip is stored in its tar; or decoded, which is twice the size


class Section(BaseModel):
    """A section of a recipe; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Section)


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"input should be a number, not {str(value).lower()}")
    return value


def _path(path: str) -> str:
    """The path with the user's home in place of ~; URLs as they are."""
    if any(ord(character) < 32 for character in path):
        raise ValueError("input should be a path without control characters")
    try:
        require_no_credentials(path)
    except UsageError as error:
        raise ValueError(str(error)) from None
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError(
            f"there is no home folder for {path.partition('/')[0]}; write ./{path} for a folder of that name"
        )
    return found


# Every number has an upper bound, far above any sensible value: a typo fails at once instead of exhausting the memory.
Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
PathText = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_path)]
MANY = 10**12  # examples, steps
MAX_THREADS = 1024
MAX_WORKERS = 10_000
MAX_SECONDS = 1e7  # four months, for time limits
MAX_FOLD = 127  # the manifest's column is of 8 bits


class ModelSection(Section):
    variant: Annotated[str, AfterValidator(model_name)]  # ERANN-<s_m>-<width>, CNN14 or CNN14-ERANN
    init: PathText = "none"  # a model folder, or a run's, whose weights training starts from
    # The layers that are reinitialised nevertheless. The paper: "the last layers", which may be fc2 alone or fc1 too.
    fresh: list[str] = Field(["fc2"], max_length=1000)
    initialisation: Initialisation = "he"  # of the reinitialised layers; the paper does not give its own


class DataSource(Section):
    """A shard set, or a part of it: one split, some folds, or the clips of a key list. A plain string is its url."""

    url: PathText
    split: str | None = None
    fold: list[Annotated[Whole, Field(ge=0, le=MAX_FOLD)]] | None = Field(None, max_length=MAX_FOLD + 1)
    keys: PathText | None = None  # a text file with a key per line: only these clips
    without: PathText | None = None  # the same format: all clips except these

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Sources = Annotated[list[DataSource], BeforeValidator(_as_list), Field(min_length=1, max_length=10_000)]


class CacheSection(Section):
    dir: PathText  # on a disk of the node
    max_bytes: Annotated[ByteSize, BeforeValidator(_number)] = Field(gt=0, le=10**18)
    format: CacheForm = "flac"


class DataSection(Section):
    train: Sources
    eval: Sources
    crop_s: Real = Field(8.0, gt=0, le=600)  # length of a training crop; shorter clips are zero-padded
    sampling: Literal["balanced", "uniform", "sequential"] = "balanced"
    loader_threads: Whole = Field(2, ge=1, le=MAX_THREADS)
    cache: CacheSection | None = None
    max_bad_clips: Whole = Field(0, ge=0, le=MANY)  # damaged clips that may be replaced; one more ends the run
    allow_overlap: bool = False  # allow training clips in `eval`; its metrics then do not measure generalisation

    @property
    def crop_samples(self) -> int:
        return round(self.crop_s * SAMPLE_RATE)

    @model_validator(mode="after")
    def _half_seconds(self) -> "DataSection":
        if self.crop_samples % PAD_SAMPLES:
            raise ValueError(f"crop_s is a whole number of half seconds, not {self.crop_s:g}")
        return self


Mixup = Literal["none", "standard", "modified"]
MixupOn = Literal["waveform", "log_mel"]
Partner = Literal["fresh", "in_batch"]


class AugmentSection(Section):
    mixup: Mixup = "modified"
    mixup_on: MixupOn = "waveform"
    partner: Partner = "fresh"
    pitch_shift: Whole = Field(0, ge=0, le=12)  # semitones: each crop is shifted by a whole number of −this to +this
    specaugment: bool = True


# On real clips, micro-batches of 1, 4, 8 and 32 examples keep .36, .86, .91 and .98 of the variance.
LEAST_MICRO_BATCH = 8
MAX_MICRO_BATCH_S = 200_000  # 18 GB of 16-bit samples


Beta = Annotated[Real, Field(ge=0, lt=1)]


class OptimSection(Section):
    global_batch: Whole = Field(32, ge=1, le=2**20)  # examples per optimizer step, whatever the number of workers
    micro_batch: Whole = Field(32, ge=1, le=2**14)  # examples that share BatchNorm statistics
    examples: Whole | None = Field(None, ge=1, le=MANY)  # length of the run in examples; or
    epochs: Real | None = Field(None, gt=0, le=10**6)  # its length in passes over the training clips
    lr: Real = Field(1e-3, gt=0, le=1000)
    schedule: Literal["one_cycle", "constant"] = "one_cycle"
    # Adam's and one_cycle's parameters, with PyTorch's names and defaults; the paper does not give its own.
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: Real = Field(0.0, ge=0, le=1000)
    pct_start: Real = Field(0.3, gt=0, lt=1)  # share of the steps in which the rate rises
    div_factor: Real = Field(25.0, ge=1, le=1e12)  # lr / the first step's rate
    final_div_factor: Real = Field(1e4, ge=1, le=1e12)  # the first step's rate / the last one's
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    compile: bool = False  # with torch.compile
    clip_norm: Real | None = Field(None, gt=0, le=1e12)  # of the whole gradient; none: no clipping
    zero_stage: Literal[0, 1, 2] = 0
    max_bad_steps: Whole = Field(
        0, ge=0, le=MANY
    )  # steps with a non-finite loss that may be skipped; one more ends the run
    small_micro_batch: bool = False  # allows a micro_batch below 8

    @model_validator(mode="after")
    def _consistent(self) -> "OptimSection":
        if self.global_batch % self.micro_batch:
            raise ValueError(f"micro_batch ({self.micro_batch}) must divide global_batch ({self.global_batch})")
        if (self.examples is None) == (self.epochs is None):
            raise ValueError("give either examples or epochs")
        return self


class EvaluateSection(Section):
    every: Whole | None = Field(None, ge=1, le=MANY)  # steps; the end of the run is always evaluated
    average_last: Whole | None = Field(None, ge=2, le=10**6)  # checkpoints whose mean weights are also evaluated
    pad_s: Real = Field(0, ge=0, le=600)  # shorter clips are zero-padded to this many seconds

    @property
    def pad_samples(self) -> int:
        return round(self.pad_s * SAMPLE_RATE)


class CheckpointSection(Section):
    every: Whole = Field(1000, ge=1, le=MANY)  # steps
    keep_last: Whole = Field(2, ge=1, le=10**6)
    keep_best: Whole = Field(0, ge=0, le=10**6)  # in addition, by the evaluation's first metric
    max_failed: Whole = Field(3, ge=0, le=10**6)  # failed writes in a row; one more ends the run


class Elastic(Section):
    """As many workers as the cluster has capacity for."""

    min: Whole = Field(ge=1, le=MAX_WORKERS)
    max: Whole = Field(ge=1, le=MAX_WORKERS)

    @model_validator(mode="after")
    def _ordered(self) -> "Elastic":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is more than max ({self.max})")
        return self


_KINDS_OF_WORKERS = {"number", "elastic"}
WorkersNumber = Annotated[
    Annotated[Whole, Field(ge=1, le=MAX_WORKERS), Tag("number")] | Annotated[Elastic, Tag("elastic")],
    Discriminator(lambda value: "elastic" if isinstance(value, dict | Elastic) else "number"),
]


class Place(Section):
    """The location of a run, or of a command's runs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    dir: PathText = "runs"  # a path, or s3://bucket/prefix

    @property
    def url(self) -> str:
        """The folder dir/name: a path, or s3://bucket/prefix."""
        return f"{self.dir.rstrip('/')}/{self.name}"


class RunSection(Place):
    workers: WorkersNumber = 1
    launcher: Literal["ray", "torchrun", "none"] = "ray"
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # On CPU a worker computes with this many threads. Results depend on it in the last bits, so it does not follow the
    # machine's number of cores; for more speed run more workers.
    threads: Whole = Field(1, ge=1, le=MAX_THREADS)
    seed: Whole = Field(0, ge=0, lt=2**63)
    log_every: Whole = Field(10, ge=1, le=MANY)  # steps
    max_failures: Whole = Field(
        3, ge=0, le=10**6
    )  # failures of workers under ray with no checkpoint in between; one more ends the run
    hang_timeout: Real = Field(
        600.0, ge=1, le=MAX_SECONDS
    )  # seconds without progress, after which the workers are restarted
    wait_for_workers: Real = Field(300.0, ge=0, le=MAX_SECONDS)  # seconds to wait for the cluster to have capacity

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.max


class Recipe(Section):
    """Everything that defines a run. docs/reference/recipe.md describes the sections and keys."""

    model: ModelSection
    data: DataSection
    augment: AugmentSection = AugmentSection()
    optim: OptimSection
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    run: RunSection

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        pairs = self.augment.mixup != "none" and self.augment.partner == "in_batch"
        if pairs and self.optim.micro_batch % 2:
            raise ValueError(f"augment.partner in_batch needs an even optim.micro_batch, not {self.optim.micro_batch}")
        if (average := self.evaluate.average_last) and average > self.checkpoint.keep_last:
            raise ValueError(
                f"evaluate.average_last is {average}, but checkpoint.keep_last only {self.checkpoint.keep_last}"
            )
        if self.optim.micro_batch * self.data.crop_s > MAX_MICRO_BATCH_S:
            raise ValueError(
                f"optim.micro_batch {self.optim.micro_batch} of data.crop_s {self.data.crop_s:g} are more than the "
                f"{MAX_MICRO_BATCH_S:,} seconds that fit into memory; make one of them smaller"
            )
        if self.optim.micro_batch < LEAST_MICRO_BATCH and not self.optim.small_micro_batch:
            raise ValueError(
                f"optim.micro_batch is {self.optim.micro_batch}: BatchNorm's statistics of fewer than "
                f"{LEAST_MICRO_BATCH} examples are too noisy; optim.small_micro_batch=true allows it anyway"
            )
        if self.run.launcher == "none" and self.run.max_workers != 1:
            raise ValueError(f"run.launcher none runs 1 worker, not {self.run.max_workers}; use ray or torchrun")
        if self.run.launcher == "torchrun" and not isinstance(self.run.workers, int):
            raise ValueError("run.launcher torchrun needs a number as run.workers; elastic workers need ray")
        if self.run.max_workers > self.optim.global_batch // self.optim.micro_batch:
            raise ValueError(
                f"run.workers is {self.run.max_workers}, but a step of {self.optim.global_batch} examples has only "
                f"{self.optim.global_batch // self.optim.micro_batch} micro-batches of {self.optim.micro_batch}; "
                "use fewer workers or a smaller optim.micro_batch"
            )
        return self

    @property
    def run_url(self) -> str:
        """The run's folder: a path, or s3://bucket/prefix."""
        return self.run.url

    def steps(self, training_clips: int) -> int:
        """Optimizer steps in the whole run."""
        if self.optim.examples is not None:
            examples = self.optim.examples
        else:
            assert self.optim.epochs is not None
            examples = max(1, round(self.optim.epochs * training_clips))
        return -(-examples // self.optim.global_batch)

    def function(self, exclude_defaults: bool = False) -> dict[str, Any]:
        """The part that decides what is computed, without where it runs or how often it logs, saves and evaluates."""
        settings = self.model_dump(exclude={"checkpoint", "evaluate"}, exclude_defaults=exclude_defaults)
        settings["run"] = {"seed": self.run.seed}
        if self.evaluate.pad_s:  # decides what the evaluation computes; the section's other keys only decide when
            settings["evaluate"] = {"pad_s": self.evaluate.pad_s}
        for name in ("zero_stage", "compile", "max_bad_steps", "small_micro_batch"):
            settings["optim"].pop(name, None)
        for name in ("loader_threads", "cache", "max_bad_clips", "allow_overlap"):
            settings["data"].pop(name, None)
        return settings

    def hash(self) -> str:
        """A hash of what is computed; a key that a later version adds does not change it."""
        function = self.function(exclude_defaults=True)
        return hashlib.sha256(json.dumps(function, sort_keys=True).encode()).hexdigest()


def _ignore(note: str) -> None:
    pass


def load_recipe(
    path: Path,
    overrides: list[str] = [],  # noqa: B006 - never changed
    on_note: Callable[[str], None] = _ignore,
) -> Recipe:
    """Read a YAML recipe and apply `key.path=value` overrides. Raises UsageError: file, key, what to do.

    on_note: called with a line for each override that does more than it appears to.
    """
    return parse_recipe(read_tree(path, overrides, on_note), str(path))


def read_tree(path: Path, overrides: list[str], on_note: Callable[[str], None] = _ignore) -> dict[str, Any]:
    """The sections of a YAML file with the overrides applied, not yet checked; a run without a name gets the file's.

    on_note: as for load_recipe.
    """
    tree = strict_yaml.read(path)
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: a recipe has the sections {', '.join(Recipe.model_fields)}")
    for override in overrides:
        _apply(tree, override, str(path), on_note)
    if isinstance(tree.get("run"), dict):
        tree["run"].setdefault("name", path.stem)
    elif tree.get("run") is None:
        tree["run"] = {"name": path.stem}
    return tree


def setting(key: str, value: Any) -> str:
    """The override that sets a key to a value."""
    return f"{key}={strict_json.dumps(value)}"


def read_section(tree: dict[str, Any], name: str, origin: str) -> dict[str, Any]:
    """A section of a recipe read from YAML, empty when absent. Raises UsageError when it is not a section."""
    section = {} if tree.get(name) is None else tree[name]
    if not isinstance(section, dict):
        raise UsageError(f"{origin}: {name}: input should be a section {{key: value, ...}}, not {_shown(section)}")
    return section


def parse_recipe(tree: dict[str, Any], origin: str) -> Recipe:
    """Check a recipe read from YAML. Raises UsageError, which names `origin` and the key."""
    return check(Recipe, tree, origin)


def check(schema: type[S], tree: Any, origin: str) -> S:
    """Check what was read from YAML against the schema. Raises UsageError, which names `origin` and the key."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise UsageError(f"{origin}: {_explain(schema, error.errors()[0])}") from error


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The keys that decide what is computed and that differ, as "key: old -> new"."""
    a, b = _flat(old.function()), _flat(new.function())
    return [f"{key}: {_plain(a.get(key))} -> {_plain(b.get(key))}" for key in sorted(a | b) if a.get(key) != b.get(key)]


def _plain(value: Any) -> str:
    """A value as a recipe would contain it, if that is short and printable."""
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 1000 else _shown(value)


_OVERRIDE = re.compile(r"(?P<key>[^=.]+(?:\.[^=.]+)*)=(?P<value>.*)", re.DOTALL)
_SOURCES = (["data", "train"], ["data", "eval"])


def _apply(tree: dict[str, Any], override: str, origin: str, on_note: Callable[[str], None]) -> None:
    shown = f"{origin}: {_shown(override)}"
    match = _OVERRIDE.fullmatch(override)
    if not match:
        raise UsageError(f"{shown}: an override is written key.path=value, for example run.workers=2")
    try:
        value = strict_yaml.load(match["value"])
    except ValueError as error:
        raise UsageError(f"{shown}: the value of {_shown_key(match['key'])} is not valid YAML ({error})") from error
    *parents, last = match["key"].split(".")
    node: Any = tree
    for depth, name in enumerate(parents, 1):
        place = _key_or_index(node, name, parents[: depth - 1], match["key"], shown)
        inner = node.get(place) if isinstance(node, dict) else node[place]
        if inner is None and isinstance(node, dict):  # the key is missing or empty
            inner = {}
        elif isinstance(inner, str) and parents[:2] in _SOURCES and depth == 2 + isinstance(node, list):
            inner = {"url": inner}  # a shard set given by its path alone
        node[place] = inner
        node = inner
    place = _key_or_index(node, last, parents, match["key"], shown)
    old = node.get(place) if isinstance(node, dict) else node[place]
    if [*parents, last] in _SOURCES and (dropped := sorted(_filters(old) - _filters(value))):
        kept = f"; {match['key']}.url={value} keeps it" if isinstance(value, str) and isinstance(old, dict) else ""
        on_note(f"{_shown_key(override)} also drops the recipe's {' and '.join(dropped)} of {match['key']}{kept}")
    node[place] = value


def _filters(source: Any) -> set[str]:
    """The keys that select a part of a shard set in a value of data.train or data.eval, as "fold [1, 2]"."""
    parts = source if isinstance(source, list) else [source]
    names = ("split", "fold", "keys", "without")
    return {f"{name} {part[name]}" for part in parts if isinstance(part, dict) for name in names if part.get(name)}


def _key_or_index(node: Any, name: str, parents: list[str], key: str, shown: str) -> str | int:
    """A section's key or a list's index. Raises UsageError when the value there has no such item."""
    if isinstance(node, dict):
        return name
    where = _shown_key(".".join(parents))
    if not isinstance(node, list):
        raise UsageError(f"{shown}: can't set {_shown_key(key)}: {where} is {_shown(node)}")
    if re.fullmatch("[0-9]{1,6}", name) and int(name) < len(node):
        return int(name)
    raise UsageError(
        f"{shown}: can't set {_shown_key(key)}: {where} is a list of {len(node)}, whose items are {where}.0 and so on"
    )


def _shown(value: Any) -> str:
    """A value as an error message shows it, shortened if it is long."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxlong, short.maxother = 3, 120, 60, 120
    return short.repr(value)


def _shown_key(key: str) -> str:
    short = key if len(key) <= 100 else f"{key[:100]}..."
    return short if short.isprintable() else ascii(short)


def _explain(schema: type[Section], error: Any) -> str:
    error = {**error, "loc": [part for part in error["loc"] if part not in _KINDS_OF_WORKERS]}
    path = ".".join(_shown_key(str(part)) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        names = _sibling_keys(schema, error["loc"])
        near = difflib.get_close_matches(str(error["loc"][-1]), names, n=1, cutoff=0.5)
        parent = "".join(f"{part}." for part in error["loc"][:-1])
        hint = f"did you mean {parent}{near[0]}?" if near else f"the keys are {', '.join(parent + n for n in names)}"
        return f"{path}: no such key; {hint}"
    if error["type"] == "missing":
        return f"{path}: this key is required"
    if error["type"] == "byte_size":
        return f"{path}: input should be a number of bytes such as 200GB, not {_shown(error['input'])}"
    if error["type"] in ("model_type", "dict_type"):
        at = f"{path}: " if path else ""
        return f"{at}input should be a section {{key: value, ...}}, not {_shown(error['input'])}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message[0].lower()}{message[1:]}, not {_shown(error['input'])}"


def _sibling_keys(schema: type[Section], location: tuple[Any, ...]) -> list[str]:
    section: Any = schema
    for part in location[:-1]:
        if isinstance(part, int):
            section = DataSource
        else:
            annotation = section.model_fields[part].annotation
            section = next((kind for kind in _kinds(annotation) if _is_section(kind)), section)
    return list(section.model_fields)


def _kinds(annotation: Any) -> list[Any]:
    """A type and the types it is made of."""
    return [annotation, *(kind for part in get_args(annotation) for kind in _kinds(part))]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}{name}.").items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return _flat({str(i): sub for i, sub in enumerate(tree)}, prefix)
    return {prefix[:-1]: tree}
