"""Rows to experts, into messages, and back: bytes moved a second beside a plain copy and torch's index_select.

    python -m benchmarks.bench_permute [--quick] [--json FILE]

What is counted is what must be moved: every row of x once and every copy of it once, with the scales of FP8 rows, and
the map that says where. The ratio is the op's bytes a second over those of a plain copy of the copies. `cast, permute`
is the two passes that `permute_quantize` replaces, counted with the bytes of the one. A name begins with the back end
that ran: on a CPU that is the reference, whose figures say how long a test takes and nothing about a GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.bandwidth import COPY, Entry, add_bandwidths, size_of
from benchmarks.contest import write_beside
from benchmarks.harness import Report, make_parser, parse_arguments
from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.message import MessageLayout, pack_message, plan_message, unpack_message
from fp8moe.kernels.permute import RowMap, permute, permute_quantize, plan_rows, unpermute
from fp8moe.kernels.quantize import quantize_rows

SUBJECT = "Permutations"
SELECT, PLAN = "index_select bf16", "plan_rows"
NUM_EXPERTS, TOPK, PEERS = 32, 8, 8
# Rows of x, their width, the share of their copies that is here: one rank alone, one of eight, and the CPU's.
SIZES = {"cuda": ((4096, 7168, 1.0), (16384, 7168, 0.125), (16384, 2048, 1.0)), "cpu": ((512, 2048, 1.0),)}


def routing(n: int, share: float, device: torch.device) -> Tensor:
    """Distinct random experts for n rows, about `share` of the copies here."""
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.rand(n, NUM_EXPERTS, generator=generator, device=device).topk(TOPK, dim=1).indices
    return ids.masked_fill(torch.rand(n, TOPK, generator=generator, device=device) >= share, -1)


def messages(rows: Fp8Tensor, ids: Tensor, room: int) -> dict[str, Entry]:
    """FP8 rows into a message for all peers, with ids and weights, and out of one for a peer that has all experts."""
    weights = torch.rand(ids.shape, device=ids.device)
    span = NUM_EXPERTS // PEERS
    sent = plan_message(ids, PEERS, span, room=int(plan_message(ids, PEERS, span, room=0).tokens_per_expert.sum()))
    all_here = plan_message(ids, 1, NUM_EXPERTS, room=int((ids >= 0).any(dim=1).sum()))
    layout, message = MessageLayout.of(rows, TOPK), pack_message(rows, all_here, ids, weights)
    row_map = plan_rows(layout.ids_of(message), NUM_EXPERTS, room=room, first=0)
    packed = size_of(pack_message(rows, sent, ids, weights)) + size_of(rows) + size_of(ids) + size_of(weights)
    unpacked, weights_R = unpack_message(message, row_map, layout)
    assert weights_R is not None
    return {
        "plan_message": (lambda: plan_message(ids, PEERS, span, room=len(sent.slot_R)), 0),
        "pack_message fp8": (lambda: pack_message(rows, sent, ids, weights), packed + size_of(sent.source_R)),
        "unpack_message fp8": (
            lambda: unpack_message(message, row_map, layout),
            size_of(message) + size_of(unpacked) + size_of(weights_R) + 2 * size_of(row_map.source_R),
        ),
    }


def moves(x: Tensor, ids: Tensor, row_map: RowMap) -> dict[str, Entry]:
    """Name -> (call, bytes it must read and write) for x [N, D] BF16."""
    rows, room = quantize_rows(x, power_of_two=True), len(row_map.slot_R)
    copies, fp8_copies = permute(x, row_map), permute(rows, row_map)
    assert isinstance(copies, Tensor)
    source = row_map.source_R.clamp(min=0)
    sources, slots = size_of(row_map.source_R), size_of(row_map.slot_R)

    def cast_then_permute() -> object:
        return permute(quantize_rows(x, power_of_two=True), row_map)

    cast = size_of(x) + size_of(fp8_copies) + slots
    return {
        COPY: (lambda: copies.clone(), 2 * size_of(copies)),
        SELECT: (lambda: x.index_select(0, source), size_of(x) + size_of(copies) + sources),
        "permute bf16": (lambda: permute(x, row_map), size_of(x) + size_of(copies) + sources),
        "permute fp8": (lambda: permute(rows, row_map), size_of(rows) + size_of(fp8_copies) + sources),
        "permute_quantize": (lambda: permute_quantize(x, row_map, power_of_two=True), cast),
        "cast, permute": (cast_then_permute, cast),
        "unpermute bf16": (lambda: unpermute(copies, row_map), size_of(x) + size_of(copies) + slots),
        PLAN: (lambda: plan_rows(ids, NUM_EXPERTS, room=room), 0),
        **messages(rows, ids, room),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = parse_arguments(make_parser(f"{SUBJECT}: GB/s beside a copy and index_select"), argv)
    device = arguments.device
    report = Report(device, json_path=arguments.json)
    runs = backend.provider("permute", backend.resolve(device))
    sizes = SIZES[device.type]
    for n, d, share in sizes[:1] if arguments.quick else sizes:
        generator = torch.Generator(device).manual_seed(1)
        x = torch.randn(n, d, generator=generator, device=device, dtype=torch.bfloat16)
        ids = routing(n, share, device)
        row_map = plan_rows(ids, NUM_EXPERTS)
        entries = moves(x, ids, row_map)
        label = f"N{n} D{d} top-{TOPK} of {NUM_EXPERTS} R{len(row_map.slot_R)}"
        add_bandwidths(report, entries, label, arguments, runs, (SELECT,))
    report.finish()
    if arguments.json is not None:
        write_beside(report.records, arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
