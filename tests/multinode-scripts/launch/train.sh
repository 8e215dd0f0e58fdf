#!/bin/bash
set -e
HOSTS=$(echo "$SM_HOSTS" | tr -d '[]" ')
RANK_OF_NODE=0
for HOST in ${HOSTS//,/ }; do
    [ "$HOST" = "$SM_CURRENT_HOST" ] && break
    RANK_OF_NODE=$((RANK_OF_NODE + 1))
done
export NCCL_SOCKET_IFNAME=$SM_NETWORK_INTERFACE_NAME
export OMP_NUM_THREADS=1
python -m torch.distributed.launch --nproc_per_node=$SM_NUM_GPUS --nnodes=$NODE_NUMBER --node_rank=$RANK_OF_NODE \
    --master_addr="$(echo "$HOSTS" | cut -d, -f1)" --master_port=12345 ../code/train.py --epochs $SM_HP_EPOCHS
