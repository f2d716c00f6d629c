//! The kernel's log: printk's ring buffer, as of Linux 5.10.
//!
//! ```text
//! prb ─▶ printk_ringbuffer ┬ desc_ring: descs[id % n] ── begin, next ──▶ text_data_ring
//!                          │            infos[id % n] ── time, length
//!                          └ ids run from tail_id to head_id; the top two bits of a descriptor's
//!                            state_var are its state, the rest its id
//! ```

use std::ops::RangeInclusive;

use super::{Kernel, KernelError};

/// Maximum size of text, bytes: `log_buf_len` can be up to 2 GiB, but that is unusual. The newest messages are
/// kept.
const TEXT_MAX_BYTES: usize = 32 << 20;
/// Maximum number of messages; the newest are kept.
const RECORDS_MAX: u64 = 1 << 19;
/// Number of newest messages of which one must be readable: a dying kernel may not have finished the last message of
/// each CPU.
const RECORDS_TRIED: u64 = 64;
/// Maximum size of a ring, as a power of two.
const RING_BITS_MAX: u32 = 31;
/// Id bits of a descriptor's state word.
const ID_MASK: u64 = u64::MAX >> 2;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Nanoseconds since boot.
    pub time_ns: u64,
    /// The task or CPU that wrote the message, in the kernel's numbering; 0 if unknown.
    pub caller: u32,
    /// Facility of the writer, as in syslog(3): 0 is the kernel. Messages that programs write to `/dev/kmsg` never
    /// have 0.
    pub facility: u8,
    /// Text of the message; may have several lines.
    pub text: Vec<u8>,
}

/// The log, oldest message first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    /// The messages.
    pub records: Vec<Record>,
    /// Number of messages in the buffer that were skipped because there were too many.
    pub not_taken: u64,
    /// Number of messages whose text could not be read.
    pub unreadable: u64,
}

impl Log {
    /// Returns the text, byte for byte as written by `makedumpfile --dump-dmesg`.
    pub fn text(&self) -> Vec<u8> {
        let mut text = Vec::new();
        for record in &self.records {
            record.put(&mut text);
        }
        text
    }
}

impl Record {
    /// Returns true if the kernel wrote the message, not a program.
    pub fn is_of_kernel(&self) -> bool {
        self.facility == 0
    }

    /// Appends the message with its time; indents the lines after the first.
    fn put(&self, out: &mut Vec<u8>) {
        let (seconds, micros) = (
            self.time_ns / 1_000_000_000,
            self.time_ns / 1000 % 1_000_000,
        );
        let time = format!("[{seconds:5}.{micros:06}] ");
        out.extend(time.bytes());
        for &byte in &self.text {
            match byte {
                b'\n' => {
                    out.push(b'\n');
                    out.resize(out.len() + time.len(), b' ');
                }
                // isprint(3) and isspace(3) in the C locale.
                b' '..=b'~' | b'\t' | b'\r' | 0x0b | 0x0c => out.push(byte),
                // makedumpfile prints a signed char: values above 127 become four bytes.
                _ => {
                    let signed = i32::from(byte.cast_signed());
                    out.extend(format!("\\x{signed:02x}").bytes());
                }
            }
        }
        out.push(b'\n');
    }
}

/// Offsets and sizes, from VMCOREINFO.
struct Layout {
    desc_bytes: u64,
    state_var: u64,
    begin: u64,
    next: u64,
    info_bytes: u64,
    text_len: u64,
    time: u64,
    caller: u64,
    /// Not in VMCOREINFO; `None` if the members around it differ from Linux 5.10 to 6.12.
    facility: Option<u64>,
}

struct Ring {
    layout: Layout,
    descs: u64,
    infos: u64,
    desc_mask: u64,
    text: u64,
    text_mask: u64,
}

impl Kernel<'_> {
    /// Reads the log.
    ///
    /// # Errors
    ///
    /// When VMCOREINFO does not describe the buffer (before Linux 5.10), or it cannot be read. An
    /// unreadable message is counted and skipped.
    pub fn log(&self) -> Result<Log, KernelError> {
        let (ring, ids) = self.ring()?;
        Ok(self.walk(&ring, *ids.start(), *ids.end()))
    }

    /// Returns true if one of the newest messages can be read.
    pub(super) fn has_log(&self) -> bool {
        self.ring().is_ok_and(|(ring, ids)| {
            let newest = (0..RECORDS_TRIED).map(|back| ids.end().wrapping_sub(back) & ID_MASK);
            let mut newest = newest.map(|id| self.record(&ring, id));
            newest.any(|record| matches!(record, Ok(Some(_))))
        })
    }

    /// Returns the ring, and the ids from its tail to its head.
    fn ring(&self) -> Result<(Ring, RangeInclusive<u64>), KernelError> {
        let info = self.info();
        let buffer = self.u64_at(info.symbol("prb")?, "the address of the log")?;
        let counter = info.offset("atomic_long_t.counter")?;
        let at =
            |base: u64, name: &str| Ok::<_, KernelError>(base.wrapping_add(info.offset(name)?));
        let desc_ring = at(buffer, "printk_ringbuffer.desc_ring")?;
        let member = |name: &str| at(desc_ring, name);
        let tail = self.u64_at(
            member("prb_desc_ring.tail_id")?.wrapping_add(counter),
            "the log's tail",
        )?;
        let head = self.u64_at(
            member("prb_desc_ring.head_id")?.wrapping_add(counter),
            "the log's head",
        )?;
        let bits_at = member("prb_desc_ring.count_bits")?;
        let bits = self.u32_at(bits_at, "the log's size")?;
        let text_ring = at(buffer, "printk_ringbuffer.text_data_ring")?;
        let text_bits_at = at(text_ring, "prb_data_ring.size_bits")?;
        let text_bits = self.u32_at(text_bits_at, "the log's size")?;
        for (bits, virt) in [(bits, bits_at), (text_bits, text_bits_at)] {
            if bits > RING_BITS_MAX {
                let what = "the size of the log";
                return Err(KernelError::Nonsense { what, virt });
            }
        }
        let block = info.offset("prb_desc.text_blk_lpos")?;
        let text_len = info.offset("printk_info.text_len")?;
        let caller = info.offset("printk_info.caller_id")?;
        let ring = Ring {
            layout: Layout {
                desc_bytes: info.size("prb_desc")?,
                state_var: info.offset("prb_desc.state_var")? + counter,
                begin: block + info.offset("prb_data_blk_lpos.begin")?,
                next: block + info.offset("prb_data_blk_lpos.next")?,
                info_bytes: info.size("printk_info")?,
                text_len,
                time: info.offset("printk_info.ts_nsec")?,
                caller,
                // The layout: a 16-bit length, the facility, 8 bits of flags and level, the caller.
                facility: (caller == text_len + 4).then_some(text_len + 2),
            },
            descs: self.u64_at(member("prb_desc_ring.descs")?, "the log's descriptors")?,
            infos: self.u64_at(member("prb_desc_ring.infos")?, "the log's descriptors")?,
            desc_mask: (1 << bits) - 1,
            text: self.u64_at(at(text_ring, "prb_data_ring.data")?, "the log's text")?,
            text_mask: (1 << text_bits) - 1,
        };
        Ok((ring, (tail & ID_MASK)..=(head & ID_MASK)))
    }

    /// Reads from the newest to the oldest message, so that the limit drops the oldest ones.
    fn walk(&self, ring: &Ring, tail: u64, head: u64) -> Log {
        let mut log = Log::default();
        let ids = (head.wrapping_sub(tail) & ID_MASK).min(ring.desc_mask) + 1;
        let mut text_bytes = 0;
        for back in 0..ids {
            // The limit also counts unreadable messages: a damaged ring may have no readable one.
            if back == RECORDS_MAX || text_bytes > TEXT_MAX_BYTES {
                log.not_taken = ids - back;
                break;
            }
            match self.record(ring, head.wrapping_sub(back) & ID_MASK) {
                Ok(Some(record)) => {
                    text_bytes += record.text.len();
                    log.records.push(record);
                }
                Ok(None) => {}
                Err(_) => log.unreadable += 1,
            }
        }
        log.records.reverse();
        log
    }

    /// Returns the message with this id; `None` if it was not written, or has no text.
    fn record(&self, ring: &Ring, id: u64) -> Result<Option<Record>, KernelError> {
        let layout = &ring.layout;
        let slot = id & ring.desc_mask;
        let desc = ring.descs.wrapping_add(slot * layout.desc_bytes);
        let what = "a message's descriptor";
        let state = self.u64_at(desc.wrapping_add(layout.state_var), what)?;
        let written = matches!(state >> 62, 1 | 2) && state & ID_MASK == id;
        if !written {
            return Ok(None);
        }
        let mut begin = self.u64_at(desc.wrapping_add(layout.begin), what)? & ring.text_mask;
        let next = self.u64_at(desc.wrapping_add(layout.next), what)? & ring.text_mask;
        if begin == next {
            return Ok(None);
        }
        // A block that does not fit at the end is at the beginning.
        if begin > next {
            begin = 0;
        }
        // The id precedes the text.
        begin += 8;
        let info = ring.infos.wrapping_add(slot * layout.info_bytes);
        let text_len = self.bytes(info.wrapping_add(layout.text_len), what)?;
        let length = u64::from(u16::from_le_bytes(text_len)).min(next.saturating_sub(begin));
        // At most 65535.
        let mut text = vec![0; usize::try_from(length).unwrap_or(0)];
        let read = self.read(ring.text.wrapping_add(begin), &mut text);
        read.map_err(|source| KernelError::Memory {
            what: "a message's text",
            source,
        })?;
        Ok(Some(Record {
            time_ns: self.u64_at(info.wrapping_add(layout.time), what)?,
            caller: self.u32_at(info.wrapping_add(layout.caller), what)?,
            facility: match layout.facility {
                Some(at) => u8::from_le_bytes(self.bytes(info.wrapping_add(at), what)?),
                None => 0,
            },
            text,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_indented_and_what_cannot_be_printed_is_written_as_makedumpfile_does() {
        let log = Log {
            records: vec![Record {
                time_ns: 3_000_001_999,
                caller: 0,
                facility: 0,
                text: b"a\tb\nc\x01\xffd".to_vec(),
            }],
            ..Log::default()
        };
        let expected = b"[    3.000001] a\tb\n               c\\x01\\xffffffffd\n";
        assert_eq!(log.text(), expected);
    }
}
