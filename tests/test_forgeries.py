"""Damaged and forged files, walked through what every command does with them.

Each file that a command reads from a disk or a bucket is forged: its JSON key by key, its Parquet column by column,
both byte by byte. A reader then returns as ever, or raises a UserError of one line that names the set or the run;
anything else, and anything that is executed, fails.
"""

import copy
import hashlib
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import chdir, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import typer.main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erann_dist.data import shared_clips
from erann_dist.data.manifest import MANIFEST, REPORT, SHARDS, load_manifest
from erann_dist.data.sources import count_reported, load_source
from erann_dist.errors import UserError
from erann_dist.formats import strict_yaml
from erann_dist.log import run_log
from erann_dist.log.events import CheckpointSaved, Ended, Evaluated, Finished, Incident
from erann_dist.log.run_log import RunLog, read_log
from erann_dist.models.spec import build_model
from erann_dist.recipe import DataSource, check, load_recipe, read_tree
from erann_dist.storage.folder import LocalFolder
from erann_dist.train import checkpoint, evaluation, model_folder
from erann_dist.train.common_clips import common_detail, read_common
from erann_dist.train.evaluation import Predictions
from jobs.cli.__main__ import app
from jobs.cli.submit import _plan as what_is_sent
from jobs.html import page
from jobs.pipeline import Pipeline
from jobs.plan.page import plan_page
from jobs.plan.plan import Cluster, plan
from jobs.report import run_part, study_part
from jobs.report.reading import Study, read
from jobs.report.report_page import report_page
from jobs.runs.page import run_page, runs_page
from jobs.runs.summary import list_runs, show_run
from jobs.shard_sets.pack import summary
from jobs.shard_sets.stats import stats_page
from jobs.shard_sets.stats_page import html_page
from jobs.submission.page import package_page
from jobs.submission.submit import prepare
from jobs.terminal.show import evaluation_page, show
from jobs.training import cross_validation, finetune, pretrain, study
from jobs.training.results import RESULTS
from jobs.training.study_manifest import STUDY_MANIFEST, StudyManifest, require_own, require_unchanged, write_mark
from shards import build, index
from shards.clip import Packing
from shards.repair import repair_tasks, why_different
from shards.sources.class_lists import ClassList
from shards.sources.rows import Source, SourceRow, rows_table
from shards.stage import staging
from shards.statistics import statistics
from shards.verify import verify
from tests.conftest import small_recipe
from tests.support.folded import write_folded_set, write_protocol
from tests.support.run_logs import started, step, write_log

DEFAULT, MANY = 5, 45  # forgeries of each file
EXECUTION = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class"}
real_svg = page.svg
watching: list[str] = []
executed: list[str] = []


def audit(event: str, _: object) -> None:
    if watching and event in EXECUTION:
        executed.append(event)


sys.addaudithook(audit)


@contextmanager
def nothing_executed() -> Iterator[None]:
    executed.clear()
    watching.append("now")
    try:
        yield
    finally:
        watching.clear()
    assert executed == []


# Tokens in place of a value: JSON, or nearly.
DEEP = "[" * 5000 + "]" * 5000
HOSTILE = "null true 0 -1 1.5 1e308 -1e308 NaN -Infinity 1e999 2147483648 9223372036854775808".split()
HOSTILE += ['""', '"x"', '"1"', r'"\ud800"', r'"a\u0000b"', r'"\u001b[2J\n"', '"../../x"', '"/dev/zero"']
HOSTILE += ["9" * 5000, f'"{"x" * 10_000}"', DEEP, '{"a":' * 150 + "1" + "}" * 150]
HOSTILE += ["[]", "{}", "[null]", '{"a": null}', '[["x"], 1]']
MARKER = "@@forged@@"
tokens = st.sampled_from(HOSTILE)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All keys and indices of a tree, and the tree itself."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


@st.composite
def forged_json(draw: st.DrawFn, text: bytes) -> bytes:
    """One value replaced by a hostile one, removed, or joined by another; or the bytes cut or changed."""
    if draw(st.integers(0, 5)) == 0:
        return draw(forged_bytes(text))
    tree = copy.deepcopy(json.loads(text))
    place = draw(st.sampled_from(places(tree)))
    if not place:
        return draw(tokens).encode()
    parent: Any = tree
    for key in place[:-1]:
        parent = parent[key]
    action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if action == "remove":
        del parent[place[-1]]
    elif action == "add" and isinstance(parent, dict):
        parent["an other \x1b[2J\n"] = MARKER
    elif action == "add":
        parent.append(MARKER)
    else:
        parent[place[-1]] = MARKER
    return json.dumps(tree).replace(f'"{MARKER}"', draw(tokens)).encode(errors="surrogatepass")


@st.composite
def forged_lines(draw: st.DrawFn, text: bytes) -> bytes:
    """A log with some lines forged, repeated or in another order."""
    lines = text.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(lines) - 1))
        action = draw(st.sampled_from(["forge", "forge", "forge", "repeat", "move", "remove"]))
        if action == "forge":
            lines[i] = draw(forged_json(lines[i])) if lines[i].startswith(b"{") and is_json(lines[i]) else b"x"
        elif action == "repeat":
            lines.insert(draw(st.integers(0, len(lines))), lines[i])
        elif len(lines) > 1:
            line = lines.pop(i)
            if action == "move":
                lines.insert(draw(st.integers(0, len(lines))), line)
    return b"\n".join(lines) + draw(st.sampled_from([b"\n", b"", b'{"event": "Ste']))


def is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


@st.composite
def forged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Cut, with some bytes changed, or something else altogether."""
    action = draw(st.sampled_from(["cut", "change", "change", "other"]))
    if action == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if action == "other":
        return draw(st.sampled_from([b"", b"\0" * 100, b"\xff\xfe{}", b"PAR1PAR1", b"[" * 100_000, b"\x80\x04."]))
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        changed[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(changed)


def forged_head(data: bytes) -> st.SearchStrategy[bytes]:
    """Of a file of weights: what its header says."""
    return forged_bytes(data[:4096]).map(lambda head: head + data[4096:])


VALUES: list[Any] = [
    None,
    -1,
    0,
    1,
    77,
    127,
    2**31 - 1,
    2**40,
    2**62,
    1.5,
    float("nan"),
    "",
    "x",
    "../x",
    "\x1b[2J",
    [],
    [-1],
]
VALUES += [[None], [9999], ["x"], {"a": 1}, b"\xff"]
TYPES = [pa.string(), pa.large_string(), pa.int8(), pa.int64(), pa.float64(), pa.list_(pa.string()), pa.binary()]


@st.composite
def forged_parquet(draw: st.DrawFn, path: Path) -> bytes:
    """A column of another type, with other values, gone or there twice; no rows; other metadata; or other bytes."""
    table = pq.read_table(path)
    metadata = table.schema.metadata or {}
    action = draw(st.sampled_from(["value", "value", "value", "type", "drop", "double", "rows", "metadata", "bytes"]))
    if action == "bytes":
        return draw(forged_bytes(path.read_bytes()))
    if action == "metadata" and metadata:
        key = draw(st.sampled_from(sorted(metadata)))
        text = metadata[key]
        forged = draw(forged_json(text) if is_json(text) else forged_bytes(text))
        table = table.replace_schema_metadata({**metadata, key: forged} if draw(st.booleans()) or forged else None)
    elif action == "rows":
        table = table.slice(0, draw(st.sampled_from([0, 1])))
    else:
        i = draw(st.integers(0, table.num_columns - 1))
        field, values = table.schema.field(i), table.column(i).to_pylist()
        if action == "drop":
            table = table.remove_column(i)
        elif action == "double":
            table = table.append_column(field, table.column(i))
        else:
            if action == "value" and values:
                values[draw(st.integers(0, len(values) - 1))] = draw(st.sampled_from(VALUES))
            type_ = draw(st.sampled_from(TYPES)) if action == "type" else field.type
            for wanted in (type_, None):
                try:
                    column = pa.array(values, wanted)
                    break
                except (pa.ArrowException, TypeError, ValueError, OverflowError):
                    column = pa.nulls(len(values), type_)
            table = table.set_column(i, field.name, column)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@dataclass(frozen=True)
class World:
    """Everything that commands read, in one folder."""

    root: Path
    source: Source
    plan: build.Plan

    @property
    def shards(self) -> Path:
        return self.root / "set/shards"

    @property
    def run(self) -> Path:
        return self.root / "runs/one"

    @property
    def study(self) -> Path:
        return self.root / "runs/t"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    shards = write_folded_set(root / "set", [1, 2])
    clips = load_manifest(shards)
    rows = [
        SourceRow(
            key, [int(clips.label_values[i])], None, key, fold=int(clips.folds[i]), reason="missing", detail="gone"
        )
        for i, key in enumerate(clips.keys.to_pylist())
    ]
    info = clips.info
    source = Source(info.name, info.task, info.label_ids, info.label_names, rows_table(rows), [])
    plan = build.Plan(source, Packing(clips_per_shard=8, assign="all"), LocalFolder(str(root / "packing")))
    build.start(plan)
    for shard in range(plan.num_shards):
        build.keep(plan.task(shard), build.build_shard(plan.task(shard)))
    write_run(root / "runs/one", clips)
    write_study(root, shards, clips)
    (root / "recipe.yaml").write_text(json.dumps(small_recipe(shards, root / "runs/new").model_dump(mode="json")))
    (root / "t.yaml").write_text(json.dumps(strict_yaml.read(root / "t.yaml")))  # JSON is YAML
    on_ray = {"run": {"name": "x", "launcher": "ray"}}
    stages = {"pretrain": {"recipe": "recipe.yaml", "set": on_ray}, "finetune": [{"recipe": "t.yaml", "set": on_ray}]}
    (root / "listed_segments.csv").write_text('# a list\n--aE2O5G5WE, 0.000, 10.000, "/m/03fwl,/m/04rlf"\n' * 2)
    (root / "pipeline.yaml").write_text(json.dumps(stages | {"run": {"dir": str(root / "runs"), "name": "all"}}))
    return World(root, source, plan)


def write_run(folder: Path, clips: Any) -> None:
    run = LocalFolder(str(folder))
    write_log(
        run,
        (10.0, started(launched=1.0)),
        *((10.0 + i, step(i, loss=1 / i)) for i in (1, 2, 3)),
        (14.0, Evaluated(3, 6, {"accuracy": 0.5})),
        (15.0, CheckpointSaved(3, "checkpoints/x", 1.0, 0.1)),
        (16.0, Incident(3, "failure", "lost", steps_lost=2, seconds_lost=65.0, keys=["a"])),
        (17.0, Evaluated(3, 6, {"accuracy": 0.6}, averaged=2)),
        (18.0, Finished(3, 5.0, 0.5, {"accuracy": 0.5})),
        (19.0, Ended(3, "stopped", True, 1.0)),
    )
    run.write(".step", b"3")
    recipe = small_recipe(Path("no/such/set"), folder).model_dump(mode="json", exclude_none=True)
    run.write("recipe.yaml", json.dumps(recipe).encode())
    start = checkpoint.begin(run)
    name = checkpoint.save(
        start, checkpoint.Facts(3, "r", "d", "ERANN-3-1", 1, ["a"], [2], {"torch": "1"}), {"w": torch.zeros(2)}
    )
    checkpoint.record(start, name, {"accuracy": 0.5})
    scores = np.random.default_rng(0).dirichlet(np.ones(3), len(clips)).astype(np.float32)
    predictions = Predictions(scores, clips.targets(np.arange(len(clips))))
    metrics = evaluation.detail(predictions, clips, len(clips) + 1)
    model = model_folder.ModelInfo("ERANN-3-1", clips.info.task, clips.info.label_ids, clips.info.label_names, 44_100)
    model_folder.save_model(LocalFolder(str(folder / "model")), build_model("ERANN-3-1", 3), model, metrics, "")
    with run.writing("predictions.parquet") as file:
        evaluation.write_predictions(file, predictions, clips)
    absent = [{"file": "list", "count": 1, "examples": ["x"]}]
    chosen = {"shards": "s", "split": "a", "fold": [1], "keys": "list", "without": "list", "not_in_set": absent}
    common = common_detail(read_common(f"{folder}/predictions.parquet", clips), predictions, clips)
    common |= {"labels_differ": 1, "labels_example": {"key": "k", "ours": ["low"], "theirs": []}}
    evaluated = json.dumps(metrics | {"selection": chosen, "common": common})
    run.write("model/evaluations/again/metrics.json", evaluated.encode())


def write_study(root: Path, shards: Path, clips: Any) -> None:
    """A cross-validation whose folds are copies of the run, and a table of runs."""
    validation = cross_validation.load_cross_validation(write_protocol(root / "t.yaml", shards), [], None)
    for fold in validation.recipes:
        shutil.copytree(root / "runs/one", root / f"runs/t/fold-{fold}")
    folder = validation.folder
    write_mark(folder, StudyManifest("folds", "tones", {"protocol.shards": clips.info.content_hash}))
    folder.write(RESULTS, json.dumps(cross_validation.results(validation, {3: "burned"})).encode())
    table = LocalFolder(str(root / "runs/grid"))
    cells = {"run": "a", "variant": "ERANN-3-1", "params_M": 1.0, "GMACs": 2.0, "clips_per_s_1": 3.0, "accuracy": 0.5}
    rows = [{**cells, "paper": None, "comparable": True, "runs": ["one"]}]
    study._write(table, "hyperparameters", "grid", rows, {"b": "burned"}, ["a note"], "cpu")
    shutil.copytree(root / "runs/one", root / "runs/grid/one")


def read_set(world: World) -> list[Callable[[], object]]:
    """What pretrain, finetune, evaluate, plan, verify, repair, stats, pack and stage read of a shard set."""
    folder, url = LocalFolder(str(world.shards)), str(world.shards)

    def training() -> None:
        clips = load_source(DataSource(url=url))
        clips.targets(np.arange(len(clips)))
        evaluation.evaluation_batches(clips)

    def mapped() -> None:
        with shared_clips.shared_clips([DataSource(url=url, fold=[1])]):
            pass

    def shown() -> None:
        result = statistics(folder, 1000)
        stats_page(result)
        html_page(result)

    def repaired() -> None:
        for task in repair_tasks(folder, world.source, [0]):
            why_different(folder, task, pa.Table.from_pylist([], build.OUTCOME_SCHEMA))

    def staged() -> None:
        target = world.root / "staged"
        shutil.rmtree(target, ignore_errors=True)
        with staging(folder, LocalFolder(str(target))):
            pass

    return [
        training,
        mapped,
        lambda: planned(world.root / "recipe.yaml"),
        lambda: count_reported(DataSource(url=url, fold=[1])),
        lambda: cross_validation.load_cross_validation(world.root / "t.yaml", [], None),
        lambda: list(verify(folder, quick=True)),
        lambda: list(verify(folder)),
        shown,
        lambda: summary(folder),
        repaired,
        lambda: build.start(build.Plan(world.source, Packing(), folder)),
        staged,
    ]


CLUSTER = Cluster(2, 2, 16, 10.0, 1000.0, 300.0, 250.0, 0.4)


def planned(recipe: Path, *segments: Path) -> None:
    """What plan reads and shows, of a run of a few steps."""
    found = load_recipe(recipe, ["optim.examples=64", "optim.epochs=null"])
    try:
        plan_page(plan(found, CLUSTER, list(segments)))
    except UserError as error:
        paths = [path for source in found.data.train for path in (source.url, source.keys, source.without) if path]
        if not str(error).startswith(tuple(paths)):  # the line names what the recipe names
            raise


def submitted(world: World, *command: str) -> None:
    """What submit reads, and shows of what it would send; no cluster is asked."""
    context = typer.Context(typer.main.get_command(app))
    with chdir(world.root):
        package_page(what_is_sent(prepare(context, list(command), "image")))


def read_run(world: World) -> list[Callable[[], object]]:
    """What runs, report, pretrain, finetune, tag, evaluate and export read of a run."""
    runs, run, url = str(world.root / "runs"), LocalFolder(str(world.run)), str(world.run)
    recipe = small_recipe(Path("no/such/set"), world.run)

    def listed() -> None:
        result = list_runs(runs, None)
        show(result, True, runs_page)
        runs_page(result)

    def shown() -> None:
        result = show_run(runs, "one", None, None)
        show(result, True, run_page)
        run_page(result)

    def compared() -> None:
        clips = load_manifest(world.shards)
        common_detail(read_common(f"{url}/predictions.parquet", clips), whole, clips)

    def shown_again() -> None:
        data = run.read("model/evaluations/again/metrics.json")
        with suppress(ValueError):  # evaluate has written it itself
            evaluation_page(evaluation.read_detail(data))

    whole = Predictions(np.full((12, 3), 0.5, np.float32), np.eye(3, dtype=np.float32)[np.arange(12) % 3])

    def resumed() -> None:
        used, _ = checkpoint.latest(run)
        if used:
            checkpoint.load(run, used)
            checkpoint.mean(run, [used], lambda: None)
        checkpoint.best(run, checkpoint.committed(run))

    def logged() -> None:
        lines = read_log(run)
        run_log.lost(lines, 1, 1.0, 20.0, run_log.last_step(run))
        run_log.goodput(run_log.continued(lines, 1), 20.0)
        copied = LocalFolder(str(world.root / "resumed"))
        for name in ("metrics.jsonl", ".step"):
            copied.write(name, run.read(name))
        with closing(RunLog(copied, 2)) as log:
            log.event(step(3))
        shutil.rmtree(copied.url)

    return [
        listed,
        shown,
        lambda: report_page([read(url, None)]),
        lambda: page.svg is real_svg and show_run(runs, "one", None, world.root / "curves.png"),
        resumed,
        logged,
        compared,
        shown_again,
        lambda: cross_validation._fold(1, {"accuracy": 0.5, "clips": 3}, read_log(run)),
        lambda: pretrain.check_run(recipe, run, "auto"),
        lambda: pretrain.outcome(run),
        lambda: pretrain._device(recipe, run),
        lambda: model_folder.load_model(model_folder.find_model(url)),
        lambda: model_folder.initialise(build_model("ERANN-3-1", 3), url, ["fc2"]),
    ]


def read_studies(world: World) -> list[Callable[[], object]]:
    """What report, finetune and study read of a study."""
    folder = LocalFolder(str(world.study))

    def reported(name: str) -> None:
        found = read(str(world.root / "runs" / name), None)
        assert isinstance(found, Study)
        report_page([found])

    return [
        lambda: reported("t"),
        lambda: reported("grid"),
        lambda: study._last_result(LocalFolder(str(world.root / "runs/grid"))),
        lambda: study._Measure(LocalFolder(str(world.root / "runs/grid"))),
        lambda: require_own(folder, StudyManifest("folds", "tones")),
        lambda: require_unchanged(folder, StudyManifest("folds", "tones", {"protocol.shards": "x"})),
        lambda: finetune.has_begun(folder),
        lambda: list_runs(str(world.root / "runs"), None),
    ]


def read_packing(world: World) -> list[Callable[[], object]]:
    """What pack reads of a packing that was stopped."""
    return [
        lambda: build.start(world.plan),
        lambda: build.finished(world.plan),
        lambda: [build.progress_of(result) for result in build.kept(world.plan, range(world.plan.num_shards))],
    ]


def read_recipes(world: World) -> list[Callable[[], object]]:
    """What pretrain, finetune, study, pipeline, plan and submit read of recipes."""

    def pipeline() -> None:
        found = check(Pipeline, read_tree(world.root / "pipeline.yaml", []), str(world.root / "pipeline.yaml"))
        for stage in (found.pretrain, *found.finetune):
            read_tree(world.root / "recipe.yaml", stage.settings())

    return [
        lambda: load_recipe(world.root / "recipe.yaml", ["run.seed=1", "data.train.0.fold=[1]"]).hash(),
        lambda: cross_validation.read_design(world.root / "t.yaml", ["optim.examples=64"], None),
        pipeline,
        lambda: planned(world.root / "recipe.yaml"),
        lambda: submitted(world, "pretrain", str(world.root / "recipe.yaml"), "run.launcher=ray"),
        lambda: submitted(world, "finetune", str(world.root / "t.yaml"), "run.launcher=ray"),
        lambda: submitted(world, "pipeline", str(world.root / "pipeline.yaml")),
    ]


def read_segments(world: World) -> list[Callable[[], object]]:
    """What plan reads of a list of segments."""
    return [lambda: planned(world.root / "recipe.yaml", world.root / "listed_segments.csv")]


CHECKPOINT = "checkpoints/step-00000003-0001"
# Each file, how it is forged, and who reads it.
FILES: dict[str, tuple[Callable[[Path], st.SearchStrategy[bytes]], Callable[[World], list[Callable[[], object]]]]] = {
    **{f"set/shards/{name}": (forged_parquet, read_set) for name in (MANIFEST, SHARDS, REPORT)},
    "runs/one/metrics.jsonl": (lambda path: forged_lines(path.read_bytes()), read_run),
    **{
        f"runs/one/{name}": (lambda path: forged_json(path.read_bytes()), read_run)
        for name in (
            ".step",
            "recipe.yaml",
            "model/config.json",
            "model/metrics.json",
            "model/evaluations/again/metrics.json",
            f"{CHECKPOINT}/state.json",
            f"{CHECKPOINT}/COMMITTED",
            f"{CHECKPOINT}/metrics.json",
        )
    },
    "runs/one/predictions.parquet": (forged_parquet, read_run),
    f"runs/one/{CHECKPOINT}/state.safetensors": (lambda path: forged_bytes(path.read_bytes()), read_run),
    "runs/one/model/model.safetensors": (lambda path: forged_head(path.read_bytes()), read_run),
    **{
        f"runs/{name}": (lambda path: forged_json(path.read_bytes()), read_studies)
        for name in (f"t/{RESULTS}", f"t/{STUDY_MANIFEST}", f"grid/{RESULTS}")
    },
    "packing": (forged_parquet, read_packing),
    "listed_segments.csv": (lambda path: forged_bytes(path.read_bytes()), read_segments),
    **{
        name: (lambda path: forged_json(path.read_bytes()), read_recipes)
        for name in ("recipe.yaml", "t.yaml", "pipeline.yaml")
    },
}


def try_forgeries(world: World, file: str, examples: int) -> int:
    """How many forgeries of a file were read by all who read it."""
    path = next((world.root / "packing").rglob("000000.parquet")) if file == "packing" else world.root / file
    forge, readers = FILES[file]
    original = path.read_bytes()
    done = 0

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(forge(path))
    def read_by_all(forged: bytes) -> None:
        nonlocal done
        path.write_bytes(forged)
        if path.name in ("state.json", "state.safetensors"):  # as somebody would who knows of its hash
            marker = json.loads(committed) | {path.name: hashlib.sha256(forged).hexdigest()}
            path.with_name("COMMITTED").write_text(json.dumps(marker))
        try:
            for reader in readers(world):
                read_once(reader, world.root)
        finally:
            path.write_bytes(original)
        done += 1

    marked = path.with_name("COMMITTED")
    committed = marked.read_bytes() if marked.exists() else b""
    try:
        read_by_all()
    finally:
        path.write_bytes(original)
        if committed:
            marked.write_bytes(committed)
    return done


def read_once(reader: Callable[[], object], root: Path) -> None:
    with nothing_executed():
        try:
            reader()
        except UserError as error:
            line = str(error)
            assert "\n" not in line
            assert line.isprintable()
            assert len(line) < 2000
            # A pipeline's recipes are named as it names them.
            assert str(root) in line or "recipe.yaml" in line or line.startswith("t.yaml: "), line


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes half a second a page; the many forged logs are drawn."""
    for module, name in ((run_part, "run_curves"), (study_part, "curves_of_several"), (page, "svg")):
        monkeypatch.setattr(module, name, lambda *_, **__: page.soft("curves"))


@pytest.mark.parametrize("file", FILES)
def test_forged_files(world: World, file: str, no_curves: None) -> None:
    assert try_forgeries(world, file, DEFAULT) == DEFAULT


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_many_forged_files(world: World, file: str, request: pytest.FixtureRequest) -> None:
    if file != "runs/one/metrics.jsonl":
        request.getfixturevalue("no_curves")
    assert try_forgeries(world, file, MANY) == MANY  # 945 forgeries in all


def test_forged_labels_in_tars(tmp_path: Path) -> None:
    """What index and verify read of the JSON and text files in tars."""
    sound = io.BytesIO()
    soundfile.write(sound, [0.25] * 4410, 44_100, format="FLAC", subtype="PCM_16")
    whole = [(f"{i}.json", token.encode()) for i, token in enumerate(HOSTILE)]
    inside = [
        (f"{key}{i}.json", f'{{"label": "x", "{key}": {token}}}'.encode())
        for key in ("labels", "label", "split", "fold")
        for i, token in enumerate(HOSTILE)
    ]
    texts = [
        (f"text{i}.cls", token.encode()) for i, token in enumerate(["9" * 5000, "x", "\udcff", "٣", " "]) if i != 2
    ]
    members = [*whole, *inside, *texts, ("bytes.txt", b"\xff\xfe"), ("sound.json", b'{"label": "x"}')]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members:
            for member, content in ((f"{name.partition('.')[0]}.flac", sound.getvalue()), (name, data)):
                about = tarfile.TarInfo(member)
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    folder = LocalFolder(str(tmp_path))
    read_once(lambda: list(index.index(folder)), tmp_path)
    (tmp_path / MANIFEST).unlink(missing_ok=True)
    list(index.index(folder, ClassList("", ["x", "1"], ["x", "1"])))
    assert len(load_manifest(tmp_path)) >= 1
    assert not [problem for _, found in verify(folder) for problem in found]


@pytest.mark.parametrize("file", FILES)
def test_the_sound_files_are_read(world: World, file: str, no_curves: None) -> None:
    """Else nothing would be tested: without a forgery every reader reads, but for the two whose set is another one."""
    for reader in FILES[file][1](world):
        with suppress(OtherSet):
            as_other_set(reader)


class OtherSet(Exception):
    """The set or its clips are not those that the reader looks for."""


def as_other_set(reader: Callable[[], object]) -> None:
    try:
        reader()
    except UserError as error:
        if "contains another shard set" not in str(error) and "other clips" not in str(error):
            raise
        raise OtherSet from error
