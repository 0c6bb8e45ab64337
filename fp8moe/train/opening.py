"""The lines that begin a run: what is trained, on what, and what its largest rank holds."""

from __future__ import annotations

import os
from pathlib import Path

from fp8moe.cuda_environment import few_queues
from fp8moe.data.chat_tokens import described
from fp8moe.data.mixture import table, uses
from fp8moe.data.tokenizer import file_hash, ids_apart, load_tokenizer
from fp8moe.errors import DataError
from fp8moe.kernels import backend
from fp8moe.model.flops import BF16_PEAK, count_parameters, flops_per_token
from fp8moe.parallel.collectives import gather
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.batch import total_samples
from fp8moe.train.memory import in_words, measured_bytes
from fp8moe.train.run import Run
from fp8moe.train.summary import count_of


def memory_of_largest_rank(run: Run) -> str:
    """A line on the rank whose weights, gradients and optimizer state take most. Collective over all ranks."""
    of_ranks = gather(measured_bytes(run.model, run.optimizer), run.mesh.world_group)
    rank = max(range(len(of_ranks)), key=lambda i: sum(of_ranks[i].values()))
    whose = f"rank {rank}, the largest of all ranks" if len(of_ranks) > 1 else "this process"
    return f"memory of {whose}, without activations: {in_words(of_ranks[rank])}"


def opening(run: Run) -> str:
    """The lines that begin a run: model, processes, batch, data, the formula of MFU, the run directory."""
    config, mesh = run.config, run.mesh
    counts = count_parameters(config.model)
    flops = flops_per_token(config.model, config.seq_len)
    mtp = f" and {_short(counts.mtp)} in the MTP module" if counts.mtp else ""
    processes = count_of(mesh.world_size, "process", "processes")
    formula = f"mfu = tokens/s/GPU x {_short(flops)} FLOP/token (forward and backward, causal, active parameters) / "
    lines = [
        f"{config.name}: {_short(counts.total)} parameters, {_short(counts.active)} active a token{mtp}",
        f"{config.precision.mode.value} on {processes} ({run.device.type}): {_pipeline(run)}dp {mesh.dp}, experts over "
        f"ep {mesh.ep}{_shared(mesh)}; kernels: {backend.resolve()}",
        *_averaging(run),
        *_reference(run),
        f"{config.steps} steps of {config.batch.sequences} sequences x {config.seq_len} tokens",
        *_data(run),
        *_taught(run),
        formula
        + f"{BF16_PEAK / 1e12:.0f} TFLOPS (BF16 peak)"
        + ("" if run.device.type == "cuda" else "; none on a CPU"),
        f"run directory {run.run_dir}",
    ]
    if config.init_from is not None and not run.step:
        lines.append(f"begins from the {'averaged ' if config.init_from_ema else ''}weights of {config.init_from}")
    if run.step:
        lines.append(f"resumed after step {run.step}, {run.sampler.consumed} samples consumed")
    return "\n".join(lines)


def other_tokenizer(run: Run) -> str | None:
    """A warning where token ids name other tokens than those that the weights of `init_from` have learned; else None.

    None as well where either has no tokenizer.json that can be read, as behind a URL. It is no error: a model may be
    given another vocabulary on purpose.
    """
    config, mine = run.config, run.data.tokenizer
    if config.init_from is None or run.step or mine is None:
        return None
    given = Path(config.init_from)  # a run, a Hugging Face directory, or RUN/checkpoints/step-N
    theirs = next(
        (file for folder in (given, *given.parents[:2]) if (file := folder / "tokenizer.json").is_file()), None
    )
    if theirs is None:
        return None
    try:
        if file_hash(theirs) == file_hash(mine.path):
            return None
        apart, shared = ids_apart(load_tokenizer(mine.path), load_tokenizer(theirs))
    except DataError:
        return None
    if not apart:
        return None
    return (
        f"the weights of init_from={config.init_from} have learned other tokens: {apart:,} of {shared:,} ids differ "
        f"between {mine.path} and {theirs}: encode the text with the latter (fp8moe tokenize --tokenizer), unless "
        "this is meant"
    )


def messages_beside_compute(run: Run) -> str | None:
    """A warning where the environment keeps messages between GPUs from travelling beside compute; else None."""
    few = few_queues(os.environ) if run.device.type == "cuda" and run.mesh.world_size > 1 else None
    return None if few is None else f"{few}, and fewer of them are hidden: unset it"


def _data(run: Run) -> list[str]:
    """What the whole run sees of each of its sources, as a table."""
    config = run.config
    found = uses(run.data.train, total_samples(config.batch, config.steps), config.seq_len)
    fim = [] if config.data.fim_rate == 0 else [f"fill-in-the-middle in {config.data.fim_rate:.3g} of the documents"]
    return [*(table(found) if found else []), *fim, *described(run.data.train, run.data.validation)]


def _averaging(run: Run) -> list[str]:
    """What the average of the weights is and takes; no line where there is none."""
    if run.ema is None:
        return []
    return [f"average of the weights: decay {run.ema.decay}, {run.ema.num_bytes / 1e9:.3g} GB on the host a rank"]


def _reference(run: Run) -> list[str]:
    """What a reference that the run replaces takes; no line where there is none, or where the first one stays."""
    every = run.config.grpo.reference_every
    if run.reference is None or not every:
        return []
    size = f"{run.reference.num_bytes / 1e9:.3g} GB on the host a rank, saved with every checkpoint"
    return [f"the reference is the policy after step {run.reference.step}, replaced every {every} steps: {size}"]


def _taught(run: Run) -> list[str]:
    """The teacher, and its part of the loss; no line where there is none."""
    distill = run.config.distill
    if distill.teacher is None:
        return []
    return [
        f"taught by {distill.teacher}: KL on its likeliest {distill.topk} tokens, weight {distill.weight:.3g}, "
        f"temperature {distill.temperature:.3g}"
    ]


def _shared(mesh: Mesh) -> str:
    """How many ranks share each sequence; empty where none do."""
    return "" if mesh.cp == 1 else f", sequences over cp {mesh.cp}"


def _pipeline(run: Run) -> str:
    """Schedule and blocks of each stage; empty for a run without a pipeline."""
    parallel = run.config.parallel
    if parallel.pp == 1 and len(run.stages) == 1:
        return ""
    blocks = ",".join(str(stage.num_layers) for stage in run.stages)
    return f"{parallel.schedule} over pp {parallel.pp} (blocks {blocks}), "


def _short(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.0f}"
