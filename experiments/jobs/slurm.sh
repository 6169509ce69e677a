#!/usr/bin/env bash
# One run as a Slurm job, made of this file by research.submit to=slurm. The run finds its hosts inside srun by itself.
# filled in: options
set -eo pipefail
# filled in: setup
set -u
retries=0  # filled in: retries
# shellcheck disable=SC2016 # what is single-quoted here is meant as it stands
run=(true) # filled in: command

# What srun starts does not inherit this since Slurm 22.05.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi

# A signal to the whole job must not end this shell before the run has saved: its code says how to go on.
trap : TERM INT

# The first task that leaves does not kill the others: they may still be writing.
code=0
srun --kill-on-bad-exit=0 "${run[@]}" || code=$?

# 75: interrupted, saved, resumable. A job that was cancelled, or that Slurm itself starts again, is no longer RUNNING.
if [ "$code" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$retries" ]; then
    if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
