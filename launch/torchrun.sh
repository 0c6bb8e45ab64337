#!/usr/bin/env bash
# Training on one node or many: environment plus one torchrun line. Arguments are `key=value`, as for `fp8moe train`.
#
#   NPROC        processes on this node (default: one a GPU; a number on a machine without any)
#   NNODES       nodes (default 1)          NODE_RANK    this node's number, 0 first (default: Slurm's, else 0)
#   MASTER_ADDR  node 0, from all nodes     MASTER_PORT  a free port there (default 29500)
#   PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT, PET_NPROC_PER_NODE: where those are unset (Kubeflow's)
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   network interface (default: that of the route to MASTER_ADDR)
#   COMMAND      what each process runs (default train; doctor looks at all nodes)
#   PYTHON       interpreter (default: .venv's when it is there, else python)
set -euo pipefail
cd "$(dirname "$0")/.."

NNODES=${NNODES:-${PET_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${PET_NODE_RANK:-${SLURM_NODEID:-0}}}
NPROC=${NPROC:-${PET_NPROC_PER_NODE:-gpu}}
MASTER_ADDR=${MASTER_ADDR:-${PET_MASTER_ADDR:-}}
MASTER_PORT=${MASTER_PORT:-${PET_MASTER_PORT:-29500}}
if [ "$NNODES" -gt 1 ] && [ -z "$MASTER_ADDR" ]; then
  echo "NNODES=$NNODES needs MASTER_ADDR, the address of node 0 that all nodes reach" >&2
  exit 2
fi
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi

# gloo takes the interface of the host's name and NCCL one of its own choice, which need not lead to the other nodes:
# unless told otherwise, both take that of the route to node 0 (on node 0 itself, the one that has the address).
if [ "$NNODES" -gt 1 ] && command -v ip >/dev/null; then
  read -r address _ < <(getent ahosts "$MASTER_ADDR" || true) || address=
  interface=$(ip -o route get "${address:-$MASTER_ADDR}" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p' || true)
  if [ "$interface" = lo ]; then
    read -r _ interface _ < <(ip -o addr show to "${address:-$MASTER_ADDR}" 2>/dev/null || true) || interface=
  fi
  if [ -n "$interface" ]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface}
  fi
fi

# One thread a rank unless told otherwise: ranks on one node would fight for the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# A run that goes on by itself is started again up to three times; one that was preempted ends at once each time.
RESTARTS=0
for word in "$@"; do
  case $word in resume=auto | resume=required) RESTARTS=3 ;; esac
done

# USR1 is Slurm's warning before the time limit; unless torchrun is told to forward it, it dies and leaves its ranks.
exec "$PYTHON" -m torch.distributed.run \
  --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$MASTER_PORT" \
  --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --max-restarts "$RESTARTS" \
  -m fp8moe "${COMMAND:-train}" "$@"
