"""The rights that Landlock is asked to refuse, by the version that the kernel says it has; no kernel is needed."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from fp8moe.post.verify.confined import refuse_writes_outside

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Landlock is Linux's")
# From linux/landlock.h: WRITE_FILE, REMOVE_DIR, REMOVE_FILE, MAKE_CHAR to MAKE_SYM; REFER came with version 2 and
# TRUNCATE with 3. A right that a version does not know is EINVAL, and so no filter at all.
WRITE_FILE, REFER, TRUNCATE = 1 << 1, 1 << 13, 1 << 14
FIRST = WRITE_FILE | sum(1 << bit for bit in range(4, 13))
CREATE, ADD, RESTRICT = 444, 445, 446


class Kernel:
    """Landlock's three system calls. rights: that a rule set handles; allowed: of each path, in the order of the calls;
    fails: a call that the kernel refuses."""

    def __init__(self, version: int, fails: int | None = None) -> None:
        self.version, self.fails = version, fails
        self.rights, self.restricted = -1, False
        self.allowed: list[tuple[str, int]] = []

    def syscall(self, number: int, *given: Any) -> int:
        if number == CREATE and given[0] is None:
            assert (given[1].value, given[2]) == (0, 1), "it asks for the version"
            return self.version
        if number == self.fails:
            return -1
        if number == CREATE:
            assert given[1].value == 8
            self.rights = given[0]._obj.value
            return os.open(os.devnull, os.O_RDONLY)
        if number == ADD:
            assert given[1] == 1 and len(given[2].raw) == 12
            opened = int.from_bytes(given[2].raw[8:], "little")
            self.allowed.append((os.readlink(f"/proc/self/fd/{opened}"), int.from_bytes(given[2].raw[:8], "little")))
        self.restricted = number == RESTRICT
        return 0


@pytest.mark.parametrize(
    ("version", "rights"),
    [(1, FIRST), (2, FIRST | REFER), (3, FIRST | REFER | TRUNCATE), (6, FIRST | REFER | TRUNCATE)],
)
def test_every_right_that_the_version_knows_is_refused_outside(version: int, rights: int, tmp_path: Any) -> None:
    kernel = Kernel(version)
    assert refuse_writes_outside(kernel, str(tmp_path)) and kernel.restricted
    assert kernel.rights == rights
    assert kernel.allowed == [(str(tmp_path), rights), ("/dev/null", rights & (WRITE_FILE | TRUNCATE))]


@pytest.mark.parametrize("fails", [CREATE, ADD, RESTRICT])
def test_a_call_that_fails_is_no_filter(fails: int, tmp_path: Any) -> None:
    assert not refuse_writes_outside(Kernel(3, fails), str(tmp_path))


@pytest.mark.parametrize("version", [0, -1])
def test_a_kernel_without_landlock_is_asked_for_nothing(version: int, tmp_path: Any) -> None:
    kernel = Kernel(version)
    assert not refuse_writes_outside(kernel, str(tmp_path)) and kernel.rights == -1
