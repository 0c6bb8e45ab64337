"""PTX text to a program: instructions with their predicate, operands and place in the source, labels, parameters.

A program is what the machine of this folder runs. Names that an inline-assembly block declares for itself (registers
and labels inside braces) are made unique, so that ten copies of one wait loop are ten loops. Every instruction keeps
the text of the `.loc` line in force, which names the Python line it was compiled from, with the calls around it.

Only what Triton's compiler writes is read: one entry function, no calls, one table of branch targets a `brx`. A
general PTX front end was refused; an unknown directive inside the body is an error, so nothing is skipped silently.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

TYPES = {"pred": 1, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64, "u32": 32, "u64": 64, "s32": 32, "s64": 64}
_LABEL = re.compile(r"\s*[$\w]+:")
_GUARD = re.compile(r"@(!?)([%\w]+) ")
_NUMBERED = re.compile(r"(%[a-z]+)\d+")
_SKIPPED = (".section", ".file", ".pragma", ".b8", ".b32", ".b64", ".version", ".target", ".address_size", ".extern")


class Unsupported(RuntimeError):
    """The program has something that this machine does not know."""


@dataclass
class Instruction:
    """One instruction; `parts` is the opcode split at its dots."""

    opcode: str
    operands: list[str]
    guard: str | None = None
    negated: bool = False
    place: str = ""

    @cached_property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    def __str__(self) -> str:
        text = f"{self.opcode} {', '.join(self.operands)}"
        return text if len(text) <= 100 else f"{text[:97]}..."


@dataclass
class Parameter:
    """A kernel parameter: its size in bytes, and whether it is a tensor map passed by value."""

    name: str
    size: int
    tensor_map: bool = False


@dataclass
class Program:
    """A compiled kernel."""

    name: str = ""
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    parameters: list[Parameter] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)  # prefix or name -> bits, 1 for a predicate
    threads: int = 0
    max_registers: int = 0
    cluster: int = 1
    local_bytes: int = 0  # of local memory, a thread
    numbered: dict[str, int] = field(default_factory=dict)  # width of each text asked for so far, 0 if no register

    def bits(self, register: str) -> int:
        """Width of a register in bits; 1 for a predicate."""
        found = self.registers.get(register) or self.numbered.get(register)
        if not found and not self.is_register(register):
            raise Unsupported(f"register {register} is not declared")
        return found or self.numbered[register]

    def is_register(self, text: str) -> bool:
        if text in self.registers:
            return True
        if text not in self.numbered:
            match = _NUMBERED.fullmatch(text)
            self.numbered[text] = 0 if match is None else self.registers.get(match[1], 0)
        return self.numbered[text] > 0


def split_operands(text: str) -> list[str]:
    """Operands at the commas outside braces and brackets."""
    if "{" not in text and "[" not in text:
        return [word.strip() for word in text.split(",")] if text else []
    found, depth, word = [], 0, ""
    for c in text:
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            found.append(word.strip())
            word = ""
        else:
            word += c
    return [*found, word.strip()] if word.strip() else found


def list_of(text: str) -> list[str]:
    """The names inside `{a, b}`, or the one name."""
    return [part.strip() for part in text.strip("{} \t").split(",")]


@dataclass
class _Scope:
    """An inline-assembly block: what it declares, and where its instructions begin."""

    number: int
    first: int
    names: set[str] = field(default_factory=set)


class _Body:
    """Reads the lines of a function's body into a program."""

    def __init__(self, program: Program) -> None:
        self.program, self.place, self.scopes, self.number, self.buffer = program, "", [], 0, ""

    def line(self, code: str, comment: str) -> None:
        """One line without its comment."""
        if not self.buffer.strip():
            if code.split()[:1] == [".loc"]:
                self.place = comment or " ".join(code.split()[1:4])
                return
            if code.startswith(_SKIPPED):
                return
            if code.find(";") == len(code) - 1 and code[:1] not in ("{", "}", "") and not _LABEL.match(code):
                self.buffer = ""
                self.statement(" ".join(code[:-1].split()))  # one statement, as nearly every line
                return
        for c in code + "\n":
            if c == "{" and not self.buffer.strip():
                self.number += 1
                self.scopes.append(_Scope(self.number, len(self.program.code)))
            elif c == "}" and not self.buffer.strip():
                if self.scopes:
                    self.close(self.scopes.pop())
            elif c == ":" and re.fullmatch(r"\s*[$\w]+", self.buffer):
                self.label(self.buffer.strip())
            elif c == ";":
                self.statement(" ".join(self.buffer.split()))
                self.buffer = ""
            else:
                self.buffer += c

    def label(self, name: str) -> None:
        self.buffer = ""
        if self.scopes:
            self.scopes[-1].names.add(name)
            name = f"{name}#{self.scopes[-1].number}"
        self.program.labels[name] = len(self.program.code)
        self.last_label = name

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self.declare(text)
        elif text.startswith(".branchtargets"):
            targets = split_operands(text.removeprefix(".branchtargets"))
            self.program.tables[self.last_label] = targets
            del self.program.labels[self.last_label]
        elif text.startswith(".local"):
            self.local(text)
        elif text.startswith(".pragma"):
            return
        elif text.startswith("."):
            raise Unsupported(f"directive {text!r} is not known")
        elif text:
            self.instruction(text)

    def local(self, text: str) -> None:
        """A thread's own memory: `.local .align 2 .b8 __local_depot0[2]`."""
        match = re.fullmatch(r"\.local \.align \d+ \.b8 __local_depot\d+\[(\d+)\]", text)
        if match is None or self.program.local_bytes:
            raise Unsupported(f"directive {text!r} is not known")
        self.program.local_bytes = int(match[1])

    def declare(self, text: str) -> None:
        kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", text).groups()
        for name in split_operands(names):
            if match := re.fullmatch(r"(%[a-z]+)<\d+>", name):
                self.program.registers[match[1]] = TYPES[kind]
            elif self.scopes:
                self.scopes[-1].names.add(name)
                self.program.registers[f"{name}#{self.scopes[-1].number}"] = TYPES[kind]
            else:
                self.program.registers[name] = TYPES[kind]

    def instruction(self, text: str) -> None:
        guard, negated = None, False
        if match := _GUARD.match(text):
            guard, negated, text = match[2], bool(match[1]), text[match.end() :]
        opcode, _, rest = text.partition(" ")
        self.program.code.append(Instruction(opcode, split_operands(rest), guard, negated, self.place))

    def close(self, scope: _Scope) -> None:
        """Make the block's own names unique."""
        if not scope.names:
            return
        pattern = re.compile(r"(?<![\w%$.])(" + "|".join(map(re.escape, sorted(scope.names))) + r")(?![\w#])")
        for one in self.program.code[scope.first :]:
            one.operands = [pattern.sub(rf"\1#{scope.number}", text) for text in one.operands]
            if one.guard in scope.names:
                one.guard = f"{one.guard}#{scope.number}"


def _parameters(head: str) -> list[Parameter]:
    found = []
    for match in re.finditer(
        r"\.param (?:\.align \d+ )?\.(\w+) (?:\.ptr )?(?:\.\w+ )?(?:\.align \d+ )?(\w+)(\[\d+\])?", head
    ):
        size = int(match[3].strip("[]")) if match[3] else int(match[1][1:]) // 8
        found.append(Parameter(match[2], size, match[3] is not None))
    return found


def parse(text: str) -> Program:
    """The entry function in `text`."""
    entry = re.search(r"\.entry (\w+)\(", text)
    if entry is None:
        raise Unsupported("no entry function in this PTX")
    start = text.index("\n{", entry.end())
    head = text[entry.end() : start]
    program = Program(entry[1], parameters=_parameters(head))
    program.threads = int(re.search(r"\.reqntid (\d+)", head)[1])
    if match := re.search(r"\.maxnreg (\d+)", head):
        program.max_registers = int(match[1])
    if match := re.search(r"\.reqnctapercluster (\d+)", head):
        program.cluster = int(match[1])
    body = _Body(program)
    for raw in text[start + 2 :].splitlines():
        if raw.startswith("}") and not body.scopes:
            break
        code, _, comment = raw.partition("//")
        body.line(code.strip(), comment.strip())
    return program
