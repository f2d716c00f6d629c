//! CRC-32/ISO-HDLC, as used in the frame header.

/// Returns the checksum of `parts` as if they were one byte string.
#[inline]
pub fn crc32(parts: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEFINITION: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);

    #[test]
    fn the_check_value_of_the_definition() {
        assert_eq!(crc32(&[b"123456789"]), 0xCBF4_3926);
        assert_eq!(DEFINITION.checksum(b"123456789"), 0xCBF4_3926);
    }

    proptest! {
        #[test]
        fn equal_to_the_definition_however_it_is_split(
            bytes in proptest::collection::vec(any::<u8>(), 0..5000),
            at in any::<proptest::sample::Index>(),
        ) {
            let (head, tail) = bytes.split_at(at.index(bytes.len() + 1));
            prop_assert_eq!(crc32(&[head, tail]), DEFINITION.checksum(&bytes));
        }
    }
}
