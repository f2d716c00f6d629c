//! LZO1X, as used by the kernel and makedumpfile to compress pages.
//!
//! This is our own implementation because the crates that both compress and decompress LZO are under the GPL, or too
//! slow for the purpose of LZO. A compressed page is a sequence of instructions; `S` is the number of literal bytes
//! (0 to 3) that follow an instruction, and the meaning of a small first byte depends on the previous `S`.
//!
//! ```text
//! first byte     meaning
//! 18 to 255      at the very start only: followed by this number minus 17 of literals
//! 0000 LLLL      after S = 0: L + 3 literals; L = 0: 18 more than the sum of the next bytes
//! 0000 DDSS H    after S > 0: copy 2 bytes from distance (H << 2) + D + 1
//!                after a row of literals: copy 3 bytes from distance (H << 2) + D + 2049
//! 0001 HLLL      L + 2 bytes (L = 0: 9 + …) from distance (H << 14) + D + 16384, with D and S from the
//!                two bytes that follow; distance 16384 itself: the end
//! 001L LLLL      L + 2 bytes (L = 0: 33 + …) from distance D + 1, with D and S from the two that follow
//! xxxD DDSS H    with xxx from 2 to 7: xxx + 1 bytes from distance (H << 3) + D + 1
//! ```

/// Maximum distance that the compressor uses, bytes: the range of the three-byte form.
const DISTANCE_MAX: usize = 16384;
/// Maximum number of bytes compressed at once: positions are stored in 16 bits.
const INPUT_MAX: usize = 1 << 16;
/// Entries of the table of positions by hash, as a power of two.
const TABLE_BITS: u32 = 12;
/// Minimum length of a match, bytes.
const MATCH_MIN: usize = 4;
/// The instruction that ends a stream.
const END: [u8; 3] = [17, 0, 0];

/// Why compressed bytes cannot be decompressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LzoError(
    /// The violated rule.
    pub &'static str,
);

/// Decompresses `input` into `output` and returns the number of decompressed bytes.
///
/// # Errors
///
/// If the input is truncated, refers to bytes before the start, or exceeds the size of `output`.
pub fn decompress(input: &[u8], output: &mut [u8]) -> Result<usize, LzoError> {
    let mut decoder = Decoder {
        input,
        output,
        written: 0,
    };
    decoder.run()?;
    Ok(decoder.written)
}

struct Decoder<'a> {
    input: &'a [u8],
    output: &'a mut [u8],
    written: usize,
}

/// The kind of the preceding instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    /// A copy without literals, or the start.
    Copy,
    /// A copy with one to three literals.
    FewLiterals,
    /// A row of literals.
    Literals,
}

impl Decoder<'_> {
    fn run(&mut self) -> Result<(), LzoError> {
        let mut before = Before::Copy;
        if let Some(&first) = self.input.first()
            && first > 17
        {
            self.input = &self.input[1..];
            let count = usize::from(first - 17);
            self.literals(count)?;
            before = if count < 4 {
                Before::FewLiterals
            } else {
                Before::Literals
            };
        }
        loop {
            let byte = self.byte()?;
            let low = usize::from(byte & 3);
            let (distance, length, literals) = match byte {
                0..16 if before == Before::Copy => {
                    let count = self.length(byte, 15)? + 3;
                    self.literals(count)?;
                    before = Before::Literals;
                    continue;
                }
                0..16 => {
                    let distance = (usize::from(self.byte()?) << 2) + usize::from(byte >> 2);
                    match before {
                        Before::Literals => (distance + 2049, 3, low),
                        _ => (distance + 1, 2, low),
                    }
                }
                16..32 => {
                    let length = self.length(byte & 7, 7)? + 2;
                    let (near, literals) = self.distance_and_literals()?;
                    let distance = (usize::from(byte & 8) << 11) + near + 16384;
                    if distance == 16384 {
                        return if length == 3 {
                            Ok(())
                        } else {
                            Err(LzoError("the end of the stream has a length"))
                        };
                    }
                    (distance, length, literals)
                }
                32..64 => {
                    let length = self.length(byte & 31, 31)? + 2;
                    let (near, literals) = self.distance_and_literals()?;
                    (near + 1, length, literals)
                }
                64.. => {
                    let near = (usize::from(self.byte()?) << 3) + usize::from(byte >> 2 & 7);
                    (near + 1, usize::from(byte >> 5) + 1, low)
                }
            };
            self.copy(distance, length)?;
            self.literals(literals)?;
            before = if literals == 0 {
                Before::Copy
            } else {
                Before::FewLiterals
            };
        }
    }

    fn byte(&mut self) -> Result<u8, LzoError> {
        let (&byte, rest) = self.input.split_first().ok_or(LzoError("it breaks off"))?;
        self.input = rest;
        Ok(byte)
    }

    /// Returns a length: `low` itself or, if that is 0, `base` plus the sum of the next bytes.
    fn length(&mut self, low: u8, base: usize) -> Result<usize, LzoError> {
        if low != 0 {
            return Ok(usize::from(low));
        }
        let mut length = base;
        loop {
            let byte = self.byte()?;
            if byte != 0 {
                return Ok(length + usize::from(byte));
            }
            length += 255;
            if length > self.output.len() {
                return Err(LzoError("a length exceeds the page"));
            }
        }
    }

    fn distance_and_literals(&mut self) -> Result<(usize, usize), LzoError> {
        let both = u16::from_le_bytes([self.byte()?, self.byte()?]);
        Ok((usize::from(both >> 2), usize::from(both & 3)))
    }

    fn literals(&mut self, count: usize) -> Result<(), LzoError> {
        let (literals, rest) = self
            .input
            .split_at_checked(count)
            .ok_or(LzoError("truncated within literals"))?;
        self.output
            .get_mut(self.written..self.written + count)
            .ok_or(LzoError("the output exceeds a page"))?
            .copy_from_slice(literals);
        self.written += count;
        self.input = rest;
        Ok(())
    }

    fn copy(&mut self, distance: usize, length: usize) -> Result<(), LzoError> {
        let from = self
            .written
            .checked_sub(distance)
            .ok_or(LzoError("a copy from before the start"))?;
        let end = self.written + length;
        if end > self.output.len() {
            return Err(LzoError("the output exceeds a page"));
        }
        if distance >= length {
            self.output.copy_within(from..from + length, self.written);
        } else {
            // The source overlaps the output: the pattern repeats.
            for at in self.written..end {
                self.output[at] = self.output[at - distance];
            }
        }
        self.written = end;
        Ok(())
    }
}

/// A compressor, with memory that it reuses.
#[derive(Debug)]
pub struct Compressor {
    /// Last position of each hash.
    positions: Box<[u16; 1 << TABLE_BITS]>,
}

impl Default for Compressor {
    fn default() -> Self {
        Self {
            positions: Box::new([0; 1 << TABLE_BITS]),
        }
    }
}

impl Compressor {
    /// Appends `input` to `output`, compressed. The result depends only on the input.
    ///
    /// # Panics
    ///
    /// When the input has more than 64 KiB.
    pub fn compress(&mut self, input: &[u8], output: &mut Vec<u8>) {
        assert!(input.len() <= INPUT_MAX, "more than 64 KiB at once");
        self.positions.fill(0);
        let start = output.len();
        let mut literals_from = 0;
        let mut at = 0;
        while let Some(word) = word_at(input, at) {
            let slot = &mut self.positions[hash(word)];
            let candidate = usize::from(*slot);
            // INPUT_MAX keeps every position in 16 bits.
            *slot = u16::try_from(at).unwrap_or(u16::MAX);
            let distance = at - candidate.min(at);
            if distance == 0 || distance > DISTANCE_MAX || word_at(input, candidate) != Some(word) {
                // The longer the search finds no match, the larger its steps.
                at += 1 + ((at - literals_from) >> 5);
                continue;
            }
            let length =
                MATCH_MIN + equal_bytes(&input[candidate + MATCH_MIN..], &input[at + MATCH_MIN..]);
            put_literals(&input[literals_from..at], start, output);
            put_match(distance, length, output);
            at += length;
            literals_from = at;
        }
        put_literals(&input[literals_from..], start, output);
        output.extend(END);
    }
}

fn word_at(input: &[u8], at: usize) -> Option<u32> {
    let bytes = input.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*bytes))
}

fn hash(word: u32) -> usize {
    // Fewer than TABLE_BITS bits remain.
    (word.wrapping_mul(0x9e37_79b1) >> (32 - TABLE_BITS)) as usize
}

/// Returns the length of the common prefix of `a` and `b`.
fn equal_bytes(a: &[u8], b: &[u8]) -> usize {
    let mut equal = 0;
    while let (Some(x), Some(y)) = (
        a.get(equal..).and_then(<[u8]>::first_chunk::<8>),
        b.get(equal..).and_then(<[u8]>::first_chunk::<8>),
    ) {
        let differing = u64::from_le_bytes(*x) ^ u64::from_le_bytes(*y);
        if differing != 0 {
            return equal + (differing.trailing_zeros() / 8) as usize;
        }
        equal += 8;
    }
    let rest = a[equal..].iter().zip(&b[equal..]);
    equal + rest.take_while(|(x, y)| x == y).count()
}

#[allow(clippy::cast_possible_truncation)] // each arm bounds what it casts
/// Writes the literals between two copies. `start` is the beginning of the stream in `output`.
fn put_literals(literals: &[u8], start: usize, output: &mut Vec<u8>) {
    let count = literals.len();
    match count {
        0 => {}
        1..=238 if output.len() == start => output.push((count + 17) as u8),
        // The second-to-last byte of the preceding copy has room for the count.
        1..=3 => {
            let last_but_one = output.len() - 2;
            output[last_but_one] |= count as u8;
        }
        4..=18 => output.push((count - 3) as u8),
        _ => {
            output.push(0);
            put_length(count - 18, output);
        }
    }
    output.extend_from_slice(literals);
}

#[allow(clippy::cast_possible_truncation)] // DISTANCE_MAX and the branches bound what is cast
fn put_match(distance: usize, length: usize, output: &mut Vec<u8>) {
    let near = distance - 1;
    if length <= 8 && near < 2048 {
        output.push(((length - 1) << 5 | (near & 7) << 2) as u8);
        output.push((near >> 3) as u8);
        return;
    }
    if length <= 33 {
        output.push((32 | (length - 2)) as u8);
    } else {
        output.push(32);
        put_length(length - 33, output);
    }
    output.extend(((near << 2) as u16).to_le_bytes());
}

#[allow(clippy::cast_possible_truncation)] // below 256 behind the loop
/// Writes a length: a zero for each 255, and the rest, 1 to 255.
fn put_length(mut length: usize, output: &mut Vec<u8>) {
    while length > 255 {
        output.push(0);
        length -= 255;
    }
    output.push(length as u8);
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)] // any bytes will do
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip(input: &[u8]) -> usize {
        let mut packed = Vec::new();
        Compressor::default().compress(input, &mut packed);
        let mut output = vec![0xee; input.len()];
        assert_eq!(decompress(&packed, &mut output), Ok(input.len()));
        assert_eq!(output, input);
        packed.len()
    }

    #[test]
    fn pages_of_every_kind_come_back() {
        assert!(round_trip(&[0; 4096]) < 40);
        assert!(round_trip(&[7; 4096]) < 40);
        round_trip(&[]);
        for length in 1..300 {
            let bytes: Vec<u8> = (0..length).map(|n| (n * 7 + n / 11) as u8).collect();
            round_trip(&bytes);
        }
        let text = b"the quick brown fox jumps over the lazy dog ".repeat(90);
        assert!(round_trip(&text) < 300);
    }

    /// A stream from liblzo2.
    #[test]
    fn a_stream_of_the_reference_library_is_read() {
        let stream = [
            34, 104, 101, 108, 108, 111, 44, 32, 108, 122, 111, 32, 119, 111, 114, 108, 100, 33,
            17, 0, 0,
        ];
        let mut output = [0; 17];
        assert_eq!(decompress(&stream, &mut output), Ok(17));
        assert_eq!(&output, b"hello, lzo world!");
    }

    #[test]
    fn a_stream_that_breaks_a_rule_is_refused() {
        let mut page = [0; 64];
        for stream in [
            &[][..],
            &[20, 1],
            &[18, 1, 17, 0],
            &[18, 1, 64, 9, 17, 0, 0],
            &[255; 80],
            &[0; 80],
            &[18, 1, 32, 1, 0, 0],
        ] {
            assert!(decompress(stream, &mut page).is_err(), "{stream:?}");
        }
    }

    proptest! {
        #[test]
        fn anything_comes_back(runs in prop::collection::vec((any::<u8>(), 1_usize..90), 0..120)) {
            let mut input: Vec<u8> = Vec::new();
            for (byte, count) in runs {
                // Runs, and copies of earlier bytes.
                match input.len().checked_sub(usize::from(byte)) {
                    Some(from) if byte & 1 == 1 => {
                        let again = input[from..].iter().copied().cycle();
                        let again: Vec<u8> = again.take(count).collect();
                        input.extend(again);
                    }
                    _ => input.extend((0..count).map(|n| byte.wrapping_mul(n as u8 | 1))),
                }
            }
            round_trip(&input);
        }

        #[test]
        fn noise_never_panics(stream in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decompress(&stream, &mut [0; 4096]);
        }
    }
}
