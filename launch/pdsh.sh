#!/usr/bin/env bash
# deepspeed --hostfile over pdsh: one command on one host starts the ranks on all. Needs pdsh here, ssh without a
# password to every host, and the same folders on all of them.
#
#     bash launch/pdsh.sh --hostfile hosts -- --data-dir /data/imagenet --model B/16

. "$(dirname "$0")/common.sh"

read_arguments "$@"
[ -n "$hostfile" ] || fail "--hostfile is needed: one host a line, NAME slots=N. On one machine use launch/torchrun.sh"
need pdsh "Debian: apt-get install pdsh; without it use launch/ssh.sh"
# DeepSpeed puts values between quotes that its remote shell still looks into, and words without a blank between none.
for word in "${job_env[@]}"; do
    case $word in *[\"\$\`\\%]* | *$'\n'*) fail "the value of ${word%%=*} has a quote, \$, \`, \\, % or a line break, which \
DeepSpeed's pdsh launcher does not hand on: use launch/ssh.sh" ;; esac
done
for word in "$PWD" "$program" "${program_args[@]}"; do
    case $word in '' | *[!A-Za-z0-9_@+=:,./~^\ -]*) fail "'$word' is empty or has a character that DeepSpeed's pdsh launcher does not hand on: \
use launch/ssh.sh" ;; esac
done
case $PWD$program$PYTHON in *' '*) fail "a folder's name has a blank, which DeepSpeed's pdsh launcher does not hand on: use launch/ssh.sh" ;; esac
check_hosts
write_environment_file

# pdsh waits for every host, also when one has failed and the ranks of the others hang in a collective; but it tells on
# standard error. DeepSpeed's runner is then killed, not asked: asked, it kills by name (pkill -f) what looks like its job.
# shellcheck disable=SC2317  # supervise calls it
until_a_host_fails() {
    local errors line
    errors=$(mktemp -u)
    mkfifo -m 600 "$errors"
    env "${job_env[@]}" "$@" 2> "$errors" &
    exec {errors_fd}< "$errors"
    rm "$errors"
    while IFS= read -r -u "$errors_fd" line; do
        printf '%s\n' "$line" >&2
        if [[ $line =~ ^pdsh@.*:\ ssh\ exited\ with\ exit\ code\ ([0-9]+)$ ]] &&
            [ "${BASH_REMATCH[1]}" != "$SAVED_TO_GO_ON" ]; then
            kill -s KILL $!
            return "${BASH_REMATCH[1]}"
        fi
    done
    wait $!
}

command=("$PYTHON" -m deepspeed.launcher.runner --hostfile "$hostfile" --launcher pdsh --force_multi
    --launcher_args="$launcher_args" --master_addr "$master_addr" --master_port "$master_port"
    "$program" "${program_args[@]}")
print_command '' "${command[@]}"
supervise until_a_host_fails "${command[@]}"
