#!/usr/bin/env bash
# MPICH (and Intel MPI, MVAPICH: all that use Hydra): mpirun starts the ranks over ssh; DeepSpeed learns from mpi4py who
# is who. Needs mpi4py for MPICH.
#
#     bash launch/mpich.sh --hostfile hosts -- --data-dir /data/imagenet
#     bash launch/mpich.sh --slots 4 -- --data-dir /data/imagenet              # this machine alone
#     --bind N             bind each rank to N cores of its own (default: no binding)
#     --deepspeed          go through `deepspeed --launcher mpich` instead of calling mpirun itself
#
# With several networks name one: --launcher-args "-iface eth1".

. "$(dirname "$0")/common.sh"

# shellcheck disable=SC2034
EXTRA_OPTIONS=--bind EXTRA_FLAGS=--deepspeed
read_arguments "$@"
check_mpi MPICH
read -ra mpi <<< "$launcher_args"
case ${bind:-} in
    '') mpi+=(-bind-to none) ;;
    *[!0-9]*) fail "--bind $bind is not a number of cores" ;;
    *) mpi+=(-bind-to "core:$bind") ;;
esac
if [ -n "$hostfile" ]; then check_hosts; else local_slots; check_local_port; fi
if [ -n "${deepspeed:-}" ]; then
    [ -n "$hostfile" ] || fail "--deepspeed needs --hostfile"
    for count in "${slots_of[@]}"; do
        [ "$count" = "${slots_of[0]}" ] || fail "deepspeed --launcher mpich needs the same slots on every host"
    done
    write_environment_file
    run_job "$PYTHON" -m deepspeed.launcher.runner --hostfile "$hostfile" --launcher mpich --force_multi \
        --launcher_args="${mpi[*]}" --master_addr "$master_addr" --master_port "$master_port" \
        "$program" "${program_args[@]}"
fi
job_env+=("MASTER_PORT=$master_port")
names=$(printf '%s,' "${job_env[@]%%=*}")
mpi+=(-genvlist "${names%,}")  # the values mpirun has itself
if [ -n "$hostfile" ]; then
    for i in "${!hosts[@]}"; do list=${list:+$list,}${hosts[i]}:${slots_of[i]}; done
    mpi+=(-launcher ssh -n "$total" -hosts "$list")
else
    mpi+=(-n "$slots")
fi
run_job "$(command -v mpirun)" "${mpi[@]}" "$PYTHON" -u "$program" "${program_args[@]}"
