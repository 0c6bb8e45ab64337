#!/usr/bin/env bash
# Runs a command on two "nodes" of this machine: two network namespaces, joined by one link of a chosen rate.
#   benchmarks/two_nodes.sh RATE RANKS_PER_NODE COMMAND...     what follows torchrun's own options, as in
#   benchmarks/two_nodes.sh 200mbit 2 -m benchmarks.bench_dispatch --part bytes
# Needs root, iproute2 and the tbf queue. PYTHON chooses the interpreter, BURST (256kb) what a link that has rested sends
# at once: messages with pauses between them travel faster than RATE by that much each, and without pauses not.
# Ends with 1 if a node fails, and leaves neither namespace nor process behind.
set -euo pipefail
if [ $# -lt 3 ]; then sed -n '2,7s/^# //p' "$0" >&2; exit 2; fi
rate=$1 ranks=$2; shift 2
python=${PYTHON:-python3} name=fp8moe-$$ agents=()
end() {
  for agent in "${agents[@]}"; do kill -TERM "$agent" 2>/dev/null || true; done
  wait || true
  for node in a b; do ip netns del "$name-$node" 2>/dev/null || true; done
}
trap end EXIT
trap 'exit 130' INT TERM
for node in a b; do ip netns add "$name-$node"; done
# Interface names have at most 15 letters, so they don't carry the whole name.
ip link add linka netns "$name-a" type veth peer name linkb netns "$name-b"
address=(a 10.83.0.1 b 10.83.0.2)
for i in 0 2; do
  node=${address[i]}
  inside=(ip netns exec "$name-$node")
  "${inside[@]}" ip addr add "${address[i + 1]}/30" dev "link$node"
  "${inside[@]}" ip link set "link$node" up
  "${inside[@]}" ip link set lo up
  # A connection that was idle for a moment would start slowly again, and the first messages be measured slower.
  "${inside[@]}" sysctl -qw net.ipv4.tcp_slow_start_after_idle=0
  # Room for a whole message: a sender that waits for the CPU after every 100 KB measures the scheduler, not the link.
  "${inside[@]}" sysctl -qw net.ipv4.tcp_wmem="4096 4194304 16777216" net.ipv4.tcp_rmem="4096 4194304 16777216"
  "${inside[@]}" tc qdisc add dev "link$node" root tbf rate "$rate" burst "${BURST:-256kb}" latency 400ms
done
for i in 0 2; do
  node=${address[i]}
  GLOO_SOCKET_IFNAME=link$node OMP_NUM_THREADS=1 ip netns exec "$name-$node" "$python" -m torch.distributed.run \
    --nnodes 2 --node-rank $((i / 2)) --nproc-per-node "$ranks" \
    --master-addr 10.83.0.1 --master-port 29533 "$@" &
  agents+=($!)
done
failed=0
for agent in "${agents[@]}"; do wait "$agent" || failed=1; done
agents=()
exit "$failed"
