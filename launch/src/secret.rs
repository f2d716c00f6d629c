//! A secret for an agent: it is serialized to JSON but never printed.

use serde::{Deserialize, Serialize};

/// 256 bits. In JSON 64 hexadecimal digits; `Debug` shows none of them.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Secret([u8; 32]);

impl Secret {
    /// The secret of these bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn bytes(&self) -> [u8; 32] {
        self.0
    }

    /// Its 64 hexadecimal digits.
    pub fn digits(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The secret with these digits; `None` when they are not 64 of them.
    pub fn from_digits(digits: &str) -> Option<Self> {
        let digits: Option<Vec<u8>> = digits
            .chars()
            .map(|digit| digit.to_digit(16).and_then(|digit| digit.try_into().ok()))
            .collect();
        let digits = digits.filter(|digits| digits.len() == 64)?;
        let pairs = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]);
        let bytes: Vec<u8> = pairs.collect();
        bytes.try_into().ok().map(Self)
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl TryFrom<String> for Secret {
    type Error = &'static str;

    fn try_from(digits: String) -> Result<Self, Self::Error> {
        Self::from_digits(&digits).ok_or("not 64 hexadecimal digits")
    }
}

impl From<Secret> for String {
    fn from(secret: Secret) -> Self {
        secret.digits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_as_digits_read_back_and_never_printed() {
        let secret = Secret::new(std::array::from_fn(|n| u8::try_from(n * 7).unwrap()));
        let json = serde_json::to_string(&secret).unwrap();
        assert!(json.starts_with("\"00070e"), "{json}");
        assert_eq!(serde_json::from_str::<Secret>(&json).unwrap(), secret);
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        for digits in ["", "00", &"0".repeat(63), &"0".repeat(65), &"g".repeat(64)] {
            assert_eq!(Secret::from_digits(digits), None, "{digits}");
        }
    }
}
