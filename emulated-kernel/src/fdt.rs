//! Flattened device trees, implemented a second time, because tests must not use the code they test.

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Fdt {
    pub(crate) name: String,
    pub(crate) props: Vec<(String, Vec<u8>)>,
    pub(crate) kids: Vec<Fdt>,
}

fn be32(bytes: &[u8], at: usize) -> Option<usize> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize)
}

fn string(bytes: &[u8], at: usize) -> Option<String> {
    let rest = bytes.get(at..)?;
    let end = rest.iter().position(|b| *b == 0)?;
    String::from_utf8(rest[..end].to_vec()).ok()
}

impl Fdt {
    pub(crate) fn parse(blob: &[u8]) -> Option<Fdt> {
        if be32(blob, 0)? != 0xd00d_feed || be32(blob, 4)? > blob.len() {
            return None;
        }
        let (mut at, strings) = (be32(blob, 8)?, be32(blob, 12)?);
        let mut stack: Vec<Fdt> = Vec::new();
        loop {
            let token = be32(blob, at)?;
            at += 4;
            match token {
                1 => {
                    let name = string(blob, at)?;
                    at = (at + name.len() + 4) & !3;
                    stack.push(Fdt {
                        name,
                        ..Fdt::default()
                    });
                }
                2 => {
                    let done = stack.pop()?;
                    match stack.last_mut() {
                        Some(parent) => parent.kids.push(done),
                        None => return Some(done),
                    }
                }
                3 => {
                    let (length, name) = (be32(blob, at)?, be32(blob, at + 4)?);
                    let value = blob.get(at + 8..at + 8 + length)?.to_vec();
                    at = (at + 8 + length + 3) & !3;
                    stack
                        .last_mut()?
                        .props
                        .push((string(blob, strings + name)?, value));
                }
                4 => {}
                _ => return None,
            }
        }
    }

    pub(crate) fn new(name: &str) -> Fdt {
        Fdt {
            name: name.to_owned(),
            ..Fdt::default()
        }
    }

    pub(crate) fn prop(mut self, name: &str, value: &[u8]) -> Fdt {
        self.props.push((name.to_owned(), value.to_vec()));
        self
    }

    pub(crate) fn u64s(self, name: &str, values: &[u64]) -> Fdt {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_be_bytes()).collect();
        self.prop(name, &bytes)
    }

    pub(crate) fn text(self, name: &str, value: &str) -> Fdt {
        self.prop(name, format!("{value}\0").as_bytes())
    }

    pub(crate) fn kid(&self, name: &str) -> Option<&Fdt> {
        self.kids.iter().find(|kid| kid.name == name)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&[u8]> {
        self.props
            .iter()
            .find(|(own, _)| own == name)
            .map(|(_, value)| value.as_slice())
    }

    pub(crate) fn get_text(&self, name: &str) -> Option<&str> {
        std::str::from_utf8(self.get(name)?.strip_suffix(&[0])?).ok()
    }

    pub(crate) fn get_u64s(&self, name: &str) -> Option<Vec<u64>> {
        let (values, rest) = self.get(name)?.as_chunks::<8>();
        rest.is_empty()
            .then(|| values.iter().map(|v| u64::from_be_bytes(*v)).collect())
    }

    pub(crate) fn get_u32(&self, name: &str) -> Option<u32> {
        Some(u32::from_be_bytes(self.get(name)?.try_into().ok()?))
    }

    pub(crate) fn blob(&self) -> Vec<u8> {
        let (mut structure, mut strings) = (Vec::new(), Vec::new());
        self.flatten(&mut structure, &mut strings);
        structure.extend_from_slice(&9_u32.to_be_bytes());
        let (at_structure, at_strings) = (56, 56 + structure.len());
        let total = at_strings + strings.len();
        let header = [
            0xd00d_feed,
            total,
            at_structure,
            at_strings,
            40,
            17,
            16,
            0,
            strings.len(),
            structure.len(),
        ];
        let mut blob: Vec<u8> = header
            .iter()
            .flat_map(|field| u32::try_from(*field).unwrap().to_be_bytes())
            .collect();
        blob.extend_from_slice(&[0; 16]);
        blob.extend(structure);
        blob.extend(strings);
        blob
    }

    fn flatten(&self, out: &mut Vec<u8>, strings: &mut Vec<u8>) {
        let pad = |out: &mut Vec<u8>| out.resize(out.len().next_multiple_of(4), 0);
        out.extend_from_slice(&1_u32.to_be_bytes());
        out.extend_from_slice(self.name.as_bytes());
        out.push(0);
        pad(out);
        for (name, value) in &self.props {
            for field in [3, value.len(), strings.len()] {
                out.extend_from_slice(&u32::try_from(field).unwrap().to_be_bytes());
            }
            strings.extend_from_slice(name.as_bytes());
            strings.push(0);
            out.extend_from_slice(value);
            pad(out);
        }
        for kid in &self.kids {
            kid.flatten(out, strings);
        }
        out.extend_from_slice(&2_u32.to_be_bytes());
    }
}
