//! The structures of the file formats, for x86_64. They are little-endian, except the flattened format, which is
//! big-endian.
//!
//! ```text
//! ELF core                          kdump-compressed, in blocks of 4 KiB
//! ┌ ElfHeader                       ┌ KdumpHeader                                 block 0
//! │ ProgramHeader × n               │ KdumpSubHeader, notes                       block 1 …
//! │ notes                           │ bitmap: pages the machine has                one bit each
//! └ memory, as the headers say      │ bitmap: pages the file has                   one bit each
//!                                   │ PageDescriptor × bits set in the second
//!                                   └ pages, each compressed separately
//! ```

use core::mem::{offset_of, size_of};

use zerocopy::byteorder::{big_endian, little_endian};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use little_endian::{I32, U16, U32, U64};

/// First bytes of an ELF file: the class is 64 bits, the byte order little.
pub(crate) const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// `e_ident` up to the version: 64 bits, little-endian, version 1.
pub(crate) const ELF_IDENT: [u8; 7] = *b"\x7fELF\x02\x01\x01";
/// `e_type` of a core.
pub(crate) const ET_CORE: u16 = 4;
/// `e_machine` of x86_64.
pub(crate) const EM_X86_64: u16 = 62;
/// `e_phnum` if the count is in `sh_info` of the first section.
pub(crate) const PN_XNUM: u16 = 0xffff;
/// `e_flags` of an unfinished core; makedumpfile's bit.
pub(crate) const ELF_INCOMPLETE: u32 = 1;
/// Memory.
pub(crate) const PT_LOAD: u32 = 1;
/// Notes.
pub(crate) const PT_NOTE: u32 = 4;
/// An unused section header.
pub(crate) const SHT_NULL: u32 = 0;
/// A section of notes.
pub(crate) const SHT_NOTE: u32 = 7;
/// A section without data in the file.
pub(crate) const SHT_NOBITS: u32 = 8;

/// ELF's file header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct ElfHeader {
    pub(crate) ident: [u8; 16],
    pub(crate) kind: U16,
    pub(crate) machine: U16,
    pub(crate) version: U32,
    pub(crate) entry: U64,
    pub(crate) phoff: U64,
    pub(crate) shoff: U64,
    pub(crate) flags: U32,
    pub(crate) ehsize: U16,
    pub(crate) phentsize: U16,
    pub(crate) phnum: U16,
    pub(crate) shentsize: U16,
    pub(crate) shnum: U16,
    pub(crate) shstrndx: U16,
}

/// One segment of an ELF file.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct ProgramHeader {
    pub(crate) kind: U32,
    pub(crate) flags: U32,
    pub(crate) offset: U64,
    pub(crate) vaddr: U64,
    pub(crate) paddr: U64,
    pub(crate) filesz: U64,
    pub(crate) memsz: U64,
    pub(crate) align: U64,
}

/// One section of an ELF file; used for its `info` and its end.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct SectionHeader {
    pub(crate) name: U32,
    pub(crate) kind: U32,
    pub(crate) flags: U64,
    pub(crate) addr: U64,
    pub(crate) offset: U64,
    pub(crate) size: U64,
    pub(crate) link: U32,
    pub(crate) info: U32,
    pub(crate) addralign: U64,
    pub(crate) entsize: U64,
}

/// Header of a note, before its name and contents, each of which is padded to four bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct NoteHeader {
    pub(crate) name_bytes: U32,
    pub(crate) content_bytes: U32,
    pub(crate) kind: U32,
}

/// First bytes of a kdump-compressed file.
pub(crate) const KDUMP_MAGIC: [u8; 8] = *b"KDUMP   ";
/// The status bit of an unfinished file.
pub(crate) const KDUMP_INCOMPLETE: u32 = 8;
/// Version of written headers, and the newest existing version.
pub(crate) const KDUMP_VERSION: i32 = 6;

/// The first block of a kdump-compressed file.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct KdumpHeader {
    pub(crate) signature: [u8; 8],
    pub(crate) version: I32,
    pub(crate) utsname: [[u8; 65]; 6],
    pub(crate) padding: [u8; 6],
    pub(crate) time_seconds: U64,
    pub(crate) time_microseconds: U64,
    pub(crate) status: U32,
    pub(crate) block_size: U32,
    pub(crate) sub_header_blocks: U32,
    pub(crate) bitmap_blocks: U32,
    pub(crate) max_mapnr: U32,
    pub(crate) total_ram_blocks: U32,
    pub(crate) device_blocks: U32,
    pub(crate) written_blocks: U32,
    pub(crate) current_cpu: U32,
    pub(crate) cpus: U32,
}

/// Index of the kernel's release among a header's names.
pub(crate) const UTSNAME_RELEASE: usize = 2;

/// The second block, as of header version 6; older versions are shorter.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct KdumpSubHeader {
    pub(crate) phys_base: U64,
    pub(crate) dump_level: U32,
    pub(crate) split: U32,
    pub(crate) start_pfn: U64,
    pub(crate) end_pfn: U64,
    /// Version 3 and newer.
    pub(crate) vmcoreinfo_offset: U64,
    pub(crate) vmcoreinfo_bytes: U64,
    /// Version 4 and newer.
    pub(crate) notes_offset: U64,
    pub(crate) notes_bytes: U64,
    /// Version 5 and newer.
    pub(crate) eraseinfo_offset: U64,
    pub(crate) eraseinfo_bytes: U64,
    /// Version 6 and newer.
    pub(crate) start_pfn_64: U64,
    pub(crate) end_pfn_64: U64,
    pub(crate) max_mapnr_64: U64,
}

/// Location of one page.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct PageDescriptor {
    pub(crate) offset: U64,
    pub(crate) bytes: U32,
    pub(crate) flags: U32,
    pub(crate) page_flags: U64,
}

/// First bytes of a flattened file, padded with zeros to 16.
pub(crate) const FLATTENED_MAGIC: [u8; 16] = *b"makedumpfile\0\0\0\0";
/// Bytes of a flattened file before the first record.
pub(crate) const FLATTENED_HEADER_BYTES: u64 = 4096;

/// The beginning of a flattened file.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct FlattenedHeader {
    pub(crate) signature: [u8; 16],
    pub(crate) kind: big_endian::U64,
    pub(crate) version: big_endian::U64,
}

/// Header of each record of a flattened file, with the offset of its bytes. Both fields are −1 at the end.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct FlattenedRecord {
    pub(crate) offset: big_endian::I64,
    pub(crate) bytes: big_endian::I64,
}

const _: () = {
    assert!(size_of::<ElfHeader>() == 64);
    assert!(offset_of!(ElfHeader, flags) == 48);
    assert!(size_of::<ProgramHeader>() == 56);
    assert!(size_of::<SectionHeader>() == 64);
    assert!(size_of::<NoteHeader>() == 12);
    assert!(size_of::<KdumpHeader>() == 464);
    assert!(offset_of!(KdumpHeader, time_seconds) == 408);
    assert!(offset_of!(KdumpHeader, status) == 424);
    assert!(size_of::<KdumpSubHeader>() == 104);
    assert!(offset_of!(KdumpSubHeader, notes_offset) == 48);
    assert!(size_of::<PageDescriptor>() == 24);
    assert!(size_of::<FlattenedHeader>() == 32);
    assert!(size_of::<FlattenedRecord>() == 16);
};
