#!/usr/bin/env bash
# Starts a Slurm cluster of this one machine for tests/test_slurm.py, with all its files in one directory.
#
#     start_slurm.sh DIRECTORY          needs root and Debian; installs slurm-wlm if it is missing
#     start_slurm.sh DIRECTORY stop
#
# It has two partitions: jobs in "urgent" preempt those in "main", which are queued again after a grace time. The short
# cred_expire lets jobs that are queued again start after seconds, not minutes.
set -euo pipefail
directory=$(realpath -m "$1")

if [[ ${2:-} == stop ]]; then
    for daemon in slurmd slurmctld munged; do
        [[ -s $directory/$daemon.pid ]] && kill "$(cat "$directory/$daemon.pid")" 2>/dev/null || true
    done
    exit
fi

if ! command -v slurmctld slurmd munged >/dev/null; then
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y slurm-wlm munge >/dev/null
fi
mkdir -p "$directory"/{state,spool}
chmod 755 "$directory"
host=$(hostname -s)
ports=$(shuf -i 20000-30000 -n 2 | tr '\n' ' ')
read -r controller_port node_port <<<"$ports"
cat >"$directory/slurm.conf" <<EOF
ClusterName=ppo37
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$directory/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
ReturnToService=2
MpiDefault=none
MailProg=/bin/true
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF State=UP
EOF

# munge proves to the daemons who is who; its key, socket and files belong to the user that runs it.
head -c 1024 /dev/urandom >"$directory/munge.key"
chmod 400 "$directory/munge.key"
munged --force --key-file="$directory/munge.key" --socket="$directory/munge.socket" \
    --pid-file="$directory/munged.pid" --log-file="$directory/munged.log" --seed-file="$directory/munge.seed"
export SLURM_CONF=$directory/slurm.conf
slurmctld
slurmd
for _ in $(seq 120); do
    sinfo --noheader --format %T 2>/dev/null | grep -q idle && exit
    sleep 1
done
echo "Slurm does not start; see $directory/*.log" >&2
exit 1
