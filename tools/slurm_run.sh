#!/usr/bin/env bash
# One job on one or several machines of a SLURM cluster: torchrun once per machine, one process per GPU.
#
#   sbatch --nodes 4 --gpus-per-node 8 tools/slurm_run.sh --cfg configs/DistInit/….yaml --opts OUTPUT_DIR /shared/runs/x
#
# All words go to tools/run_net.py. NUM_SHARDS and NUM_GPUS follow from the allocation; TRAIN.BATCH_SIZE counts the clips
# of one machine. OUTPUT_DIR must be on storage that all machines share. 120 s before the time limit every rank is asked
# to save its state and end, and the job queues again: TRAIN.AUTO_RESUME (on by default) then goes on from that state.
#
# Environment: PYTHON (default python) of the installation, MASTER_PORT (default: from the job's number), MAX_RESTARTS
# (default 0: of crashed ranks, within the job), CPU_RANKS (processes per machine where it has no GPUs).
#
#SBATCH --job-name=distinit
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

set -euo pipefail

# SLURM runs a copy of this script: the clone is found from where sbatch was called, or by DISTINIT_ROOT.
root=${DISTINIT_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
if [[ ! -f $root/tools/run_net.py ]]; then
    echo "error: there is no tools/run_net.py in $root: call sbatch from the clone, or set DISTINIT_ROOT to it." >&2
    exit 1
fi

gpus=${SLURM_GPUS_ON_NODE:-0}
ranks=$gpus
if [[ $gpus == 0 ]]; then
    ranks=${CPU_RANKS:-1}
fi
nodes=${SLURM_JOB_NUM_NODES:-1}
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}

# The agents hand SIGUSR1 and SIGTERM on to their ranks and give them time to save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-90}

# On several machines torchrun's store outlives ranks that are started again, with the addresses of those before.
if [[ $nodes -gt 1 && ${MAX_RESTARTS:-0} -gt 0 ]]; then
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi

# Every word of the user comes first: what follows from the allocation has the last word.
words=("$@")
[[ " ${words[*]} " == *" --opts "* ]] || words+=(--opts)
words+=(NUM_SHARDS "$nodes" NUM_GPUS "$gpus")

requeue=0
# shellcheck disable=SC2317  # called by the trap
on_signal() {
    echo "slurm_run: the time limit is near; the ranks save, then the job queues again" >&2
    requeue=1
    kill -TERM "$step" 2>/dev/null || true # srun hands it on to torchrun on all machines
}

srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$nodes" --nproc_per_node "$ranks" --max_restarts "${MAX_RESTARTS:-0}" \
    --rdzv_backend c10d --rdzv_endpoint "$master:$port" --rdzv_id "$SLURM_JOB_ID" \
    --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    "$root/tools/run_net.py" "${words[@]}" &
step=$!
trap on_signal USR1

# "wait" returns when a signal comes; the step itself may still be saving.
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done

if [[ $requeue == 1 && $status != 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
