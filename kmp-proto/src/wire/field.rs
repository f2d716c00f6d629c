//! The encoding of plain Rust values in a payload's fixed part, and the macros that declare payloads.

use zerocopy::byteorder::little_endian::{I32, U16, U32, U64};

use crate::message::LayoutError;

/// The byte table of a fixed part, for the check of `docs/kmp.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Name of the Rust struct.
    pub name: &'static str,
    /// Size in bytes.
    pub size: usize,
    /// Name, type and offset of each field.
    pub fields: &'static [(&'static str, &'static str, usize)],
    /// Number of reserved bytes at the end, which must be 0.
    pub reserved: usize,
}

/// A value with a fixed little-endian form.
pub(crate) trait Field: Sized {
    /// The wire form.
    type Wire;
    /// Its name in a byte table.
    const NAME: &'static str;
    fn put(self) -> Self::Wire;
    fn get(wire: Self::Wire) -> Result<Self, LayoutError>;
}

macro_rules! plain_field {
    ($($plain:ty => $wire:ty;)*) => {$(
        impl Field for $plain {
            type Wire = $wire;
            const NAME: &'static str = stringify!($plain);
            fn put(self) -> $wire {
                self.into()
            }
            fn get(wire: $wire) -> Result<Self, LayoutError> {
                Ok(wire.into())
            }
        }
    )*};
}

plain_field! {
    u8 => u8;
    [u8; 16] => [u8; 16];
    [u8; 32] => [u8; 32];
    u16 => U16;
    u32 => U32;
    u64 => U64;
    i32 => I32;
}

/// Declares a closed enum carried as a number. Its values determine the receiver's actions, so a
/// number that version 1 does not define is a layout error.
macro_rules! code_enum {
    ($(#[$doc:meta])* $name:ident: $repr:ty {
        $($(#[$vdoc:meta])* $variant:ident = $value:literal, $text:literal;)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$vdoc])* $variant,)*
        }

        impl $name {
            /// All values.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Returns the number on the wire.
            pub const fn value(self) -> $repr {
                match self {
                    $(Self::$variant => $value,)*
                }
            }

            /// Returns the word in logs, journal and API.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }
        }

        impl $crate::wire::field::Field for $name {
            type Wire = <$repr as $crate::wire::field::Field>::Wire;
            const NAME: &'static str = concat!(stringify!($repr), " ", stringify!($name));
            fn put(self) -> Self::Wire {
                $crate::wire::field::Field::put(self.value())
            }
            fn get(wire: Self::Wire) -> Result<Self, $crate::message::LayoutError> {
                match <$repr as $crate::wire::field::Field>::get(wire)? {
                    $($value => Ok(Self::$variant),)*
                    other => Err($crate::message::LayoutError::BadValue {
                        field: stringify!($name),
                        value: u64::from(other),
                    }),
                }
            }
        }
    };
}
pub(crate) use code_enum;

/// Declares an open enum carried as a number. Its values only inform, and later senders may use more
/// of them. A number without a name in this version is carried as `Other`.
macro_rules! open_enum {
    ($(#[$doc:meta])* $name:ident: $repr:ty {
        $($(#[$vdoc:meta])* $variant:ident = $value:literal, $text:literal;)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$vdoc])* $variant,)*
            /// A number without a name in this version.
            Other($repr),
        }

        impl $name {
            /// All named values.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Returns the value with this number.
            pub const fn from_value(value: $repr) -> Self {
                match value {
                    $($value => Self::$variant,)*
                    other => Self::Other(other),
                }
            }

            /// Returns the number on the wire.
            pub const fn value(self) -> $repr {
                match self {
                    $(Self::$variant => $value,)*
                    Self::Other(other) => other,
                }
            }

            /// Returns the word in logs, journal and API; `unknown` for a number without a name.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                    Self::Other(_) => "unknown",
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self {
                    Self::Other(number) => write!(f, "unknown ({number})"),
                    known => f.write_str(known.as_str()),
                }
            }
        }

        impl $crate::wire::field::Field for $name {
            type Wire = <$repr as $crate::wire::field::Field>::Wire;
            const NAME: &'static str = concat!(stringify!($repr), " ", stringify!($name));
            fn put(self) -> Self::Wire {
                $crate::wire::field::Field::put(self.value())
            }
            fn get(wire: Self::Wire) -> Result<Self, $crate::message::LayoutError> {
                <$repr as $crate::wire::field::Field>::get(wire).map(Self::from_value)
            }
        }
    };
}
pub(crate) use open_enum;

/// Declares the fixed part of a payload: a plain struct for programs, and its encoding, with the size and every
/// offset asserted at compile time. Reserved bytes come last and must be zero.
macro_rules! fixed {
    ($(#[$doc:meta])* $vis:vis $name:ident, $size:literal {
        $($(#[$fdoc:meta])* $field:ident: $ty:ty = $offset:literal,)*
        ; reserved $reserved:literal
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $vis struct $name {
            $($(#[$fdoc])* $vis $field: $ty,)*
        }

        const _: () = {
            use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};
            use $crate::wire::field::Field;

            #[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
            #[repr(C)]
            struct Wire {
                $($field: <$ty as Field>::Wire,)*
                reserved: [u8; $reserved],
            }

            assert!(core::mem::size_of::<Wire>() == $size);
            $(assert!(core::mem::offset_of!(Wire, $field) == $offset);)*

            impl $name {
                #[allow(dead_code, reason = "only payloads inside records need their size")]
                pub(crate) const BYTES: usize = $size;

                pub(crate) const LAYOUT: $crate::wire::Layout = $crate::wire::Layout {
                    name: stringify!($name),
                    size: $size,
                    fields: &[$((stringify!($field), <$ty as Field>::NAME, $offset),)*],
                    reserved: $reserved,
                };

                pub(crate) fn split(
                    payload: &[u8],
                ) -> Result<(Self, &[u8]), $crate::message::LayoutError> {
                    let (wire, rest) = Wire::read_from_prefix(payload)
                        .map_err(|_| $crate::message::LayoutError::TooShort)?;
                    if wire.reserved != [0; $reserved] {
                        return Err($crate::message::LayoutError::ReservedNotZero);
                    }
                    let value = Self { $($field: <$ty as Field>::get(wire.$field)?,)* };
                    Ok((value, rest))
                }

                /// Decodes the value; `bytes` must contain nothing else.
                #[allow(dead_code, reason = "only payloads inside records stand alone")]
                pub(crate) fn exact(bytes: &[u8]) -> Result<Self, $crate::message::LayoutError> {
                    match Self::split(bytes)? {
                        (value, []) => Ok(value),
                        (_, rest) => Err($crate::message::LayoutError::Trailing(rest.len())),
                    }
                }

                pub(crate) fn append(self, out: &mut Vec<u8>) {
                    let wire =
                        Wire { $($field: Field::put(self.$field),)* reserved: [0; $reserved] };
                    out.extend_from_slice(wire.as_bytes());
                }
            }
        };
    };
}
pub(crate) use fixed;
