
# From here on, the script is the same for all jobs.

log=$SLURM_JOB_NAME-$SLURM_JOB_ID.log # This script's output goes there too: --output

say() { echo "$(date '+%F %T') $*"; }

# Runs on all nodes at once: Ray on each node, and the command on the first one.
on_node() {
    # The node is exclusive to this job: a running Ray was left by an earlier start of it.
    "${container[@]}" ray stop --force
    rm -rf "$RAY_TMPDIR"
    mkdir -m 700 "$RAY_TMPDIR" || exit
    trap 'rm -rf "$RAY_TMPDIR"' EXIT
    export TMPDIR=$RAY_TMPDIR
    "${container[@]}" ray symmetric-run --address="$RAY_ADDRESS" --min-nodes="$SLURM_JOB_NUM_NODES" \
        --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="$gpus" \
        -- bash -c 'echo $$ > "$TMPDIR/command.pid"; exec "$@" >> "$0" 2>&1' "$log" "${command[@]}"
}

program=${container[0]:-ray}
if ! type "$program" > /dev/null; then
    say "no $program on $SLURMD_NODENAME: render the job again with what provides it (--module, --setup)"
    exit 2
fi

# This script runs on the first of the job's nodes, which is also Ray's head.
if ((SLURM_JOB_NUM_NODES == 1)); then
    head=127.0.0.1
else
    # Resolved on another node: on the node itself, its own name is often loopback.
    head=$(srun --nodes=1 --ntasks=1 --relative=1 getent ahostsv4 "$SLURMD_NODENAME" | awk 'NR == 1 {print $1}')
    if [[ ! $head ]]; then
        say "the job's other nodes know no address of $SLURMD_NODENAME"
        exit 1
    fi
fi
# Other jobs have other ports, and can't use this one's without the token, which changes with every start and is passed
# to the nodes only in the environment.
export RAY_ADDRESS=$head:$((20000 + SLURM_JOB_ID % 10000)) RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN
export RAY_TMPDIR=$scratch/erann-$SLURM_JOB_ID RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
# Seconds for all nodes to come up, and for the others to end after the first one has.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 RAY_gcs_rpc_server_reconnect_timeout_s=20

noticed=
on_notice() {
    noticed=1
    if [[ -s $RAY_TMPDIR/command.pid ]]; then
        say "notice from Slurm, as ahead of the time limit: the command is to save a checkpoint and end"
        kill -USR1 "$(< "$RAY_TMPDIR/command.pid")" # Only the command: Ray must keep running until it has saved.
    else
        say "notice from Slurm, as ahead of the time limit, before the command has begun: it needs more time"
        requeue=0 # otherwise it would be requeued for ever
        kill "$step"
    fi
}
trap on_notice USR1

say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST; what Ray says is in ${log%.log}-NODE.log"
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
    --open-mode=append --output="${log%.log}-%N.log" \
    bash -c "$(declare -p log command container gpus); $(declare -f on_node); on_node" &
step=$!
while # a signal interrupts the wait, not the step
    wait "$step"
    code=$?
    kill -0 "$step" 2> /dev/null
do :; done

if [[ $noticed ]] && ((code != 0)); then
    if ((requeue)); then
        say "not finished: back into the queue"
        scontrol requeue "$SLURM_JOB_ID" && exit
    fi
    say "not finished: sbatch this file again, and the run goes on"
fi
say "ended with exit code $code"
exit "$code"
