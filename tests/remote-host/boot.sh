#!/bin/sh
# Starts what the machine starts at boot: the engine, once it is installed, and sshd.
# In a subshell, so that init and not this process is its parent, and reaps it.
[ ! -x /usr/sbin/dockerd ] || (dockerd >>/var/log/dockerd.log 2>&1 &)
mkdir -p /run/sshd
/usr/sbin/sshd
exec sleep infinity
