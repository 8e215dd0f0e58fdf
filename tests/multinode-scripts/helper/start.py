import os
import subprocess

subprocess.Popen("bash ./monitor.sh", shell=True)
os.system("python train.py")
