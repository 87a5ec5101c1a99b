"""EC2 instance types with NVIDIA GPUs and local NVMe disks.

The data is from the EC2 API's DescribeInstanceTypes and the pages under
https://docs.aws.amazon.com/ec2/latest/instancetypes/ac.html.
"""

from dataclasses import dataclass

from erann_dist.errors import UsageError


@dataclass(frozen=True)
class Instance:
    name: str
    gpus: int
    gpu: str  # with its memory
    vcpus: int  # two per core
    memory: int  # GiB
    nvme: int  # GB, total of all disks
    network: int  # Gbit/s; only in bursts for the smallest sizes
    efa_cards: int  # network cards with an Elastic Fabric Adapter


INSTANCES = [
    Instance("g5.4xlarge", 1, "A10G 24 GB", 16, 64, 600, 25, 0),
    Instance("g5.12xlarge", 4, "A10G 24 GB", 48, 192, 3800, 40, 1),
    Instance("g5.48xlarge", 8, "A10G 24 GB", 192, 768, 7600, 100, 1),
    Instance("g6.4xlarge", 1, "L4 24 GB", 16, 64, 600, 25, 0),
    Instance("g6.12xlarge", 4, "L4 24 GB", 48, 192, 3760, 40, 1),
    Instance("g6.48xlarge", 8, "L4 24 GB", 192, 768, 7520, 100, 1),
    Instance("g6e.4xlarge", 1, "L40S 48 GB", 16, 128, 600, 20, 0),
    Instance("g6e.12xlarge", 4, "L40S 48 GB", 48, 384, 3800, 100, 1),
    Instance("g6e.24xlarge", 4, "L40S 48 GB", 96, 768, 3800, 200, 2),
    Instance("g6e.48xlarge", 8, "L40S 48 GB", 192, 1536, 7600, 400, 4),
    Instance("p4d.24xlarge", 8, "A100 40 GB", 96, 1152, 8000, 400, 4),
    Instance("p4de.24xlarge", 8, "A100 80 GB", 96, 1152, 8000, 400, 4),
    Instance("p5.4xlarge", 1, "H100 80 GB", 16, 256, 3800, 100, 1),
    Instance("p5.48xlarge", 8, "H100 80 GB", 192, 2048, 30400, 3200, 32),
    Instance("p5e.48xlarge", 8, "H200 141 GB", 192, 2048, 30400, 3200, 32),
    Instance("p5en.48xlarge", 8, "H200 141 GB", 192, 2048, 30400, 3200, 16),
]


def find_instance(name: str) -> Instance:
    """The instance type of that name. Raises UsageError, which lists the known types."""
    for instance in INSTANCES:
        if instance.name == name:
            return instance
    known = ", ".join(instance.name for instance in INSTANCES)
    raise UsageError(f"--instance {name}: not among the supported types; give one of {known}")
