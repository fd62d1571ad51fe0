#!/usr/bin/env bash
# torchrun: on this machine, or with a hostfile on all of its hosts over ssh, with rendezvous on the first one. Ranks
# that fail are started again, all of them, and go on from the newest checkpoint.
#
#     bash launch/torchrun.sh -- --data-dir /data/imagenet                            # every GPU of this machine
#     bash launch/torchrun.sh --hostfile hosts --restarts 3 -- --data-dir /data/imagenet --resume
#     --restarts N         times that the ranks may be started again (default 0)
#     --node-rank N        start only this host's ranks, and use no ssh: the same command on every host

. "$(dirname "$0")/common.sh"

# shellcheck disable=SC2034
EXTRA_OPTIONS="--restarts --node-rank"
read_arguments "$@"
restarts=${restarts:-0}
case $restarts in *[!0-9]*) fail "--restarts $restarts is not a number" ;; esac
[ "$restarts" = 0 ] || needs_resume "--restarts"
read -ra more <<< "$launcher_args"
# With the store shared between rounds, ranks that start again may read the addresses of those that died, and fail for
# good (pytorch/pytorch#135712; seen with torch 2.13 when a rank on another host than the first dies).
job_env+=("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")

node_command() {  # I: into node_command
    node_command=("$PYTHON" "$ROOT/launch/elastic.py" --nnodes ${#hosts[@]} --nproc-per-node "${slots_of[$1]}"
        --max-restarts "$restarts" --rdzv-backend c10d --rdzv-endpoint "$master_addr:$master_port"
        --rdzv-id "$rendezvous" --rdzv-conf "is_host=$(($1 == 0 ? 1 : 0))"
        ${more[@]+"${more[@]}"} "$program" "${program_args[@]}")
}

rendezvous=$job
if [ -z "$hostfile" ]; then
    [ -z "$master_addr" ] || fail "--master-addr is for a job with --hostfile: one machine's ranks meet on a port of their own"
    local_slots
    run_job "$PYTHON" "$ROOT/launch/elastic.py" --standalone --nproc-per-node "$slots" --max-restarts "$restarts" \
        ${more[@]+"${more[@]}"} "$program" "${program_args[@]}"
elif [ -z "${node_rank:-}" ]; then
    needed_files=("$ROOT/launch/elastic.py")
    check_hosts
    run_job_on_every_host
else
    case $node_rank in *[!0-9]*) fail "--node-rank $node_rank is not a number" ;; esac
    [ "$node_rank" -lt ${#hosts[@]} ] || fail "--node-rank $node_rank, but $hostfile has ${#hosts[@]} hosts"
    rendezvous=looksam  # the same on every host
    master_addr=${master_addr:-${hosts[0]}}
    [ "$node_rank" != 0 ] || check_local_port
    node_command "$node_rank"
    hosts=()
    run_job "${node_command[@]}"
fi
