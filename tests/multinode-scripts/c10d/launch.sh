#!/bin/bash
set -ex
python -m torch.distributed.run --nnodes ${NODE_NUMBER} --nproc_per_node ${SM_NUM_GPUS} \
  --rdzv_id "${TRAINING_JOB_NAME:-job}" --rdzv_backend c10d --rdzv_endpoint algo-1:29400 --max_restarts 3 \
  train.py --epochs ${SM_HP_EPOCHS}
