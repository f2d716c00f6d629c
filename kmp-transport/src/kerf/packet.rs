//! The vsock packet header: that of virtio-vsock, 44 bytes.

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 44;
/// A stream's packets.
const STREAM: u16 = 1;

/// The operation of a packet. The answer to others is "unknown".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
    Unknown(u16),
}

/// Bit of a SHUTDOWN: its sender will not receive.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// Bit of a SHUTDOWN: its sender will not send.
pub(super) const SHUTDOWN_SEND: u32 = 2;

impl Op {
    fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(number) => number,
        }
    }
}

impl From<u16> for Op {
    fn from(number: u16) -> Self {
        match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) op: Op,
    pub(super) flags: u32,
    /// Bytes that its sender takes in all before they are read.
    pub(super) buf_alloc: u32,
    /// Bytes of the stream that were read there, counted on and on.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut rest = &mut bytes[..];
        let mut put = |field: &[u8]| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(field.len());
            now.copy_from_slice(field);
            rest = later;
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&STREAM.to_le_bytes());
        put(&self.op.number().to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The header and the payload of a packet; `None` when it breaks the rules of packets, or is not a
    /// stream's.
    pub(super) fn decode(packet: &[u8]) -> Option<(Self, &[u8])> {
        let (bytes, payload) = packet.split_first_chunk::<HEADER_BYTES>()?;
        let word = |at: usize| {
            let mut field = [0; 4];
            field.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(field)
        };
        let wide = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let header = Self {
            src_cid: wide(0),
            dst_cid: wide(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            op: half(30).into(),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        };
        let whole = usize::try_from(header.len) == Ok(payload.len());
        // Data have a payload, and nothing else has one.
        let allowed = payload.is_empty() != (header.op == Op::Data);
        (whole && allowed && half(28) == STREAM).then_some((header, payload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 9000,
            dst_port: 0x0102_0304,
            len: 2,
            op: Op::Data,
            flags: 5,
            buf_alloc: 6,
            fwd_cnt: 7,
        }
    }

    #[test]
    fn a_header_has_these_bytes() {
        let mut expected = vec![3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
        expected.extend([0x28, 0x23, 0, 0, 4, 3, 2, 1, 2, 0, 0, 0, 1, 0, 5, 0]);
        expected.extend([5, 0, 0, 0, 6, 0, 0, 0, 7, 0, 0, 0]);
        assert_eq!(header().encode().to_vec(), expected);
        expected.extend(b"hi");
        assert_eq!(Header::decode(&expected), Some((header(), &b"hi"[..])));
    }

    #[test]
    fn what_breaks_the_rules_is_no_packet() {
        let mut packet = header().encode().to_vec();
        packet.extend(b"hi");
        assert!(Header::decode(&packet[..43]).is_none(), "short");
        assert!(Header::decode(&packet[..45]).is_none(), "cut");
        packet[28] = 2;
        assert!(Header::decode(&packet).is_none(), "not a stream's");
        packet[28] = 1;
        packet[30] = 3;
        assert!(Header::decode(&packet).is_none(), "a reset with a payload");
        let empty = Header { len: 0, ..header() };
        let packet = empty.encode();
        assert!(Header::decode(&packet).is_none(), "data without a payload");
    }
}
