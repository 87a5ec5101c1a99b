
# From here on all jobs are the same.

log=$SLURM_JOB_NAME-$SLURM_JOB_ID.log # where this script writes too: --output

say() { echo "$(date '+%F %T') $*"; }

# On each node at the same time: Ray's part of the cluster, and on the first node the command.
on_node() {
    # The node is this job's alone: a Ray that runs there was left behind by an earlier start of it.
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
    say "no $program on $SLURMD_NODENAME: render the job anew with what brings it (--module, --setup)"
    exit 2
fi

# The first of the job's nodes is where this runs, and Ray's head.
if ((SLURM_JOB_NUM_NODES == 1)); then
    head=127.0.0.1
else
    # As another node knows it: on a node itself the node's own name is often loopback.
    head=$(srun --nodes=1 --ntasks=1 --relative=1 getent ahostsv4 "$SLURMD_NODENAME" | awk 'NR == 1 {print $1}')
    if [[ ! $head ]]; then
        say "the job's other nodes know no address of $SLURMD_NODENAME"
        exit 1
    fi
fi
# Other jobs have other ports, and no use of this one's without the token, which changes from start to start and goes to
# the nodes in the environment alone.
export RAY_ADDRESS=$head:$((20000 + SLURM_JOB_ID % 10000)) RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN
export RAY_TMPDIR=$scratch/erann-$SLURM_JOB_ID RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
# Seconds in which all nodes are to come up, and after which they end when the first one has.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 RAY_gcs_rpc_server_reconnect_timeout_s=20

noticed=
on_notice() {
    noticed=1
    if [[ -s $RAY_TMPDIR/command.pid ]]; then
        say "notice from Slurm, as ahead of the time limit: the command is to save a checkpoint and end"
        kill -USR1 "$(< "$RAY_TMPDIR/command.pid")" # it alone: Ray is to live until it has saved
    else
        say "notice from Slurm, as ahead of the time limit, before the command has begun: it needs more time"
        requeue=0 # or it would go round for ever
        kill "$step"
    fi
}
trap on_notice USR1

say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST; what Ray says is in ${log%.log}-NODE.log"
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
    --open-mode=append --output="${log%.log}-%N.log" \
    bash -c "$(declare -p log command container gpus); $(declare -f on_node); on_node" &
step=$!
while # a signal ends the waiting, not the step
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
