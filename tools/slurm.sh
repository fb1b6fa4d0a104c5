#!/bin/bash
# An experiment as an array job of Slurm: a shard a task, then a job that merges them and runs what a
# lost task has left.
#
#     tools/slurm.sh CONFIG WORKDIR SHARDS [--FLAG=VALUE ...]
#
# CONFIG and WORKDIR must be the same for all machines: a shared file system. SBATCH_OPTIONS has
# what your cluster asks for, as in SBATCH_OPTIONS="--partition=gpu --gres=gpu:1 --time=2:00:00";
# QWEN_JAX the command, by default qwen-jax. A task that is requeued goes on where it was killed; what
# a lost one has left runs in the last job. All of it can be submitted again.
set -euo pipefail
run=${QWEN_JAX:-qwen-jax}

if [[ -z ${SLURM_JOB_ID-} ]]; then  # where you are: two jobs of this script
    if (($# < 3)); then
        sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
        exit 2
    fi
    config=$1 workdir=$2 shards=$3
    shift 3
    # shellcheck disable=SC2086 - several options in one variable
    submit() { sbatch --parsable ${SBATCH_OPTIONS-} "$@"; }
    array=$(submit --requeue --array="1-$shards" "$0" "$config" "$workdir" "$@")
    submit --dependency="afterany:$array" "$0" "$config" "$workdir" "$@"
    exit
fi

config=$1 workdir=$2
shift 2
if [[ -n ${SLURM_ARRAY_TASK_ID-} ]]; then  # one task of the array
    exec $run experiment --config="$config" --workdir="$workdir" \
        --shard="$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" "$@"
fi

# The job after them. Where shards lie in the workdir they become one experiment; 1 means that points
# are missing or have failed, and then the command without --shard runs the missing ones.
if [[ ! -e $workdir/config.json ]] && compgen -G "$workdir/shard-*-of-*/config.json" > /dev/null; then
    $run merge "$workdir" || [[ $? -eq 1 ]]
fi
exec $run experiment --config="$config" --workdir="$workdir" "$@"
