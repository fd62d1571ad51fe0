#!/usr/bin/env bash
# Open MPI: mpirun starts the ranks over ssh; DeepSpeed learns from mpi4py who is who. Needs mpi4py for Open MPI.
#
#     bash launch/openmpi.sh --hostfile hosts -- --data-dir /data/imagenet
#     bash launch/openmpi.sh --slots 4 -- --data-dir /data/imagenet            # this machine alone
#     --bind N             bind each rank to N cores of its own (default: no binding)
#     --deepspeed          go through `deepspeed --launcher openmpi` instead of calling mpirun itself
#
# With several networks name one: --launcher-args "--mca btl_tcp_if_include eth1" (deepspeed's default there is eth0).

. "$(dirname "$0")/common.sh"

# shellcheck disable=SC2034
EXTRA_OPTIONS=--bind EXTRA_FLAGS=--deepspeed
read_arguments "$@"
check_mpi "Open MPI"
read -ra mpi <<< "$launcher_args"
[ "$(id -u)" != 0 ] || mpi+=(--allow-run-as-root)
case ${bind:-} in
    '') mpi+=(--bind-to none) ;;
    *[!0-9]*) fail "--bind $bind is not a number of cores" ;;
    *) mpi+=(--map-by "slot:PE=$bind" --bind-to core) ;;
esac
if [ -n "$hostfile" ]; then check_hosts; else local_slots; check_local_port; fi
job_env+=("MASTER_PORT=$master_port")
if [ -n "${deepspeed:-}" ]; then
    [ -n "$hostfile" ] || fail "--deepspeed needs --hostfile"
    write_environment_file
    run_job "$PYTHON" -m deepspeed.launcher.runner --hostfile "$hostfile" --launcher openmpi --force_multi \
        --launcher_args="${mpi[*]}" --master_addr "$master_addr" "$program" "${program_args[@]}"
fi
for variable in "${job_env[@]}"; do mpi+=(-x "${variable%%=*}"); done  # the value mpirun has itself
if [ -n "$hostfile" ]; then mpi+=(-n "$total" --hostfile "$hostfile"); else mpi+=(-n "$slots" --host "localhost:$slots"); fi
run_job "$(command -v mpirun)" "${mpi[@]}" "$PYTHON" -u "$program" "${program_args[@]}"
