"""What to change in a recipe for the number of workers that it runs on: plan predicts it, preflight measures it."""

from erann_dist.recipe import OptimSection
from erann_dist.words import count

_ALL_REDUCE = 0.1  # Share of a step spent in the all-reduce, above which to advise.


def on_workers(optim: OptimSection, workers: int, capacity: int, all_reduce_share: float) -> list[str]:
    """One line for each thing that wastes workers.

    workers: how many the run has. capacity: how many could run. all_reduce_share: of a step's time.
    """
    micro_batches = optim.global_batch // optim.micro_batch
    lines = []
    if capacity > micro_batches:
        lines.append(
            f"there is capacity for {capacity} workers, but a step of {optim.global_batch} examples has only "
            f"{count(micro_batches, 'micro-batch')} of {optim.micro_batch}: run several trainings at "
            f"once, or raise optim.global_batch to {capacity * optim.micro_batch} (which may need another optim.lr)"
        )
    if idle := -micro_batches % workers:
        lines.append(
            f"{idle} of the {workers} workers idle for part of each step: its "
            f"{count(micro_batches, 'micro-batch')} don't divide evenly"
        )
    if all_reduce_share > _ALL_REDUCE:
        lines.append(
            f"the all-reduce takes {all_reduce_share:.0%} of a step; a larger optim.global_batch or a faster network "
            "between the nodes would reduce it"
        )
    return lines
