"""A search's results as a table for a terminal and by name for a file."""

from __future__ import annotations

from typing import Any

from fp8moe.layers.recipe import Recompute
from fp8moe.plan.cluster import Cluster
from fp8moe.plan.plan_text import GB
from fp8moe.plan.prediction import layout_json
from fp8moe.plan.schedule_tables import table
from fp8moe.plan.search import Search

HEADER = (
    "",
    "pp",
    "dp",
    "ep",
    "cp",
    "schedule",
    "micro-batch",
    "recomputed",
    "graphs",
    "tokens/s/GPU",
    "MFU",
    "bubble",
    "hidden",
    "GB",
)


def search_text(found: Search, cluster: Cluster) -> str:
    """Table of the fastest layouts."""
    rows = []
    for number, one in enumerate(found.best, 1):
        config, time = one.config, one.time
        parallel = config.parallel
        sizes = (number, parallel.pp, config.dp, config.ep, parallel.cp, parallel.schedule, config.micro_batch)
        again = ",".join(name for name in Recompute if name in config.recompute) or "-"
        graphs = "yes" if parallel.cuda_graphs else "-"
        shares = [f"{share:.1%}" for share in (time.mfu, time.bubble, time.hidden)]
        speed = f"{time.tokens_per_second_per_gpu:,.0f}"
        rows.append((*map(str, sizes), again, graphs, speed, *shares, f"{one.bytes / GB:.1f}"))
    return (
        f"{found.legal:,} layouts of {cluster.gpus:,} GPUs are legal, {found.fit:,} of them fit {cluster.memory_gb:g} "
        f"GB; the fastest, by prediction:\n{table(HEADER, rows)}"
    )


def search_json(found: Search) -> dict[str, Any]:
    """The same figures by name, and the sentence on GPUs of less memory."""
    best = [
        {
            "layout": layout_json(one.config),
            "tokens_per_second_per_gpu": one.time.tokens_per_second_per_gpu,
            "mfu": one.time.mfu,
            "bubble": one.time.bubble,
            "hidden": one.time.hidden,
            "bytes": one.bytes,
        }
        for one in found.best
    ]
    return {"legal": found.legal, "fit": found.fit, "best": best, "smaller_memory": found.smaller}
