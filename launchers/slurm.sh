#!/usr/bin/env bash
# Train in a Slurm job, one task a GPU; `srun` and `sbatch` both take this file:
#
#   sbatch launchers/slurm.sh --deepspeed_config ds_configs/lm_xmoe.json
#   srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 \
#     launchers/slurm.sh --deepspeed_config ds_configs/lm_xmoe.json
#
# Start it in Magnetar's folder, or anywhere if the package is installed. All arguments go to
# magnetar.launchers.train. Options for sbatch stand before the file's name and count for
# more than those below. Where only one task a node is allowed, DeepSpeed's launcher starts the ranks:
#
#   sbatch --ntasks-per-node=1 --export=ALL,SLOTS=8 launchers/slurm.sh ...
#
# At the time limit the run saves and stops, and 120 s before it saves in any case: the same command
# goes on from there. Given several times with --dependency=singleton --job-name=NAME, the jobs run
# one after the other; a run that is finished ends at once.
#
# Variables: PYTHON (python), SLOTS, MASTER_ADDR and MASTER_PORT (of the first node and the job).
#
#SBATCH --job-name=magnetar
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

# number NAME LEAST [MOST]: the variable NAME holds a whole number in this range.
number() {
  case ${!1-} in
    '' | *[!0-9]* | 0?* | ???????????*) fail "$1=${!1-} must be a whole number from $2: Slurm sets it, or you do" ;;
  esac
  [ $((10#${!1})) -ge "$2" ] && [ $((10#${!1})) -le "${3:-9999999999}" ] ||
    fail "$1=${!1} must be a whole number from $2${3:+ to $3}: Slurm sets it, or you do"
}

# An address of the first node that the others can reach; names often mean 127.0.1.1 at home.
first_address() {
  local name
  name=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  if [ "${SLURM_NNODES:-1}" -eq 1 ]; then
    echo 127.0.0.1
  elif [ "$(hostname -s)" = "${name%%.*}" ]; then
    hostname -I | cut -d ' ' -f 1
  else
    getent ahostsv4 "$name" | cut -d ' ' -f 1 | head -n 1
  fi
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is no Slurm job: start it with sbatch or srun"
python=$(command -v "${PYTHON:-python}") || fail "no ${PYTHON:-python} in PATH: activate the environment first, or set PYTHON"
script=launchers/slurm.sh
if [ ! -f $script ]; then # no checkout: the installed package, since sbatch starts a copy of this
  room=$("$python" -c 'import magnetar.launchers as room; print(room.__path__[0])' 2> /dev/null) || true
  script=$room/slurm.sh
  [ -f "$script" ] || fail "$python has no magnetar: start it in Magnetar's folder, or install the package"
fi
number SLURM_JOB_ID 0
[ -z "${SLURM_NNODES-}" ] || number SLURM_NNODES 1
[ -z "${SLOTS-}" ] || number SLOTS 1 9999
[ -n "${SLURM_JOB_NODELIST:-}" ] || fail "SLURM_JOB_NODELIST is not set, which Slurm does in a job"
if [ -z "${MASTER_ADDR:-}" ]; then
  MASTER_ADDR=$(first_address) || true
  [ -n "$MASTER_ADDR" ] || fail "the first node of $SLURM_JOB_NODELIST has no address here: set MASTER_ADDR"
fi
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-$((20000 + 10#$SLURM_JOB_ID % 12000))}
number MASTER_PORT 1 65535

if [ -z "${SLURM_STEP_ID:-}" ]; then # sbatch: the file itself, once
  # When a rank has failed the others end by themselves, with a status that says more than that of a
  # task that was killed: not --kill-on-bad-exit.
  srun --wait=60 "$script" "$@"
  exit
fi

[ -n "${SLURM_STEP_TASKS_PER_NODE:-}" ] || fail "SLURM_STEP_TASKS_PER_NODE is not set, which srun does"
part='[1-9][0-9]{0,3}(\(x[1-9][0-9]{0,4}\))?'
[[ $SLURM_STEP_TASKS_PER_NODE =~ ^$part(,$part)*$ ]] ||
  fail "SLURM_STEP_TASKS_PER_NODE=$SLURM_STEP_TASKS_PER_NODE is not tasks of nodes, such as 8(x2),4: srun sets it"
# Tasks of each node: "8(x2),4" is 8 8 4.
tasks=($(awk -v RS=, '{ n = split($0, part, /[(x)]+/)
  for (i = 0; i < (n > 1 ? part[2] : 1); i++) print part[1] }' <<< "$SLURM_STEP_TASKS_PER_NODE"))
all=0
for count in "${tasks[@]}"; do all=$((all + count)); done
number SLURM_NODEID 0 $((${#tasks[@]} - 1))

if [ "${tasks[0]}" -eq 1 ] && [ "${SLOTS:-1}" -gt 1 ]; then
  trap '' USR1 # it would end the launcher; ranks take it all the same
  hostfile=$(mktemp)
  trap 'rm -f "$hostfile"' EXIT
  scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=$SLOTS/" > "$hostfile"
  "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --no_ssh \
    --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
    --module magnetar.launchers.train "$@"
  exit
fi

number SLURM_NTASKS $all $all
number SLURM_PROCID 0 $((all - 1))
number SLURM_LOCALID 0 $((tasks[SLURM_NODEID] - 1))
number SLURM_NNODES ${#tasks[@]}
devices=${CUDA_VISIBLE_DEVICES:-}
if [ -n "$devices" ] && [ "$(tr ',' '\n' <<< "$devices" | wc -l)" -lt "${tasks[SLURM_NODEID]}" ]; then
  fail "a task sees GPUs $devices, and the node has ${tasks[SLURM_NODEID]} tasks: give each all of \
them, with --gpus-per-node in place of --gpus-per-task or --gpu-bind"
fi
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_SIZE=${tasks[SLURM_NODEID]} CROSS_RANK=$SLURM_NODEID CROSS_SIZE=$SLURM_NNODES
exec "$python" -u -m magnetar.launchers.train "$@"
