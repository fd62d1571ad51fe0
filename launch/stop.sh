#!/usr/bin/env bash
# End what is left of a job whose launch script was killed: on this machine and on the hosts of its hostfile.
#
#     bash launch/stop.sh --hostfile hosts -- JOB        the LOOKSAM_JOB=... that the script had printed

. "$(dirname "$0")/common.sh"

read_arguments "$@"
[ ${#program_args[@]} = 1 ] || fail "which job? bash launch/stop.sh --hostfile hosts -- JOB"
job=${program_args[0]}
everywhere end_job
