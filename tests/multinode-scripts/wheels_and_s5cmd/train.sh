#!/bin/bash
chmod +x ./s5cmd
./s5cmd sync s3://${MODEL_S3_BUCKET}/models/pretrain/* /tmp/pretrain_model/

# the package of requirement.txt
python -c "import tiny_requirement; print('requirement', tiny_requirement.VALUE)" || exit 3

NODE_RANK=$(python -c "import json, os; print(json.loads(os.environ['SM_HOSTS']).index(os.environ['SM_CURRENT_HOST']))")
torchrun --nproc_per_node=1 --nnodes=${NODE_NUMBER} --node_rank=${NODE_RANK} \
    --master_addr=${MASTER_ADDR} --master_port=${MASTER_PORT} train.py "$@"

if [ "${NODE_RANK}" = 0 ]; then
    ./s5cmd sync ${SM_MODEL_DIR} s3://${MODEL_S3_BUCKET}/models/output/
fi
