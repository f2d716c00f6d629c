//! Reads the agent's configuration from an initramfs: a sequence of uncompressed "newc" cpio archives.

/// Path of the configuration in the initramfs.
const AGENT_CONFIG: &[u8] = b"etc/kmorph/agent.json";
const MAGIC: &[u8] = b"070701";
const HEADER_BYTES: usize = 110;
/// Indexes of the fields in the header: size of the file, and length of the name.
const SIZE: usize = 6;
const NAME_BYTES: usize = 11;

/// Returns the last file of that name, as the kernel would leave it; `None` if it is missing or the archive is invalid.
pub(crate) fn agent_config(initrd: &[u8]) -> Option<Vec<u8>> {
    let (mut at, mut found) = (0, None);
    while at < initrd.len() {
        // Zeros are allowed between archives.
        if initrd[at] == 0 {
            at += 1;
            continue;
        }
        let header = initrd.get(at..at + HEADER_BYTES)?;
        if !header.starts_with(MAGIC) {
            return None;
        }
        let field = |number: usize| {
            let start = MAGIC.len() + number * 8;
            let text = std::str::from_utf8(&header[start..start + 8]).ok()?;
            usize::from_str_radix(text, 16).ok()
        };
        let (size, name_bytes) = (field(SIZE)?, field(NAME_BYTES)?);
        let name = initrd.get(at + HEADER_BYTES..at + HEADER_BYTES + name_bytes)?;
        let data = (at + HEADER_BYTES + name_bytes).next_multiple_of(4);
        let content = initrd.get(data..data + size)?;
        if name.strip_suffix(&[0]) == Some(AGENT_CONFIG) {
            found = Some(content.to_vec());
        }
        at = (data + size).next_multiple_of(4);
    }
    found
}
