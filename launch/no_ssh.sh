#!/usr/bin/env bash
# deepspeed --no_ssh: the same command on every host, each with its own --node-rank, where hosts cannot log in to each
# other and something else (a cloud's job service, a terminal each) starts programs on them.
#
#     bash launch/no_ssh.sh --hostfile hosts --node-rank 0 -- --data-dir /data/imagenet    # on the first host
#     bash launch/no_ssh.sh --hostfile hosts --node-rank 1 -- --data-dir /data/imagenet    # on the second
#     --bind               a share of the host's cores for each rank (needs numactl)
#
# Hosts wait for each other as long as DEEPSPEED_TIMEOUT says (minutes, 10 if not set).

. "$(dirname "$0")/common.sh"

# shellcheck disable=SC2034
EXTRA_OPTIONS=--node-rank EXTRA_FLAGS=--bind
read_arguments "$@"
[ -n "$hostfile" ] || fail "--hostfile is needed: one host a line, NAME slots=N, the same file on every host"
case ${node_rank:-} in '' | *[!0-9]*) fail "--node-rank is needed: 0 on the first host of $hostfile, 1 on the second, ..." ;;
esac
[ "$node_rank" -lt ${#hosts[@]} ] || fail "--node-rank $node_rank, but $hostfile has ${#hosts[@]} hosts"
[ -z "${bind:-}" ] || need numactl "Debian: apt-get install numactl"
master_addr=${master_addr:-${hosts[0]}}
[ "$node_rank" != 0 ] || check_local_port
deepspeed_on_this_host "$node_rank"
hosts=()  # the others end what is theirs
run_job "${node_command[@]}"
