"""Who runs next: the gangs of a cluster's CTAs, the copies that land, deadlocks, and where a fault happened.

Without a seed all warps of a CTA run together until they part, each as far as it gets, and a copy lands only when
nobody else can go on: the latest moment there is. With a seed the warps are cut into gangs by chance, run for bursts
of random length, some favoured over others, copies land in between, and waits give up now and then. `order` finds a
race in any of them; what schedules differ in is which phases meet which.
"""

from __future__ import annotations

import random

from tests.ptx.cta import Cta
from tests.ptx.registers import Fault, Gang, Token

INSTRUCTIONS = 3_000_000  # that one CTA may execute, counted for a gang at once; more is a loop without an end
BURSTS = (1, 4, 16, 64, 256)


def describe(cta: Cta, gang: Gang) -> str:
    """Which warps, and where they are."""
    one = cta.program.code[gang.at]
    warps = gang.warps.tolist()
    named = f"warp {warps[0]}" if len(warps) == 1 else f"warps {warps[0]}-{warps[-1]}"
    return f"{named} of CTA {cta.ctaid} at {one.place or 'an unknown place'}: {one}"


def run_cluster(ctas: list[Cta], choices: random.Random | None) -> None:
    """Run until all warps have left; Fault where the program is wrong or stuck."""
    budget = INSTRUCTIONS
    favour: dict[Gang, float] = {}
    while True:
        alive = [gang for cta in ctas for gang in cta.gangs if not gang.done]
        flying = [cta for cta in ctas if cta.under_way]
        if not alive and not flying:
            break
        ready = [gang for gang in alive if gang.waiting is None or gang.waiting[0]()]
        if flying and (not ready or (choices is not None and choices.random() < 0.15)):
            cta = flying[0] if choices is None else choices.choice(flying)
            at = 0 if choices is None else choices.randrange(len(cta.under_way))
            cta.under_way.pop(at)()
            continue
        if not ready:
            waits = "; ".join(f"{describe(g.cta, g)} waits for {g.waiting[1]()}" for g in alive if g.waiting)
            raise Fault(f"deadlock: {waits}")
        if choices is None:
            gang, burst = ready[0], 1 << 30
        else:
            weights = [favour.setdefault(g, choices.random() ** 3 + 0.01) for g in ready]
            gang, burst = choices.choices(ready, weights)[0], choices.choice(BURSTS)
        gang.waiting = None
        budget -= _run(gang, min(burst, budget))
        if budget <= 0:
            raise Fault(f"more than {INSTRUCTIONS} instructions, a loop without an end: {describe(gang.cta, gang)}")
    for cta in ctas:
        cta.check_end()


def _run(gang: Gang, burst: int) -> int:
    """Execute until the gang waits, is done, or `burst` instructions are; -> how many."""
    cta, count = gang.cta, 0
    cta.running = gang
    ops, runs, executed, width = cta.decoded.ops, cta.decoded.runs, cta.counts.executed, len(gang.warps)
    of_runs = cta.counts.of_runs
    while count < burst and gang.waiting is None and not gang.done:
        gang.at = pc = gang.pc
        run = runs[pc]
        # Beyond the burst too where nobody else would see it.
        if run is not None and (not run.seen or count + run.length <= burst) and run.execute(gang):
            gang.pc, count = pc + run.length, count + run.length
            of_runs[pc] = of_runs.get(pc, 0) + width
            continue
        gang.pc = pc + 1
        count += 1
        executed[pc] += width
        try:
            ops[pc](gang)
        except Fault as fault:
            raise Fault(f"{fault}; {describe(cta, gang)}") from None
        except (TypeError, AttributeError) as error:
            gang.pc = pc + 1
            _retry(gang, pc, error)
    return count


def _retry(gang: Gang, pc: int, error: Exception) -> None:
    """An instruction met a register without a value: give it a pattern and execute it again, or say what is wrong."""
    cta, changed = gang.cta, False
    for slot in cta.decoded.mentioned(pc):
        if isinstance(gang.regs[slot], Token):
            raise Fault(f"uses a register of a WGMMA that no wait_group has let go; {describe(cta, gang)}")
        if gang.regs[slot] is None:
            gang.regs[slot], changed = cta.decoded.decoder.poison(gang, slot), True
    if not changed:
        raise error
    try:
        cta.decoded.ops[pc](gang)
    except Fault as fault:
        raise Fault(f"{fault}; {describe(cta, gang)}") from None
