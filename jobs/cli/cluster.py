"""The commands that write the configuration files of a cluster."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jobs.cli.options import Json, examples
from jobs.terminal.progress import console
from jobs.terminal.show import show

cluster_app = typer.Typer(
    no_args_is_help=True, help="Write the files that start a cluster.", rich_markup_mode="markdown"
)
render_app = typer.Typer(
    no_args_is_help=True,
    help="Write a cluster's configuration file to stdout, with comments on what to edit. See docs/clusters/index.md.",
    rich_markup_mode="markdown",
)
cluster_app.add_typer(render_app, name="render")

_EXAMPLE_COMMAND = ["erann", "pretrain", "audioset.yaml"]
Name = Annotated[str, typer.Option(help="The cluster's name.")]
MinWorkers = Annotated[int, typer.Option(min=0, help="GPU nodes that are started with the cluster.")]
MaxWorkers = Annotated[int, typer.Option(min=1, help="Maximum number of GPU nodes; they are added as runs need them.")]


def file_page(result: dict[str, Any]) -> None:
    """Print the file unchanged."""
    sys.stdout.write(result["file"])


@render_app.command(
    "aws",
    help="Write a cluster file for `ray up`: a head node without GPUs, and GPU nodes on spot instances whose NVMe "
    "disks hold the clip cache."
    + examples(
        "erann cluster render aws --region us-west-2 --ami ami-0123456789abcdef0 --head-profile erann-head "
        "--worker-profile erann-node --image 123456789012.dkr.ecr.us-west-2.amazonaws.com/erann:0.1.0",
    ),
)
def render_aws(
    region: Annotated[
        str, typer.Option(help="AWS region. Use the bucket's region; traffic between regions is charged.")
    ],
    ami: Annotated[str, typer.Option(help="Machine image of all nodes: Ubuntu with NVIDIA's driver and Docker.")],
    head_profile: Annotated[
        str, typer.Option(help="IAM instance profile of the head, with access to EC2 and the bucket.")
    ],
    worker_profile: Annotated[
        str, typer.Option(help="IAM instance profile of the GPU nodes, with access to the bucket.")
    ],
    image: Annotated[
        str | None, typer.Option(help="Container image with the program. Give either this or --wheel.")
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option(
            help="The program's wheel, installed on every node with this machine's versions. Give either this or "
            "--image."
        ),
    ] = None,
    name: Name = "erann",
    instance: Annotated[str, typer.Option(metavar="TYPE", help="Instance type of the GPU nodes.")] = "g6e.12xlarge",
    min_workers: MinWorkers = 0,
    max_workers: MaxWorkers = 1,
    spot: Annotated[bool, typer.Option("--spot/--on-demand", help="Purchasing option of the GPU nodes.")] = True,
    zone: Annotated[
        list[str] | None,
        typer.Option(help="Availability zone; may be repeated. Default: all zones of the region."),
    ] = None,
    subnet: Annotated[str | None, typer.Option(help="Subnet of all nodes. Default: one of the default VPC.")] = None,
    security_group: Annotated[
        str | None,
        typer.Option(
            help="Security group of all nodes. Default: Ray creates one that allows all traffic within it, and SSH "
            "from anywhere."
        ),
    ] = None,
    efa: Annotated[
        bool | None,
        typer.Option(
            "--efa/--no-efa",
            help="Use Elastic Fabric Adapters between the GPU nodes. Default: if the instance type has them and "
            "--max-workers is above 1.",
        ),
    ] = None,
    idle_minutes: Annotated[
        int, typer.Option(min=1, help="Minutes without work after which a GPU node is terminated.")
    ] = 10,
    as_json: Json = False,
) -> None:
    from cluster.render import aws

    cluster = aws.AwsCluster(
        name=name,
        region=region,
        zones=zone or [],
        ami=ami,
        instance=instance,
        min_workers=min_workers,
        max_workers=max_workers,
        spot=spot,
        idle_minutes=idle_minutes,
        head_profile=head_profile,
        worker_profile=worker_profile,
        image=image,
        wheel=wheel,
        subnet=subnet,
        security_group=security_group,
        efa=efa,
    )
    show({"file": aws.render_aws(cluster)}, as_json, file_page)


@render_app.command(
    "kubernetes",
    help="Write a manifest for KubeRay: a RayJob, which runs the command given after -- and is removed with its "
    "cluster, or a RayCluster, which stays."
    + examples(
        "erann cluster render kubernetes --image ghcr.io/me/erann:0.1.0 --gpus 8 --max-workers 4 --secret "
        "s3-keys -- erann pretrain audioset.yaml data.train=s3://bucket/train run.dir=s3://bucket/runs",
    ),
)
def render_kubernetes(
    context: typer.Context,
    image: Annotated[str, typer.Option(help="Container image with the program.")],
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- erann ...]",
            show_default=False,
            help="The command to run. Default: erann pretrain audioset.yaml.",
        ),
    ] = None,
    kind: Annotated[Literal["RayJob", "RayCluster"], typer.Option(help="Kind of the manifest.")] = "RayJob",
    name: Name = "erann",
    min_workers: MinWorkers = 0,
    max_workers: MaxWorkers = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs per GPU node; give all that a node has.")] = 1,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs per GPU node. Default: 8 per GPU.")] = None,
    memory: Annotated[int | None, typer.Option(min=4, help="GiB of memory per GPU node. Default: 32 per GPU.")] = None,
    cache: Annotated[int, typer.Option(min=1, help="GiB of disk for the clip cache of a GPU node.")] = 400,
    storage_class: Annotated[
        str | None, typer.Option(help="Storage class of the cache. Default: the node's own disk (emptyDir).")
    ] = None,
    secret: Annotated[
        str | None,
        typer.Option(help="Name of a secret whose keys become environment variables, such as S3 credentials."),
    ] = None,
    service_account: Annotated[
        str | None, typer.Option(help="Service account of the pods, which grants access to the bucket without keys.")
    ] = None,
    s3_region: Annotated[str | None, typer.Option(help="AWS_DEFAULT_REGION of the pods.")] = None,
    s3_endpoint: Annotated[
        str | None, typer.Option(help="AWS_ENDPOINT_URL of the pods, unless the bucket is Amazon's.")
    ] = None,
    node_selector: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Node selector of the GPU nodes; may be repeated.")
    ] = None,
    toleration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[=VALUE][:EFFECT]",
            help="Taint of the GPU nodes to tolerate, besides nvidia.com/gpu:NoSchedule; may be repeated.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    from cluster.render import kubernetes
    from jobs.submission.submit import check_command

    is_job = kind == "RayJob"
    cluster = kubernetes.KubernetesCluster(
        kind=kind,
        name=name,
        image=image,
        command=command or (_EXAMPLE_COMMAND if is_job else []),
        min_workers=min_workers,
        max_workers=max_workers,
        gpus=gpus,
        cpus=cpus or 8 * gpus,
        memory=memory or 32 * gpus,
        cache=cache,
        storage_class=storage_class,
        secret=secret,
        service_account=service_account,
        s3_region=s3_region,
        s3_endpoint=s3_endpoint,
        node_selector=node_selector or [],
        tolerations=toleration or [],
    )
    text = kubernetes.render_kubernetes(cluster)
    if is_job:
        check_command(context, cluster.command[1:])
    if is_job and not any(word.startswith("run.dir=s3://") for word in cluster.command):
        console.print("note: the command sets no run.dir=s3://...; files on a pod's disk are lost with the pod")
    show({"file": text}, as_json, file_page)


@render_app.command(
    "slurm",
    help="Write a job script for `sbatch` that starts Ray on whole Slurm nodes and runs one erann command on it.\n\n"
    "Before the time limit the job saves a checkpoint and is requeued; it then resumes from that checkpoint. The "
    "folder in which it is submitted, the shards and the run's folder must be on a file system that all nodes share."
    + examples(
        "erann cluster render slurm --nodes 2 --gpus-per-node 4 --time 12:00:00 -- erann pretrain "
        "audioset.yaml run.dir=/shared/runs run.workers=8 > job.sh",
    ),
)
def render_slurm(
    context: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- erann ...]",
            help="The command to run. Default: erann pretrain audioset.yaml run.dir=/shared/runs.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes, each used exclusively.")] = 1,
    gpus_per_node: Annotated[
        str, typer.Option(metavar="[TYPE:]NUMBER", help="GPUs per node; 0 to train on CPUs.")
    ] = "1",
    time: Annotated[str, typer.Option(help="Time limit of one start, in sbatch's format.")] = "24:00:00",
    notice: Annotated[
        int, typer.Option(min=1, max=65_535, help="Seconds before the limit at which to save a checkpoint and stop.")
    ] = 300,
    requeue: Annotated[bool, typer.Option(help="Requeue the job until the command has finished.")] = True,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    job_name: Annotated[str, typer.Option(help="Name of the job and of its log files.")] = "erann",
    module: Annotated[list[str] | None, typer.Option(help="Environment module to load; may be repeated.")] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(help="Shell line that makes ray and erann available; may be repeated."),
    ] = None,
    container: Annotated[
        str | None, typer.Option(metavar="IMAGE.sif", help="Apptainer image in which to run ray and erann.")
    ] = None,
    bind: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE[:TARGET]", help="Folder to mount in the container; may be repeated."),
    ] = None,
    scratch: Annotated[str, typer.Option(help="Folder on each node's local disk for Ray's files.")] = "/tmp",
    as_json: Json = False,
) -> None:
    from cluster.render import slurm
    from jobs.submission.submit import check_command

    job = slurm.SlurmJob(
        command=command or ["erann", "pretrain", "audioset.yaml", "run.dir=/shared/runs"],
        name=job_name,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        time=time,
        notice=notice,
        requeue=requeue,
        partition=partition,
        account=account,
        modules=module or [],
        setup=setup or [],
        container=container,
        binds=bind or [],
        scratch=scratch,
    )
    text = slurm.render_slurm(job)
    check_command(context, job.command[1:])
    show({"file": text}, as_json, file_page)


def add_to(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.add_typer(cluster_app, name="cluster", rich_help_panel="Clusters")
