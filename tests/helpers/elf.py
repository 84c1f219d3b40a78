"""The smallest ELF file that holds sections: what a driver is given where no compiler made a kernel."""

from __future__ import annotations

import struct

HEADER, SECTION = 64, 64


def elf(text: bytes = bytes(100)) -> bytes:
    """An image of 64 bits, little-endian: its header, a section of `text`, and behind it a table of two sections."""
    table = HEADER + len(text)
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, table, 0, HEADER, 0, 0, SECTION, 2, 1)
    section = struct.pack("<IIQQQQIIQQ", 0, 1, 0, 0, HEADER, len(text), 0, 0, 1, 0)
    return identity + header + text + bytes(SECTION) + section
