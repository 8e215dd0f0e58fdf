pip list 2>/dev/null | grep -i '^torch ' || true
nohup torchrun --nnodes $NODE_NUMBER --node_rank $SM_CURRENT_HOST_RANK --nproc_per_node 2 --master_addr $SM_MASTER_ADDR --master_port 12345 train.py --epochs 3 > train.log 2>&1 &
PID=$!
tail -f train.log &
wait $PID
echo "exit code: $?"
