#!/usr/bin/env bash
# deepspeed over plain ssh: one command on one host starts `deepspeed --no_ssh` on all. Needs ssh without a password to
# every host, and the same folders on all of them; no pdsh. When one host fails, the others are stopped at once.
#
#     bash launch/ssh.sh --hostfile hosts -- --data-dir /data/imagenet --model B/16
#     --bind               a share of the host's cores for each rank (needs numactl on every host)

. "$(dirname "$0")/common.sh"

# shellcheck disable=SC2034
EXTRA_FLAGS=--bind
read_arguments "$@"
[ -n "$hostfile" ] || fail "--hostfile is needed: one host a line, NAME slots=N. On one machine use launch/torchrun.sh"
[ -z "${bind:-}" ] || need numactl "Debian: apt-get install numactl"
needed_files=("$hostfile")
check_hosts
node_command() {
    deepspeed_on_this_host "$1"
}
run_job_on_every_host
