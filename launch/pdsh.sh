#!/usr/bin/env bash
# deepspeed --hostfile over pdsh: one command on one host starts the ranks on all. Needs pdsh here, ssh without a
# password to every host, and the same folders on all of them.
#
#     bash launch/pdsh.sh --hostfile hosts -- --data-dir /data/imagenet --model B/16

. "$(dirname "$0")/common.sh"

read_arguments "$@"
[ -n "$hostfile" ] || fail "--hostfile is needed: one host a line, NAME slots=N. On one machine use launch/torchrun.sh"
need pdsh "Debian: apt-get install pdsh; without it use launch/ssh.sh"
check_hosts
write_environment_file
watched=1  # pdsh waits for every host, also when one has failed
run_job "$PYTHON" -m deepspeed.launcher.runner --hostfile "$hostfile" --launcher pdsh --force_multi \
    --launcher_args="$launcher_args" --master_addr "$master_addr" --master_port "$master_port" \
    "$program" "${program_args[@]}"
