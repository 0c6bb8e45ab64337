"""Readings of Hopper machine code that the instructions' names alone don't give: what each instruction waits for.

The upper 64 bits of an instruction hold, from bit 41: stall cycles (4), yield (1), the scoreboard that its result sets
(3, 7 for none), the one that its operands' reading sets (3), and the scoreboards it waits for (6). A warp's loads from
shared memory return in order, so a load without a scoreboard is done when a later one is.
"""

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = 16  # bytes
NO_SCOREBOARD = 7
FIRST = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/")
SECOND = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")


def program(cubin: bytes) -> bytes:
    """The instructions of a cubin, an ELF file: the contents of its sections .text.NAME, of which a kernel has one."""
    (start,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    rows = [struct.unpack_from("<2I4Q", cubin, start + size * i) for i in range(count)]  # name, kind, .., place, length
    found = [
        cubin[place : place + length]
        for name, _, _, _, place, length in rows
        if cubin.startswith(b".text.", rows[names][4] + name)
    ]
    assert len(found) == 1, "one kernel, and no function that it calls"
    return found[0]


def disassembled(cubins: list[bytes]) -> list[tuple[str, str]]:
    """SASS of each, and what it uses of the machine, as the toolkit prints them.

    The disassembler takes longer to start than to read a kernel, so it reads all as one program: addresses, those of
    jumps among them, count from its first instruction. (Not compiled.asm["sass"]: Triton's own reader stops early.)
    """
    programs = [program(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(programs))
        file.flush()
        lines = _output("nvdisasm", "--binary", "SM90a", "-hex", file.name).splitlines(keepends=True)
        starts = [i for i, line in enumerate(lines) if FIRST.match(line)]
    assert INSTRUCTION * len(starts) == sum(map(len, programs)), "an instruction is missing"
    found, begin = [], 0
    for cubin, code in zip(cubins, programs, strict=True):
        end = begin + len(code) // INSTRUCTION
        sass = "".join(lines[starts[begin] : starts[end] if end < len(starts) else len(lines)])
        assert "EXIT" in sass, "a kernel without an end"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            found.append((sass, _output("cuobjdump", "--dump-resource-usage", file.name)))
        begin = end
    return found


def _output(tool: str, *words: str) -> str:
    return subprocess.run([TOOLS / tool, *words], capture_output=True, text=True, timeout=120, check=True).stdout


def instructions(sass: str) -> Iterator[tuple[str, int, set[int]]]:
    """(text, scoreboard its result sets, scoreboards it waits for) of each instruction of a disassembly."""
    text = None
    for line in sass.splitlines():
        if found := FIRST.match(line):
            text = found[1]
        elif text is not None and (found := SECOND.match(line)):
            control = int(found[1], 16) >> 41
            yield text, control >> 5 & 7, {board for board in range(6) if control >> (11 + board) & 1}
            text = None


def texts(sass: str) -> str:
    """The instructions' texts alone, a line each: a tenth of a disassembly."""
    return "\n".join(found[1] for line in sass.splitlines() if (found := FIRST.match(line)))


def loads_in_flight(sass: str) -> int:
    """Loads from shared memory whose values may be missing when a consumer gives its slot of the ring back.

    One thread arrives for the warps that met at the barrier before: a load must be complete there, by a wait for its
    scoreboard or by the fence against the async proxy.
    """
    pending: dict[int, int] = {}
    unmarked = at_barrier = wrong = 0
    for text, board, waits in instructions(sass):
        for done in waits:
            pending.pop(done, None)
        if re.search(r"\bLDS\b", text):
            unmarked += 1
            if board != NO_SCOREBOARD:
                pending[board] = pending.get(board, 0) + unmarked
                unmarked = 0
        elif "FENCE.VIEW.ASYNC" in text:
            pending, unmarked = {}, 0
        elif "BAR.SYNC" in text:
            at_barrier = sum(pending.values()) + unmarked
        elif "SYNCS.ARRIVE" in text and ".A1T0" in text:
            wrong += at_barrier
    return wrong


def e4m3_casts(sass: str) -> int:
    """Instructions that cast FP32 to E4M3, two values each."""
    return len(re.findall(r"\bF2FP\.SATFINITE\.E4M3\.F32", sass))


def spills_in_steps(sass: str) -> int:
    """Accesses to local memory inside the innermost loops that multiply, where a spill is paid every step."""
    if "QGMMA" not in sass:
        return 0
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)]
    loops = []
    for address, text in code:
        # A loop's way back is conditional; what waits for a barrier stands behind the code and jumps back always.
        jump = re.match(r"@!?U?P\d\s+BRA\S* .*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) <= address:
            inside = [line for at, line in code if int(jump[1], 16) <= at <= address]
            if any("QGMMA" in line for line in inside):
                loops.append((int(jump[1], 16), address, inside))
    assert loops, "no loop has the products"
    inner = [one for one in loops if not any(one[0] <= o[0] and o[1] < one[1] for o in loops if o is not one)]
    return sum(bool(re.search(r"\b(?:STL|LDL)\b", line)) for _, _, inside in inner for line in inside)
