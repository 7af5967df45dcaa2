"""Takes unwanted libraries out of a dynamically linked program.

Debian's fio is linked with Ceph, Gluster, RDMA, pmem and, through them, some sixty libraries (84 MiB). In an emulated
PV guest the dynamic linker alone then needs ten to twenty seconds for each start. None of those engines is used, so
the program is edited: the libraries are struck from its list of needs, their versions from the version list, and
every undefined symbol becomes weak, so that what is missing is a null pointer that nobody calls.

Layouts: the ELF-64 object file format; symbol versioning as in the LSB core specification.
"""

from __future__ import annotations

import struct

DT_NULL, DT_NEEDED, DT_STRTAB, DT_SYMTAB, DT_STRSZ = 0, 1, 5, 6, 10
DT_VERNEED, DT_VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF
#: A tag in the range for operating systems which no loader knows, and therefore skips.
DT_IGNORED = 0x60000001
PT_LOAD, PT_DYNAMIC = 1, 2
SYMBOL_SIZE, STB_WEAK, SHN_UNDEF = 24, 2, 0


class Program:
    """An ELF-64 little-endian file as bytes that can be edited in place."""

    def __init__(self, data: bytes) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("not a 64-bit little-endian ELF file")
        self.data = bytearray(data)
        table, = struct.unpack_from("<Q", data, 32)
        size, count = struct.unpack_from("<HH", data, 54)
        self.segments = [struct.unpack_from("<IIQQQQQQ", data, table + i * size) for i in range(count)]
        start, length = next((s[2], s[5]) for s in self.segments if s[0] == PT_DYNAMIC)
        self.dynamic = []           # (place in the file, tag, value)
        for place in range(start, start + length, 16):
            tag, value = struct.unpack_from("<QQ", data, place)
            if tag == DT_NULL:
                break
            self.dynamic.append((place, tag, value))
        self.tags = {tag: (place, value) for place, tag, value in self.dynamic}

    def offset(self, address: int) -> int:
        """Where in the file an address of the loaded program comes from."""
        for kind, _, offset, start, _, size, *_ in self.segments:
            if kind == PT_LOAD and start <= address < start + size:
                return offset + address - start
        raise ValueError(f"address {address:#x} is in no segment")

    def text(self, index: int) -> str:
        start = self.offset(self.tags[DT_STRTAB][1]) + index
        return self.data[start:self.data.index(b"\0", start)].decode()

    def needed(self) -> list[str]:
        return [self.text(value) for place, tag, value in self.dynamic
                if tag == DT_NEEDED and struct.unpack_from("<Q", self.data, place)[0] == DT_NEEDED]

    def keep_only(self, wanted: list[str]) -> list[str]:
        """Strike every needed library whose name starts with none of `wanted`; returns what was struck."""
        struck = [name for name in self.needed() if not name.startswith(tuple(wanted))]
        for place, tag, value in self.dynamic:
            if tag == DT_NEEDED and self.text(value) in struck:
                struct.pack_into("<Q", self.data, place, DT_IGNORED)
        self._strike_versions(struck)
        self._weaken_undefined()
        return struck

    def _strike_versions(self, struck: list[str]) -> None:
        """Unlink the libraries' records from the chain of Elf64_Verneed: the loader insists on finding each file."""
        if DT_VERNEED not in self.tags:
            return
        here = self.offset(self.tags[DT_VERNEED][1])
        records = []
        for _ in range(self.tags[DT_VERNEEDNUM][1]):
            _, _, file, _, step = struct.unpack_from("<HHIII", self.data, here)
            records.append((here, self.text(file)))
            here += step
        kept = [place for place, name in records if name not in struck]
        if not kept or kept[0] != records[0][0]:
            # The first record cannot be unlinked; the table itself starts at the next one instead.
            place, address = self.tags[DT_VERNEED]
            if kept:
                struct.pack_into("<Q", self.data, place + 8, address + kept[0] - records[0][0])
        for place, following in zip(kept, kept[1:] + [0]):
            struct.pack_into("<I", self.data, place + 12, following - place if following else 0)
        struct.pack_into("<Q", self.data, self.tags[DT_VERNEEDNUM][0] + 8, len(kept))

    def _weaken_undefined(self) -> None:
        start = self.offset(self.tags[DT_SYMTAB][1])
        # The string table follows the symbol table in every linker's output; there is no count to read.
        end = self.offset(self.tags[DT_STRTAB][1])
        for place in range(start + SYMBOL_SIZE, end, SYMBOL_SIZE):
            name, info, _, section = struct.unpack_from("<IBBH", self.data, place)
            if name and section == SHN_UNDEF:
                self.data[place + 4] = STB_WEAK << 4 | info & 15
