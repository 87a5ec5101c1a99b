"""A trained model as a folder: weights, configuration, metrics, and a model card.

model.safetensors   the weights
config.json         variant, task, label ids and names in order, sample rate, front end
metrics.json        the evaluation at the end of training
README.md           the model card
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import safetensors.torch
import torch
from pydantic import ConfigDict, Field
from safetensors import SafetensorError

from erann_dist import SAMPLE_RATE
from erann_dist.data.manifest import Labels, SampleRate, SetInfo, Task, require_printable
from erann_dist.errors import UsageError, UserError
from erann_dist.formats import strict_json, strict_yaml
from erann_dist.models.base import AudioModel
from erann_dist.models.mel_config import ERANN_MEL
from erann_dist.models.spec import build_model, model_name, model_spec
from erann_dist.recipe import Recipe
from erann_dist.storage.folder import Folder, open_folder
from erann_dist.train import checkpoint

FORMAT = 1
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class ModelInfo:
    """A model's inputs and outputs."""

    __pydantic_config__: ClassVar[ConfigDict] = {**strict_json.STRICT, "extra": "forbid"}  # of a config.json

    variant: str
    task: Task
    label_ids: Labels
    label_names: Labels
    sample_rate: SampleRate
    pad_samples: Annotated[int, Field(ge=0, le=600 * SAMPLE_RATE)] = 0  # to which a shorter clip is zero-padded
    front_end: dict[str, strict_json.Scalar] = dataclasses.field(default_factory=ERANN_MEL.as_dict)
    format: strict_json.Count = FORMAT
    weights_sha256: str | None = None  # of model.safetensors; save_model and load_model fill it in


def save_model(folder: Folder, model: AudioModel, info: ModelInfo, metrics: dict[str, Any], card: str) -> None:
    """Write a model folder; an existing config.json is deleted first, and the new one is written last."""
    folder.delete(_CONFIG)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    data = safetensors.torch.save(weights)
    folder.write(_WEIGHTS, data)
    folder.write("metrics.json", strict_json.dumps(metrics, indent=1).encode())
    folder.write("README.md", card.encode())
    info = dataclasses.replace(info, weights_sha256=hashlib.sha256(data).hexdigest())
    folder.write(_CONFIG, strict_json.dumps(dataclasses.asdict(info), indent=1).encode())


def weights_problem(folder: Folder) -> str | None:
    """The problem with the weights of a finished model folder, one line: missing, or not those of its config.json."""
    try:
        info = _read_info(folder)
        found = hashlib.sha256(folder.read(_WEIGHTS)).hexdigest()
    except FileNotFoundError as error:
        return f"{error.filename or folder}: is missing"
    except UserError as error:
        return str(error)
    if info.weights_sha256 not in (None, found):
        return f"{folder}/{_WEIGHTS}: is damaged, or not the weights that {_CONFIG} was written with"
    return None


def unfinish(folder: Folder) -> None:
    """Mark a model folder as unfinished, so that it is written again: delete its config.json."""
    folder.delete(_CONFIG)


def find_model(url: str) -> Folder:
    """The model folder at this URL, or that of the run there. Raises UsageError when there is none."""
    for found in (open_folder(url), open_folder(f"{url.rstrip('/')}/model")):
        if found.exists(_CONFIG):
            return found
    raise UsageError(f"{url}: no model here: neither a model folder with its config.json nor a finished run")


def load_model(folder: Folder) -> tuple[AudioModel, ModelInfo]:
    """The model of a folder, in evaluation mode. Raises UserError: which file, what is wrong."""
    info = _read_info(folder)
    path = f"{folder}/{_WEIGHTS}"
    try:
        data = folder.read(_WEIGHTS)
        weights = safetensors.torch.load(data)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: can't be read ({str(error).splitlines()[0]})") from error
    found = hashlib.sha256(data).hexdigest()
    if info.weights_sha256 not in (None, found):
        raise UserError(f"{path}: damaged, or not the weights that {_CONFIG} was written with")
    model = build_model(info.variant, len(info.label_ids))
    if info.front_end != model.front_end.as_dict():
        raise UserError(f"{folder}/{_CONFIG}: made for another front end than that of this program's {info.variant}")
    checkpoint.require_shapes(path, weights, dict(model.state_dict()))
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: {name} is not finite; the training that made it failed")
    model.load_state_dict(weights)
    return model.eval(), dataclasses.replace(info, weights_sha256=found)


def _read_info(folder: Folder) -> ModelInfo:
    path = f"{folder}/{_CONFIG}"
    try:
        info = strict_json.validate(ModelInfo, folder.read(_CONFIG))
        model_name(info.variant)
    except ValueError as error:
        raise UserError(
            f"{path}: not a model's configuration ({error}); restore it, or train the model again"
        ) from error
    require_printable(path, [*info.label_ids, *info.label_names])
    if info.format != FORMAT:
        raise UserError(f"{path}: made for another format than this program's")
    if len(info.label_names) != len(info.label_ids):
        raise UserError(f"{path}: has {len(info.label_ids)} label_ids, but {len(info.label_names)} label_names")
    return info


def initialise(model: AudioModel, url: str, fresh: list[str]) -> ModelInfo:
    """Load the weights and running statistics of another model of the same variant, except for the layers `fresh`.

    Returns the other model's info. Raises UserError when they do not match, UsageError when there is no such layer.
    """
    folder = find_model(url)
    pretrained, info = load_model(folder)
    require_beginning(model, str(folder), info, fresh)
    reinitialised = tuple(f"{layer}." for layer in fresh)
    kept = {name: value for name, value in pretrained.state_dict().items() if not name.startswith(reinitialised)}
    model.load_state_dict(kept, strict=False)
    return info


def require_beginning(model: AudioModel, name: str, pretrained: ModelInfo, fresh: list[str]) -> None:
    """Raise UserError unless the model can start from the pretrained weights, except for the layers `fresh`.

    name: of the pretrained model, for messages.
    """
    require_layers(model, fresh)
    if pretrained.variant != model.name:
        raise UserError(f"{name}: is an {pretrained.variant}, model.variant is {model.name}; they must be the same")
    if pretrained.sample_rate != SAMPLE_RATE:
        raise UserError(f"{name}: needs {pretrained.sample_rate} Hz, models are trained at {SAMPLE_RATE} Hz")
    labels = len(pretrained.label_ids)
    last = model_spec(model.name).head_layers[-1]
    if last not in fresh and labels != model.num_classes:
        raise UserError(f"{name}: has {labels} labels, the clips have {model.num_classes}; add {last} to model.fresh")


def require_layers(model: AudioModel, fresh: list[str]) -> None:
    """Raise UsageError unless the model has all of these layers."""
    layers = [name for name, _ in model.named_modules()]
    for layer in fresh:
        if layer not in layers:
            last = " and ".join(model_spec(model.name).head_layers)
            raise UsageError(f"model.fresh: {model.name} has no layer {layer}; its last layers are {last}")


def require_rate(model_folder: Folder, model: ModelInfo, shards: str, info: SetInfo) -> None:
    """Raise UserError unless the shard set has the model's sample rate."""
    if model.sample_rate != info.sample_rate:
        raise UserError(f"{shards} is at {info.sample_rate} Hz, the model {model_folder} needs {model.sample_rate} Hz")


def require_fit(model_folder: Folder, model: ModelInfo, shards: str, info: SetInfo) -> None:
    """Raise UserError unless the shard set has the model's labels, task and sample rate."""
    require_rate(model_folder, model, shards, info)
    if model.task != info.task:
        raise UserError(f"{shards} is for {info.task}, the model {model_folder} for {model.task}")
    if model.label_ids != info.label_ids:
        differing = [i for i, (a, b) in enumerate(zip(model.label_ids, info.label_ids, strict=False)) if a != b]
        where = f"; label {differing[0]} is {info.label_ids[differing[0]]} there" if differing else ""
        raise UserError(
            f"{shards} has {len(info.label_ids)} labels that are not the {len(model.label_ids)} of the model "
            f"{model_folder}{where}"
        )


def model_card(info: ModelInfo, metrics: dict[str, Any], recipe: Recipe) -> str:
    """The README of a model folder, in Markdown."""
    names = ("mAP", "mAUC", "d_prime", "chance_mAP", "accuracy", "chance_accuracy")
    figures = "\n".join(f"| {name} | {metrics[name]:.4f} |" for name in names if name in metrics)
    left_out = ", ".join(metrics.get("left_out", []))
    return f"""# {info.variant} for {info.task}, {len(info.label_ids)} classes

{model_spec(info.variant).description}, trained by erann-dist:
{info.sample_rate} Hz mono sound in, {len(info.label_ids)}
{"independent probabilities (sigmoid)" if info.task == "tagging" else "probabilities (softmax)"} out, in the order of
config.json's labels.

    erann tag MODEL sound.wav
    erann evaluate MODEL SHARDS

## How good it is

On {metrics["clips"]} clips of {", ".join(s.url for s in recipe.data.eval)} ({metrics["coverage"]:.1%} of the
{metrics["listed"]} listed; hash of the list {metrics["list_hash"][:16]}), full length, weights of the last step:

| metric | value |
| --- | --- |
{figures}
{f"Classes without positives, left out of the means: {left_out}." if left_out else ""}
Each class's figure is in metrics.json.

## How it was made

```yaml
{strict_yaml.dump(recipe.model_dump(mode="json", exclude_none=True)).strip()}
```
"""
