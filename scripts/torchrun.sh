#!/bin/bash
# One run on several devices, on one machine or on several:
#
#     scripts/torchrun.sh data=folder data.pool=POOL …                    all GPUs of this machine
#     DEVICES=2 scripts/torchrun.sh trainer.accelerator=cpu …             two processes
#     NODES=2 HEAD=node0:29500 scripts/torchrun.sh run_id=NAME …          on each of two machines
#
# run_root and the pool must be on a disk that all machines see. SIGTERM ends all processes within
# torchrun's 30 s; the same command goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${DEVICES:-}" ]; then
    DEVICES=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
    if [ "$DEVICES" -eq 0 ]; then
        echo "torchrun.sh: no GPU here; say how many processes there shall be: DEVICES=N" >&2
        exit 2
    fi
fi
NODES=${NODES:-1}
if [ "$NODES" -gt 1 ]; then
    head=${HEAD:?is missing: HOST:PORT of one of the machines, the same on all of them}
    meet=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id "${RUN:-ecos}")
else
    meet=(--standalone)
fi

exec "${PYTHON:-python}" -m torch.distributed.run "${meet[@]}" --nproc-per-node "$DEVICES" \
    train.py "trainer.devices=$DEVICES" "trainer.num_nodes=$NODES" "$@"
