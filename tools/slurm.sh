#!/bin/sh
# A Slurm of one node on this machine, for trying `--executor slurm`: `tools/slurm.sh up`, `tools/slurm.sh down`.
# Needs Debian's slurm-wlm and munge, and root. State and logs go to /var/tmp/robustclip-slurm.
set -eu
HOME_OF_STATE=/var/tmp/robustclip-slurm
CONFIG=/etc/slurm/slurm.conf

up() {
    for command in munged slurmctld slurmd sinfo; do
        command -v "$command" >/dev/null || { echo "$command is missing; apt-get install slurm-wlm munge" >&2; exit 1; }
    done
    if [ -e "$CONFIG" ] && ! grep -q robustclip-slurm "$CONFIG"; then
        echo "$CONFIG belongs to another Slurm; move it aside first" >&2
        exit 1
    fi
    mkdir -p "$HOME_OF_STATE/spool" "$HOME_OF_STATE/state" /etc/slurm /run/munge
    cat >"$CONFIG" <<END
# Written by tools/slurm.sh: robustclip-slurm
ClusterName=robustclip
SlurmctldHost=$(hostname)(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$HOME_OF_STATE/state
SlurmdSpoolDir=$HOME_OF_STATE/spool
SlurmctldPidFile=$HOME_OF_STATE/slurmctld.pid
SlurmdPidFile=$HOME_OF_STATE/slurmd.pid
SlurmctldLogFile=$HOME_OF_STATE/slurmctld.log
SlurmdLogFile=$HOME_OF_STATE/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
ReturnToService=2
KillWait=2
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=$(nproc)
PartitionName=short Nodes=ALL Default=YES MaxTime=60 State=UP
END
    chown munge: /run/munge /etc/munge /etc/munge/munge.key
    pgrep -x munged >/dev/null || runuser -u munge -- munged
    pgrep -x slurmctld >/dev/null || slurmctld
    pgrep -x slurmd >/dev/null || slurmd
    for _ in $(seq 30); do
        sinfo -h -o %T 2>/dev/null | grep -qE 'idle|mixed|allocated' && { sinfo; return; }
        sleep 1
    done
    echo "the node did not come up; read $HOME_OF_STATE/slurmctld.log and slurmd.log" >&2
    exit 1
}

down() {
    scancel --user="$(id -un)" 2>/dev/null || true
    pkill -x slurmd || true
    pkill -x slurmctld || true
    pkill -x munged || true
    grep -qs robustclip-slurm "$CONFIG" && rm "$CONFIG"
    rm -rf "$HOME_OF_STATE"
}

case "${1:-}" in
    up | down) "$1" ;;
    *) echo "usage: tools/slurm.sh up|down" >&2; exit 2 ;;
esac
