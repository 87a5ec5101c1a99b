"""The commands that write the files which start a cluster."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jobs.cli.options import Json, examples
from jobs.terminal.progress import console
from jobs.terminal.show import show

cluster_app = typer.Typer(no_args_is_help=True, help="Files that start a cluster.", rich_markup_mode="markdown")
render_app = typer.Typer(
    no_args_is_help=True,
    help="Write a cluster's file on stdout, with comments to edit it by: docs/clusters/index.md.",
    rich_markup_mode="markdown",
)
cluster_app.add_typer(render_app, name="render")

_EXAMPLE_COMMAND = ["erann", "pretrain", "audioset.yaml"]
Name = Annotated[str, typer.Option(help="The cluster's name.")]
MinWorkers = Annotated[int, typer.Option(min=0, help="GPU nodes that are there from the start.")]
MaxWorkers = Annotated[int, typer.Option(min=1, help="GPU nodes at most; they come as a run asks for them.")]


def file_page(result: dict[str, Any]) -> None:
    """The file as it is."""
    sys.stdout.write(result["file"])


@render_app.command(
    "aws",
    help="A file for `ray up`: a head without GPUs, and GPU nodes on spot instances with their NVMe disks for the "
    "clip cache."
    + examples(
        "erann cluster render aws --region us-west-2 --ami ami-0123456789abcdef0 --head-profile erann-head "
        "--worker-profile erann-node --image 123456789012.dkr.ecr.us-west-2.amazonaws.com/erann:0.1.0",
    ),
)
def render_aws(
    region: Annotated[str, typer.Option(help="Where the bucket is too, or its traffic costs money.")],
    ami: Annotated[str, typer.Option(help="Machine image of all nodes: Ubuntu with NVIDIA's driver and Docker.")],
    head_profile: Annotated[str, typer.Option(help="IAM instance profile of the head: EC2, and the bucket.")],
    worker_profile: Annotated[str, typer.Option(help="IAM instance profile of the GPU nodes: the bucket.")],
    image: Annotated[str | None, typer.Option(help="Container image with the program; or --wheel.")] = None,
    wheel: Annotated[
        Path | None,
        typer.Option(help="The program's wheel, for every node, with this machine's versions; or --image."),
    ] = None,
    name: Name = "erann",
    instance: Annotated[str, typer.Option(metavar="TYPE", help="Of the GPU nodes.")] = "g6e.12xlarge",
    min_workers: MinWorkers = 0,
    max_workers: MaxWorkers = 1,
    spot: Annotated[bool, typer.Option("--spot/--on-demand", help="How the GPU nodes are paid.")] = True,
    zone: Annotated[list[str] | None, typer.Option(help="Of the region; may be given again. All if not given.")] = None,
    subnet: Annotated[str | None, typer.Option(help="Of all nodes; one of the default VPC's if not given.")] = None,
    security_group: Annotated[
        str | None, typer.Option(help="Of all nodes; if not given, Ray makes one: all within it, SSH from anywhere.")
    ] = None,
    efa: Annotated[
        bool | None,
        typer.Option(
            "--efa/--no-efa",
            help="Elastic Fabric Adapters between the GPU nodes; if not given, where the type has them and "
            "--max-workers is above 1.",
        ),
    ] = None,
    idle_minutes: Annotated[int, typer.Option(min=1, help="Without work, after which a GPU node is given back.")] = 10,
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
    help="A manifest for KubeRay: a RayJob, which runs a command behind -- and goes, or a RayCluster, which stays."
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
        typer.Argument(metavar="[-- erann ...]", show_default=False, help="erann pretrain audioset.yaml if not given."),
    ] = None,
    kind: Annotated[Literal["RayJob", "RayCluster"], typer.Option()] = "RayJob",
    name: Name = "erann",
    min_workers: MinWorkers = 0,
    max_workers: MaxWorkers = 1,
    gpus: Annotated[int, typer.Option(min=1, help="Of a GPU node: give all that it has.")] = 1,
    cpus: Annotated[int | None, typer.Option(min=1, help="Of a GPU node; 8 for each GPU if not given.")] = None,
    memory: Annotated[int | None, typer.Option(min=4, help="GiB of a GPU node; 32 for each GPU if not given.")] = None,
    cache: Annotated[int, typer.Option(min=1, help="GiB for a GPU node's clip cache.")] = 400,
    storage_class: Annotated[
        str | None, typer.Option(help="For the cache; the node's own disk (emptyDir) if not given.")
    ] = None,
    secret: Annotated[
        str | None, typer.Option(help="Name of a secret whose keys become environment variables, such as S3's.")
    ] = None,
    service_account: Annotated[str | None, typer.Option(help="Of the pods: a right to the bucket, no keys.")] = None,
    s3_region: Annotated[str | None, typer.Option(help="AWS_DEFAULT_REGION of the pods.")] = None,
    s3_endpoint: Annotated[str | None, typer.Option(help="AWS_ENDPOINT_URL of the pods, if not Amazon's.")] = None,
    node_selector: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Of the GPU nodes; may be given again.")
    ] = None,
    toleration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[=VALUE][:EFFECT]",
            help="Taint of the GPU nodes, beside nvidia.com/gpu:NoSchedule; may be given again.",
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
        console.print("note: the command sets no run.dir=s3://...; what it writes to a pod's disk goes with the pod")
    show({"file": text}, as_json, file_page)


@render_app.command(
    "slurm",
    help="A job for `sbatch`: Ray on whole nodes of Slurm, and one erann command on it. Ahead of the time limit it "
    "saves a checkpoint and goes back into the queue; requeued, it goes on from the last one. The folder where it is "
    "submitted, the shards and the run's folder must be on a file system that all nodes share."
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
            help="erann pretrain audioset.yaml run.dir=/shared/runs if not given.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Each of them whole.")] = 1,
    gpus_per_node: Annotated[str, typer.Option(metavar="[TYPE:]NUMBER", help="0: train on CPUs.")] = "1",
    time: Annotated[str, typer.Option(help="Limit of one start, as sbatch takes it.")] = "24:00:00",
    notice: Annotated[
        int, typer.Option(min=1, max=65_535, help="Seconds before the limit in which to save a checkpoint and end.")
    ] = 300,
    requeue: Annotated[bool, typer.Option(help="Go back into the queue until the command has come to its end.")] = True,
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    job_name: Annotated[str, typer.Option(help="Its logs are called so too.")] = "erann",
    module: Annotated[list[str] | None, typer.Option(help="To load before; may be given again.")] = None,
    setup: Annotated[
        list[str] | None, typer.Option(help="A line of shell that brings ray and erann; may be given again.")
    ] = None,
    container: Annotated[
        str | None, typer.Option(metavar="IMAGE.sif", help="Run ray and erann in it, with Apptainer.")
    ] = None,
    bind: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE[:TARGET]", help="A folder that the container sees too; may be given again."),
    ] = None,
    scratch: Annotated[str, typer.Option(help="A folder on each node's own disk, for Ray's files.")] = "/tmp",
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
    """Put the commands into the app."""
    app.add_typer(cluster_app, name="cluster")
