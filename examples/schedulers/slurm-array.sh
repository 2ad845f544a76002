#!/bin/bash
# Slurm: one task for each shard of the job, requeued until it is done.
#   sbatch --array=1-4 examples/schedulers/slurm-array.sh jobs/rehearsal-echo.yaml
#   sbatch --dependency=afterok:JOBID --wrap 'overnight merge jobs/rehearsal-echo.yaml'
#SBATCH --job-name=overnight
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=overnight-%A_%a.log
# Two minutes before the limit overnight gets USR1, saves what is under way and ends with 75.
#SBATCH --signal=B:USR1@120
set -u
job=$1
shift
shard="$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"

# B: above sends the signal to this shell alone, so it passes it on; and `wait` returns when a trap has run.
overnight run "$job" --shard "$shard" "$@" &
run=$!
trap 'kill -USR1 "$run"' USR1
trap 'kill -TERM "$run"' TERM
wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do
    wait "$run"
    code=$?
done

case $code in
75) # stopped early: the same command goes on
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    exit 75 ;;
3) # finished; some lines are answered with an error, which the merged summary counts
    exit 0 ;;
*)
    exit "$code" ;;
esac
