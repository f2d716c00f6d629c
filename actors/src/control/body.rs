//! The body of a request.

use std::future::Future;
use std::pin::Pin;

use actix_web::dev::Payload;
use actix_web::error::Error;
use actix_web::web::Bytes;
use actix_web::{FromRequest, HttpRequest};
use kmorph_control_api::{ApiError, ErrorCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Number, Value};

use super::answers::{bad_body, refuse};

/// A JSON body, with any media type.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned + Serialize + 'static> FromRequest for Body<T> {
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self, Error>>>>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let bytes = Bytes::from_request(request, payload);
        Box::pin(async move { parse(&bytes.await.map_err(bad_body)?).map(Self) })
    }
}

fn parse<T: DeserializeOwned + Serialize>(bytes: &[u8]) -> Result<T, Error> {
    let taken = parse_any(bytes)?;
    let asked = serde_json::from_slice::<Value>(bytes).unwrap_or(Value::Null);
    match serde_json::to_value(&taken) {
        Ok(shape) if has_shape(&asked, &shape) => Ok(taken),
        _ => {
            let text = "the request does not parse: an array stands where an object belongs";
            Err(refuse(ApiError::new(ErrorCode::InvalidRequest, text)))
        }
    }
}

/// Returns whether `asked` has objects wherever `shape` has objects: serde accepts an array for a structure, field by
/// field.
fn has_shape(asked: &Value, shape: &Value) -> bool {
    match (asked, shape) {
        (Value::Array(_), Value::Object(_)) => false,
        (Value::Array(asked), Value::Array(shape)) => asked
            .iter()
            .zip(shape)
            .all(|(asked, shape)| has_shape(asked, shape)),
        (Value::Object(asked), Value::Object(shape)) => asked
            .iter()
            .all(|(key, asked)| shape.get(key).is_none_or(|shape| has_shape(asked, shape))),
        _ => true,
    }
}

fn parse_any<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let as_it_is = serde_json::from_slice(bytes);
    as_it_is.or_else(|error| {
        let whole = serde_json::from_slice(bytes).map(with_integers);
        whole.and_then(serde_json::from_value).map_err(|_| {
            // The first error contains the position.
            let text = format!("the request does not parse: {error}");
            refuse(ApiError::new(ErrorCode::InvalidRequest, text))
        })
    })
}

/// Converts `2.0` to `2`: JSON and many languages have only one kind of number.
fn with_integers(value: Value) -> Value {
    /// 2^53: above this value, a double cannot represent every integer.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match value {
        Value::Number(number) => {
            let double = number.as_f64().filter(|_| number.is_f64());
            let whole = double.filter(|d| d.fract() == 0.0 && d.abs() <= EXACT);
            match whole {
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "it is an integer within i64"
                )]
                Some(whole) => Value::Number(Number::from(whole as i64)),
                None => Value::Number(number),
            }
        }
        Value::Array(items) => items.into_iter().map(with_integers).collect(),
        Value::Object(members) => {
            let members = members.into_iter();
            members
                .map(|(key, value)| (key, with_integers(value)))
                .collect()
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Asked {
        count: u32,
        seconds: f64,
    }

    #[test]
    fn a_number_is_taken_however_it_is_written() {
        for text in [
            r#"{"count":2,"seconds":1}"#,
            r#"{"count":2.0,"seconds":1.0}"#,
            r#"{"count":2e0,"seconds":1e0}"#,
        ] {
            let asked: Asked = parse(text.as_bytes()).unwrap();
            assert_eq!(
                asked,
                Asked {
                    count: 2,
                    seconds: 1.0
                },
                "{text}"
            );
        }
        for text in [
            r#"{"count":2.5,"seconds":1}"#,
            r#"{"count":-1.0,"seconds":1}"#,
            r#"{"count":1e300,"seconds":1}"#,
            "",
            "[",
            "[2, 1.0]",
        ] {
            let error = parse::<Asked>(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("does not parse"), "{text}: {error}");
        }
    }
}
