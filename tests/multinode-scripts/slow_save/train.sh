torchrun --nproc_per_node 2 --nnodes $SM_HOST_COUNT --node_rank $SM_CURRENT_HOST_RANK \
    --master_addr $MASTER_ADDR --master_port 29501 train.py
