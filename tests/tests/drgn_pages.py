"""Reads a vmcore with drgn and compares every page with the guest's memory.

    drgn_pages.py <vmcore> <memory file>

Prints how many pages the vmcore does not have, and the kernel's release as drgn finds it by a virtual address.
Exit status 1 when a page differs. In an ELF core a page that was left out reads as zeros.
"""

import sys

import drgn

PAGE = 4096

core, memory = sys.argv[1:]
program = drgn.Program()
program.set_core_dump(core)
info = dict(
    line.split("=", 1)
    for line in program["VMCOREINFO"].string_().decode().splitlines()
    if "=" in line
)
names = program.read(int(info["SYMBOL(init_uts_ns)"], 16), 6 * 65)
release = names[2 * 65 :].split(b"\0")[0].decode()
elf = open(core, "rb").read(4) == b"\x7fELF"
missing = different = 0
with open(memory, "rb") as file:
    at = 0
    while page := file.read(PAGE):
        try:
            found = program.read(at, PAGE, physical=True)
            if found != page and not (elf and not any(found)):
                different += 1
        except drgn.FaultError:
            missing += 1
        at += PAGE
print(f"missing {missing} release {release}")
sys.exit(1 if different else 0)
