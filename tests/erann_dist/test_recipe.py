import os
from pathlib import Path

import pytest

from erann_dist.errors import UsageError
from erann_dist.recipe import MAX_WORKERS, differences, load_recipe, parse_recipe, setting
from jobs.recipes import find_recipe

RECIPE = """
model: {variant: ERANN-1-6}
data: {train: [a, {url: b, fold: [1, 2]}], eval: c}
optim: {examples: 1000}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def test_defaults_and_overrides(path: Path) -> None:
    recipe = load_recipe(path, ["optim.lr=1e-4", "data.train.1.fold=[3]", "run.workers=1", "augment.mixup=none"])
    assert recipe.run.name == "mine"
    assert recipe.optim.lr == 1e-4
    assert [(s.url, s.fold) for s in recipe.data.train] == [("a", None), ("b", [3])]
    assert recipe.data.eval[0].url == "c"
    assert recipe.augment.mixup == "none"
    assert recipe.steps(10**6) == 32  # 1000 examples in batches of 32, the last one whole


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", "optim.learning_rate: no such key; the keys are optim.global_batch"),
        ("optim.globl_batch=32", "optim.globl_batch: no such key; did you mean optim.global_batch?"),
        ("optmi.lr=1", "optmi: no such key; did you mean optim?"),
        ("data.train.1.folds=[1]", "data.train.1.folds: no such key; did you mean data.train.1.fold?"),
        ("optim.lr=fast", "optim.lr: input should be a valid number, .*not 'fast'"),
        ("optim.lr=-1", "optim.lr: input should be greater than 0, not -1"),
        ("augment.mixup=maximal", "augment.mixup: input should be 'none', 'standard' or 'modified', not 'maximal'"),
        ("augment.mixup_on=mel", "augment.mixup_on: input should be 'waveform' or 'log_mel', not 'mel'"),
        ("augment.pitch_shift=-1", "augment.pitch_shift: .*not -1"),
        ("augment.pitch_shift=1.5", "augment.pitch_shift: .*not 1.5"),
        ("optim.betas=[0.9,1]", "optim.betas.1: input should be less than 1, not 1"),
        ("optim.pct_start=0", "optim.pct_start: input should be greater than 0, not 0"),
        ("model.initialisation=xavier", "model.initialisation: input should be 'he' or 'pytorch', not 'xavier'"),
        ("optim.zero_stage=3", "optim.zero_stage: .*not 3"),
        (
            "model.variant=RNN",
            "model.variant: 'RNN' is not a model; the models are ERANN-<s_m>-<width>, .*; CNN14",
        ),
        ("model.variant=ERANN-7", "model.variant: 'ERANN-7' is not an ERANN variant"),
        ("model.variant=CNN14x", "model.variant: there is no 'CNN14x'; write CNN14"),
        ("model.variant=ERANN-5-1", "model.variant: there is no ERANN-5-1: s_m is 0, 1, 2 or 3"),
        ("data.crop_s=3.3", "data: crop_s is a whole number of half seconds, not 3.3"),
        ("optim.micro_batch=5", r"optim: micro_batch \(5\) must divide global_batch \(32\)"),
        ("optim.epochs=3", "optim: give either examples or epochs"),
        ("run.workers=2", "run.workers is 2, but a step of 32 examples has only 1 micro-batches of 32"),
        ("run.name=../elsewhere", "run.name: .*not '../elsewhere'"),
        ("optim.lr", "'optim.lr': an override is written key.path=value"),
        ("optim.lr.x=1", "'optim.lr.x=1': can't set optim.lr.x"),
        ("data=null", "data: .*not None"),
        ("model.variant=5", "model.variant: input should be a valid string, not 5"),
        ("model.variant=", "model.variant: input should be a valid string, not None"),
        ("data.crop_s=.inf", "data.crop_s: .*not inf"),
        ("optim.lr=.nan", "optim.lr: .*not nan"),
        ("optim.lr=[1]", r"optim.lr: input should be a valid number, not \[1\]"),
        ("run.seed=-1", "run.seed: .*not -1"),
        ("run.workers=two", "run.workers: .*not 'two'"),
        ("data.cache={dir: x}", "data.cache.max_bytes: this key is required"),
        ("data.cache={max_bytes: 1GB}", "data.cache.dir: this key is required"),
        ("data.cache={dir: '', max_bytes: 1GB}", "data.cache.dir: .*not ''"),
        (
            "data.cache={dir: x, max_bytes: -5GB}",
            "data.cache.max_bytes: .* a number of bytes such as 200GB, not '-5GB'",
        ),
        ("data.cache={dir: x, max_bytes: 0}", "data.cache.max_bytes: input should be greater than 0, not 0"),
        (
            "data.cache={dir: x, max_bytes: much}",
            "data.cache.max_bytes: .* a number of bytes such as 200GB, not 'much'",
        ),
        ("data.cache={dir: x, max_bytes: 1GB, format: mp3}", "data.cache.format: .* 'flac' or 'pcm', not 'mp3'"),
        ("data.cache={dir: x, max_bytes: 1GB, form: pcm}", "data.cache.form: no such key; .* data.cache.format?"),
        ("data.cache=/scratch", "data.cache: input should be a section {key: value, ...}, not '/scratch'"),
        ("data.max_bad_clips=-1", "data.max_bad_clips: .*greater than or equal to 0, not -1"),
        ("data.max_bad_clips=some", "data.max_bad_clips: .*not 'some'"),
        ("data.train.1.keys=[a]", r"data.train.1.keys: input should be a valid string, not \['a'\]"),
        ("data.train.1.withut=a", "data.train.1.withut: no such key; did you mean data.train.1.without?"),
    ],
)
def test_what_is_wrong_is_named_with_its_key(path: Path, override: str, message: str) -> None:
    base = ["optim.lr=1.0"] if override.startswith("optim.lr.") else []
    with pytest.raises(UsageError, match=message) as error:
        load_recipe(path, [*base, override])
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("just words", "a recipe has the sections model, data"),
        ("model: {variant: ERANN-1-6}", "data: this key is required"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(error.value)


def test_missing_file() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml: No such file"):
        load_recipe(Path("nowhere.yaml"))
    with pytest.raises(UsageError, match=r"nowhere\.yaml: no such recipe; the built-in ones are .*esc10\.yaml"):
        find_recipe(Path("nowhere.yaml"))


@pytest.mark.parametrize("name", ["demo", "esc10", "audioset", "audioset_balanced", "audioset_fast"])
def test_recipes_that_come_along_are_valid(name: str) -> None:
    assert load_recipe(find_recipe(Path(f"{name}.yaml"))).run.name == name


def test_audioset_in_large_steps_is_the_papers_run_but_for_the_step() -> None:
    paper, fast = (load_recipe(find_recipe(Path(f"{name}.yaml"))) for name in ("audioset", "audioset_fast"))
    changed = {line.split(":")[0] for line in differences(paper, fast)}
    assert changed == {"optim.global_batch", "optim.lr"}
    for recipe in (paper, fast):
        assert recipe.optim.lr == pytest.approx(min(3e-3, 1e-3 * (recipe.optim.global_batch / 32) ** 0.5))
    assert fast.optim.global_batch // fast.optim.micro_batch == fast.run.max_workers


def test_cache_bad_clips_and_lists_of_keys(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.data.cache is None
    assert recipe.data.max_bad_clips == 0
    cache = "data.cache={dir: /scratch, max_bytes: 1.5GB}"
    recipe = load_recipe(path, [cache, "data.cache.format=pcm", "data.max_bad_clips=5", "data.train.1.without=bad"])
    assert recipe.data.cache is not None
    assert (recipe.data.cache.dir, recipe.data.cache.max_bytes) == ("/scratch", 1_500_000_000)
    assert recipe.data.cache.format == "pcm"
    assert recipe.data.max_bad_clips == 5
    assert recipe.data.train[1].without == "bad"
    assert parse_recipe(recipe.model_dump(mode="json"), "again") == recipe


def test_a_run_has_a_step_at_least(path: Path) -> None:
    assert load_recipe(path, ["optim.examples=null", "optim.epochs=0.01"]).steps(40) == 1


def test_only_what_decides_the_function_makes_a_difference(path: Path) -> None:
    recipe = load_recipe(path)
    same = load_recipe(path, ["run.launcher=none", "run.threads=2", "checkpoint.every=5", "data.loader_threads=9"])
    assert differences(recipe, same) == []
    assert recipe.hash() == same.hash()
    same = load_recipe(path, ["data.cache={dir: x, max_bytes: 1GB, format: pcm}", "data.max_bad_clips=3"])
    assert differences(recipe, same) == []
    assert recipe.hash() == same.hash()
    part = load_recipe(path, ["data.train.1.without=bad"])
    assert differences(recipe, part) == ["data.train.1.without: None -> bad"]
    assert recipe.hash() != part.hash()
    other = load_recipe(path, ["optim.lr=0.5", "run.seed=1", "data.train.0=z"])
    assert differences(recipe, other) == ["data.train.0.url: a -> z", "optim.lr: 0.001 -> 0.5", "run.seed: 0 -> 1"]
    assert recipe.hash() != other.hash()
    assert "evaluate" not in load_recipe(path, ["evaluate.every=7"]).function()
    padded = load_recipe(path, ["evaluate.pad_s=4"])
    assert differences(recipe, padded) == ["evaluate.pad_s: None -> 4.0"]
    assert recipe.hash() != padded.hash()


@pytest.mark.parametrize(
    ("override", "examples"),
    [("1e6", 10**6), ("1.0e+3", 1000), ("1_000", 1000), ("0100", 100), ("0o100", 64), ("'64'", 64)],
)
def test_whole_numbers_however_they_are_written(path: Path, override: str, examples: int) -> None:
    assert load_recipe(path, [f"optim.examples={override}"]).optim.examples == examples


def test_a_seed_is_decimal_in_files_and_overrides(path: Path) -> None:
    assert load_recipe(path, ["run.seed=010"]).run.seed == 10
    path.write_text(f"{RECIPE}\nrun: {{seed: 010}}")
    assert load_recipe(path).run.seed == 10


@pytest.mark.parametrize(
    ("twice", "key"),
    [("optim: {examples: 5}", "optim"), ("run:\n  seed: 1\n  threads: 2\n  seed: 2", "seed")],
)
def test_a_key_that_stands_twice(path: Path, twice: str, key: str) -> None:
    path.write_text(f"{RECIPE}\n{twice}\n")
    with pytest.raises(UsageError) as error:
        load_recipe(path)
    assert str(path) in str(error.value)
    assert f"'{key}'" in str(error.value)


def test_a_part_of_a_plain_path(path: Path) -> None:
    recipe = load_recipe(path, ["data.train=x", "data.train.fold=[1,2]", "data.eval.split=test", "data.eval.fold=[3]"])
    assert [(s.url, s.fold, s.split) for s in recipe.data.train] == [("x", [1, 2], None)]
    assert [(s.url, s.fold, s.split) for s in recipe.data.eval] == [("c", [3], "test")]
    recipe = load_recipe(path, ["data.train.0.fold=[4]"])
    assert [(s.url, s.fold) for s in recipe.data.train] == [("a", [4]), ("b", [1, 2])]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.train=[x", ["data.train", "YAML"]),
        ("run.seed=" + "9" * 5000, ["run.seed", "YAML"]),
        ("data.train=" + "[" * 1000, ["data.train", "YAML"]),
        ("data.train.fold=[1]", ["data.train", "list of 2"]),
        ("data.train.2.fold=[1]", ["data.train", "list of 2"]),
        ("data.train.-1=x", ["data.train", "list of 2"]),
        ("data.eval.url.x=1", ["data.eval.url", "'c'"]),
        ("a..b=1", ["a..b"]),
        ("=1", ["=1"]),
        ("x" * 9000 + "=1", ["xxx"]),
        ("run.dir=" + "x" * 9000, ["run.dir"]),
        ("data.train=&a [*a]", ["data.train"]),
    ],
)
def test_overrides_that_can_not_be_applied_are_named(path: Path, override: str, named: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        load_recipe(path, [override])
    assert all(part in str(error.value) for part in named)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "override",
    [
        "optim.micro_batch=1000000000000",
        "optim.global_batch=1000000000000",
        "optim.examples=1e300",
        "optim.lr=1e300",
        "optim.lr=true",
        "optim.clip_norm=.inf",
        "optim.div_factor=1e300",
        "optim.weight_decay=1e300",
        "optim.max_bad_steps=1e300",
        "model.variant=ERANN-1-100000",
        "model.variant=ERANN-1-" + "9" * 90,
        "data.loader_threads=1000000",
        "data.max_bad_clips=1e300",
        "data.train.1.fold=[1e300]",
        "data.train.1.fold=[-1]",
        "data.cache={dir: x, max_bytes: 1000000000000GB}",
        "data.cache={dir: x, max_bytes: true}",
        "evaluate.every=1e300",
        "evaluate.pad_s=1e300",
        "checkpoint.every=1e300",
        "checkpoint.keep_last=1e300",
        "checkpoint.keep_best=1e300",
        "checkpoint.max_failed=1e300",
        "run.threads=1000000",
        f"run.workers={MAX_WORKERS + 1}",
        "run.workers=true",
        "run.workers={min: 1, max: 1000000}",
        "run.max_failures=1e300",
        "run.hang_timeout=1e300",
        "run.wait_for_workers=.inf",
        "run.log_every=1e300",
        "run.seed=1e300",
        "run.name=" + "x" * 1000,
    ],
)
def test_values_that_can_only_be_mistakes(path: Path, override: str) -> None:
    with pytest.raises(UsageError) as error:
        load_recipe(path, [override])
    assert override.partition("=")[0] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_micro_batch_that_no_memory_holds(path: Path) -> None:
    with pytest.raises(UsageError, match=r"optim.micro_batch.*data.crop_s"):
        load_recipe(path, ["optim.micro_batch=16384", "optim.global_batch=16384", "data.crop_s=600"])


def test_the_home_folder_in_every_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    recipe = load_recipe(
        path,
        [
            "run.dir=~/runs",
            "model.init=~/model",
            "data.train=[~/a, {url: ~/b, keys: ~/keys, without: ~/bad}]",
            "data.eval=s3://bucket/~/c",
            "data.cache={dir: ~/cache, max_bytes: 1GB}",
        ],
    )
    assert recipe.run_url == "/home/me/runs/mine"
    assert recipe.model.init == "/home/me/model"
    a, b = recipe.data.train
    assert [a.url, b.url, b.keys, b.without] == [f"/home/me/{name}" for name in ("a", "b", "keys", "bad")]
    assert recipe.data.eval[0].url == "s3://bucket/~/c"
    assert recipe.data.cache is not None
    assert recipe.data.cache.dir == "/home/me/cache"
    assert load_recipe(path, ["run.dir=./~x"]).run.dir == "./~x"
    with pytest.raises(UsageError, match=r"run\.dir: .*~nobody-here"):
        load_recipe(path, ["run.dir=~nobody-here/x"])


def test_what_is_no_plain_file_ends_at_once(path: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.yaml").write_bytes(b"#" * 2_000_000)
    for strange in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "large.yaml"):
        with pytest.raises(UsageError, match=str(strange)) as error:
            load_recipe(strange)
        assert "\n" not in str(error.value)


def test_settings_of_any_text_are_read_back(path: Path) -> None:
    for name in ("a b: c", "😀", "ü'\"", "1e6", "[x"):
        assert load_recipe(path, [setting("run.dir", name)]).run.dir == name


def test_an_override_that_drops_a_fold_says_so(path: Path) -> None:
    path.write_text(RECIPE.replace("eval: c", "eval: {url: c, fold: [5], split: test}"))
    notes: list[str] = []
    recipe = load_recipe(path, ["data.eval=d", "data.train=[a, e]", "optim.lr=1"], notes.append)
    assert recipe.data.eval[0].fold is None
    assert notes == [
        "data.eval=d also drops the recipe's fold [5] and split test of data.eval; data.eval.url=d keeps it",
        "data.train=[a, e] also drops the recipe's fold [1, 2] of data.train",
    ]
    notes.clear()
    assert load_recipe(path, ["data.eval.url=d"], notes.append).data.eval[0].fold == [5]
    load_recipe(path, ["data.eval={url: d, fold: [5], split: test}"], notes.append)
    assert notes == []


@pytest.mark.parametrize("key", ["data.train", "data.eval", "data.train.0.url", "run.dir", "model.init"])
def test_credentials_in_a_url_are_not_repeated(path: Path, key: str) -> None:
    for url in ("s3://AKIAKEY:se/cret@bucket/x", "s3://AKIAKEY@bucket/x", "https://AKIAKEY:secret@bucket/x"):
        with pytest.raises(UsageError, match="credentials do not belong in a URL") as error:
            load_recipe(path, [f"{key}={url}"])
        assert "AKIAKEY" not in str(error.value)
    for url in ("s3://arn:aws:s3:us-west-2:123456789012:accesspoint/mine/x", "s3://bucket/a@b:c"):
        load_recipe(path, [f"{key}={url}"])
