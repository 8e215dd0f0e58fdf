#!/bin/bash
torchrun --nnodes "$NODE_COUNT" --node_rank "$NODE_INDEX" --nproc_per_node="$SM_NUM_GPUS" \
    --master_addr "$SM_MASTER_ADDR" --master_port 23456 train.py --output_dir "$SM_MODEL_DIR"
