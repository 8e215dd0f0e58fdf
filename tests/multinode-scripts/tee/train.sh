#!/bin/bash
NODE_RANK=$SM_CURRENT_HOST_RANK
DISTRIBUTED_ARGS="--nproc_per_node 1 --nnodes $SM_HOST_COUNT --node_rank $NODE_RANK --master_addr $MASTER_ADDR --master_port 6000"
CMD="torchrun $DISTRIBUTED_ARGS train.py"
echo $CMD
${CMD} 2>&1 | tee log.txt
