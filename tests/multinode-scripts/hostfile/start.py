import json
import os
import subprocess
import sys

hosts = json.loads(os.environ["SM_HOSTS"])
slots = int(os.environ["SM_NUM_GPUS"])
with open("/tmp/hostfile", "w") as file:
    for host in hosts:
        file.write(f"{host} slots={slots}\n")

code = subprocess.call([sys.executable, "launcher.py", "--hostfile", "/tmp/hostfile", "train.py", "--zero", "3"])
sys.exit(code)
