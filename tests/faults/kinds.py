"""The kinds of faults, and how many trials of each: in the whole table and in the short form."""

from __future__ import annotations

from tests.faults.bad_input import bad_file, bad_setting
from tests.faults.disks import corrupted, disk_full
from tests.faults.fault import Fault
from tests.faults.killed import killed_around_a_save, launcher_killed, signalled
from tests.faults.numbers import flipped_bit, nan_in_a_bias, nan_in_a_gradient, no_false_alarm
from tests.faults.soak import soaked

FAULTS = (
    Fault("save", "a rank killed around a save", killed_around_a_save, 100, 1),
    Fault("corrupt", "the newest checkpoint damaged", corrupted, 100, 3),
    Fault("signal", "a signal to a rank", signalled, 20, 1),
    Fault("launcher", "the launcher killed", launcher_killed, 5, 0),
    Fault("disk", "a full disk", disk_full, 12, 1),
    Fault("gradient", "a NaN in a gradient", nan_in_a_gradient, 20, 1),
    Fault("bias", "a NaN in a router's bias", nan_in_a_bias, 20, 1),
    Fault("bit", "a flipped bit in one of three replicas", flipped_bit, 20, 1),
    Fault("calm", "two thousand steps without a fault", no_false_alarm, 1, 0),
    Fault("settings", "a setting that can't be right", bad_setting, 300, 12),
    Fault("files", "a broken data file", bad_file, 100, 8),
    Fault("soak", "a soak of a thousand steps", soaked, 1, 0),
)
