#!/bin/bash
# Stands in for our binary, to test the lab's `ours` path before or without it: `run.py test --binary stand-in.sh`.
# Serves with xen-blkback and the stock script, but is started, stopped and called just like blkback.
case $0 in *block) exec /etc/xen/scripts/block.stock "$@";; esac
[ "$1" = serve ] || { echo "usage: $0 serve" >&2; exit 64; }
trap 'kill %1; modprobe -r xen-blkback; echo "INFO ended"; exit 0' TERM
modprobe xen-blkback max_queues=4 && echo "INFO serving"
# No loop of short sleeps: they would be counted among the processes that dom0 starts.
sleep infinity &
wait $!
