import json
import os
import socket

if __name__ == "__main__":
    hosts = json.loads(os.environ["SM_HOSTS"])
    host_rank = hosts.index(os.environ["SM_CURRENT_HOST"])
    master = json.loads(os.environ["SM_TRAINING_ENV"])["master_hostname"]
    os.environ["NODE_INDEX"] = str(host_rank)
    os.environ["SM_MASTER"] = str(master)
    os.environ["SM_MASTER_ADDR"] = str(socket.gethostbyname(master))
    os.environ["NODE_COUNT"] = str(len(hosts))
    os.environ["FI_PROVIDER"] = "efa"
    os.environ["NCCL_PROTO"] = "simple"

    os.system("chmod +x ./run.sh")
    os.system("/bin/bash -c ./run.sh")
