"""Prints the CPU that panicked, and the PID, name and stack of its current task, as drgn reads them.

    drgn_crashed.py <vmcore> <vmlinux>

The output is one JSON object. Functions in modules have no names, because drgn gets no symbols of modules.
"""

import json
import sys

import drgn
from drgn.helpers.linux.sched import cpu_curr

core, vmlinux = sys.argv[1:]
program = drgn.Program()
program.set_core_dump(core)
program.load_debug_info([vmlinux])
cpu = program["panic_cpu"].counter.value_()
if cpu < 0:
    print(json.dumps({"cpu": None}))
    sys.exit(0)
task = cpu_curr(program, cpu)
print(
    json.dumps(
        {
            "cpu": cpu,
            "pid": task.pid.value_(),
            "comm": task.comm.string_().decode(errors="replace"),
            "stack": [frame.name for frame in program.stack_trace(task)],
        }
    )
)
