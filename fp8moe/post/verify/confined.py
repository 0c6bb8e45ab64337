"""Runs one Python program, then its tests, under limits: a script of its own that `post.verify.sandbox` starts.

It imports nothing of the package and runs before anything of the program does. stdin: JSON with `program`, `tests`,
`limits` and `token`. Argument 1: a descriptor to which it writes JSON lines: the limits in force, then the token if all
tests passed, or the error. A program that ends itself, by `os._exit(0)` say, leaves no token.

On Linux two of the kernel's own filters stand beside the resource limits, and need no rights: seccomp refuses system
calls that make processes or sockets, signal others or trace them; Landlock refuses writes outside the working
directory. Refused: namespaces by `unshare`, which some systems keep for root, and RLIMIT_NPROC as the only bound of
processes, which root is not subject to and which counts a user's other programs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import sys
import traceback
import types
from typing import Any

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
ALLOW, REFUSE, ABSENT = 0x7FFF0000, 0x00050001, 0x00050026  # EPERM, ENOSYS
LOAD, IS, HAS, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06  # of classic BPF
CLONE_THREAD = 0x10000
# System calls, by machine: (audit's name of it, always refused, those whose first argument must be this process,
# clone). Refused: fork, vfork, socket, ptrace, process_vm_writev, io_uring_setup, unshare, setns, mount, setsid,
# setpgid, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal. Own process only: kill, tgkill. Then prlimit64.
CALLS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], int, int]] = {
    "x86_64": (
        0xC000003E,
        (57, 58, 41, 101, 311, 425, 272, 308, 165, 112, 109, 200, 129, 297, 424),
        (62, 234),
        302,
        56,
    ),
    "aarch64": (0xC00000B7, (198, 117, 271, 425, 97, 268, 40, 157, 154, 130, 138, 240, 424), (129, 131), 261, 220),
}
CLONE3 = 435  # its flags lie in memory, where a filter can't look: glibc takes clone instead
X32 = 0x40000000  # calls of another numbering
# Landlock: the rights that write, of its first version, then REFER and TRUNCATE of the second and third.
WRITES, REFER, TRUNCATE = 0b1111111110010, 1 << 13, 1 << 14


def filter_program(machine: str, pid: int) -> list[tuple[int, int, int, int]]:
    """The seccomp filter as classic BPF: (code, jump if true, jump if false, value)."""
    audit, refused, own, prlimit, clone = CALLS[machine]
    rules = [(LOAD, 0, 0, 4), (IS, 1, 0, audit), (RETURN, 0, 0, REFUSE), (LOAD, 0, 0, 0)]
    rules += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, REFUSE), (IS, 0, 1, CLONE3), (RETURN, 0, 0, ABSENT)]
    for call in refused:
        rules += [(IS, 0, 1, call), (RETURN, 0, 0, REFUSE)]
    by_argument = [*((call, IS, pid) for call in own), (prlimit, IS, 0), (clone, HAS, CLONE_THREAD)]
    for call, test, value in by_argument:
        rules += [
            (IS, 0, 4, call),
            (LOAD, 0, 0, 16),
            (test, 1, 0, value),
            (RETURN, 0, 0, REFUSE),
            (RETURN, 0, 0, ALLOW),
        ]
    return [*rules, (RETURN, 0, 0, ALLOW)]


def refuse_system_calls(libc: Any) -> bool:
    """Install the filter; whether the kernel took it."""
    if platform.machine() not in CALLS:
        return False
    rules = filter_program(platform.machine(), os.getpid())
    packed = b"".join(
        code.to_bytes(2, "little") + bytes([yes, no]) + value.to_bytes(4, "little") for code, yes, no, value in rules
    )
    code = ctypes.create_string_buffer(packed, len(packed))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    program = Program(len(rules), ctypes.addressof(code))
    return libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(program), 0, 0) == 0


def refuse_writes_outside(libc: Any, folder: str) -> bool:
    """Let this process write below `folder` and to /dev/null only; whether the kernel took it."""
    create, add, restrict = 444, 445, 446  # the same numbers on all machines
    version = libc.syscall(create, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = WRITES | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    rules = libc.syscall(create, ctypes.byref(ctypes.c_uint64(rights)), ctypes.c_size_t(8), 0)
    if rules < 0:
        return False
    for path, allowed in ((folder, rights), (os.devnull, rights & (1 << 1 | TRUNCATE))):
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        beneath = allowed.to_bytes(8, "little") + opened.to_bytes(4, "little")
        refused = libc.syscall(add, rules, 1, ctypes.create_string_buffer(beneath, len(beneath)), 0)
        os.close(opened)
        if refused:
            return False
    taken: bool = libc.syscall(restrict, rules, 0) == 0
    os.close(rules)
    return taken


def confine(limits: dict[str, int]) -> list[str]:
    """Set every limit that this platform has; the names of those in force."""
    within = {
        "cpu": [(resource.RLIMIT_CPU, limits["cpu_seconds"])],
        "memory": [(resource.RLIMIT_AS, limits["memory"])],
        "file size": [(resource.RLIMIT_FSIZE, limits["file_size"])],
        "open files": [(resource.RLIMIT_NOFILE, limits["open_files"]), (resource.RLIMIT_CORE, 0)],
    }
    force = []
    for name, values in within.items():
        with contextlib.suppress(ValueError, OSError):
            for which, value in values:
                hard = resource.getrlimit(which)[1]
                resource.setrlimit(
                    which, (value, value) if hard in (resource.RLIM_INFINITY, -1) else (min(value, hard),) * 2
                )
            force.append(name)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0)
        if refuse_writes_outside(libc, os.getcwd()):
            force.append("writes")
        if refuse_system_calls(libc):
            return [*force, "processes", "network"]
    if os.getuid():  # which root is not subject to
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
            force.append("processes")
    return force


def run(job: dict[str, Any]) -> str:
    """Run the program and its tests; "" if nothing was raised, else the error in a line."""
    module = types.ModuleType("sample")
    sys.modules["sample"] = module
    for name in ("program", "tests"):
        try:
            exec(compile(job[name], f"<{name}>", "exec"), module.__dict__)
        except MemoryError:
            return f"MemoryError in the {name}"
        except BaseException as error:
            words = "".join(traceback.format_exception_only(error)).strip().splitlines()
            lines = [
                frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == f"<{name}>"
            ]
            return f"{words[-1][:200] if words else 'error'} in the {name}" + (f", line {lines[-1]}" if lines else "")
    return ""


def main() -> None:
    """Read the job, set the limits, run."""
    job, answer = json.load(sys.stdin), int(sys.argv[1])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.write(answer, json.dumps({"limits": confine(job["limits"])}).encode() + b"\n")
    error = run(job)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(answer, json.dumps({"error": error} if error else {"token": job["token"]}).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
