"""Names of other packages that those do not promise to keep. Each package that is used so has an upper bound.

When one of these tests fails after a new release: the name is gone, so the code that uses it has to change before
pyproject.toml admits that release.
"""

import ast
import importlib
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

# package: what is used of it, as module:name, and the file that uses it.
PRIVATE = {
    "torch": {
        "torch._C._distributed_c10d:FileStore": "cluster/torchrun.py",
        "torch._C._distributed_c10d:HashStore": "erann_dist/train/distributed.py",
        "torch._C._distributed_c10d:Store": "erann_dist/train/distributed.py",
        "torch._C._distributed_c10d:TCPStore": "cluster/preflight/collectives.py",
        "torch:_foreach_copy_": "erann_dist/train/batchnorm.py",
    },
    "s3fs": {"s3fs:S3FileSystem._call_s3": "erann_dist/storage/s3.py"},
    "deepspeed": {
        "deepspeed.ops:__compatible_ops__": "erann_dist/train/engine.py",
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state": (
            "erann_dist/train/engine.py"
        ),
    },
    "ray": {
        "ray._private.ray_constants:ENABLE_RAY_CLUSTER": "cluster/embedded.py",
        "ray._private.services:ConsolePopen": "cluster/embedded.py",
        "ray.train.torch:TorchTrainer._create_default_callbacks": "cluster/ray_train.py",
        "ray.train.torch:TorchTrainer._register_sigint_handler": "cluster/ray_train.py",
        "ray.train.torch.config:_set_torch_distributed_env_vars": "cluster/ray_train.py",
        "ray.train.torch.config:_TorchBackend": "cluster/ray_train.py",
        "ray.train.v2._internal.callbacks.datasets:DatasetsCallback": "cluster/ray_train.py",
        "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback": (
            "cluster/ray_train.py"
        ),
        "ray.train.v2._internal.exceptions:WorkerHealthCheckFailedError": "cluster/ray_train.py",
        "ray.train.v2._internal.exceptions:WorkerHealthCheckTimeoutError": "cluster/ray_train.py",
        "ray.train.v2._internal.execution.context:get_train_context": "cluster/ray_train.py",
    },
}
# Set on an instance, so that a class does not show it: a test that uses it fails when it is gone.
ON_INSTANCES = {"_server_ray_version": "cluster/submit/ray_jobs.py"}
SOURCES = [path for name in ("erann_dist", "shards", "cluster", "jobs") for path in (ROOT / name).rglob("*.py")]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize(("package", "name"), [(package, name) for package in PRIVATE for name in PRIVATE[package]])
def test_it_is_still_there(package: str, name: str) -> None:
    module, _, path = name.partition(":")
    user = PRIVATE[package][name]
    try:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        pytest.fail(
            f"{package} has no {name} any more, which {user} uses: adapt it, or bound {package} below this version"
        )


@pytest.mark.parametrize("package", PRIVATE)
def test_the_package_has_an_upper_bound(package: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [each for each in map(Requirement, project["dependencies"]) if each.name == package]
    assert any(bound.operator in ("==", "<", "<=", "~=") for bound in requirement.specifier)


def test_no_other_is_imported() -> None:
    listed = {name for names in PRIVATE.values() for name in names}
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if any(map(is_private, [*node.module.split("."), alias.name])):
                        found.add(f"{node.module}:{alias.name}")
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if any(map(is_private, alias.name.split(".")))}
    # A private module is imported as a whole where an attribute of it is set.
    modules = {name.partition(":")[0] for name in listed}
    whole = {":".join(module.rsplit(".", 1)) for module in modules}
    assert found <= listed | whole, found - listed


def test_no_other_attribute_is_used() -> None:
    """A private attribute is one of those above, or the file itself has it: of self, as a function or as a class."""
    attributes = {name.rpartition(":")[2].rpartition(".")[2] for names in PRIVATE.values() for name in names}
    for path in SOURCES:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        private = [node for node in nodes if isinstance(node, ast.Attribute) and is_private(node.attr)]
        of_self = {
            node.attr for node in private if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        }
        own = of_self | {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        others = {node.attr for node in private} - own - attributes - ON_INSTANCES.keys()
        assert not others, f"{path.relative_to(ROOT)} uses {others}"
