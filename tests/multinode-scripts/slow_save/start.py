import os

hosts = os.environ["SM_HOSTS"]
print("hosts", hosts, flush=True)
os.system("bash ./train.sh 2>&1 | tee -a train.log")
