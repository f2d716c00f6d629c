//! Addresses of the API that contain names: any name stays one segment or one value.

/// Builds a path of the API from these segments, each escaped.
pub fn path(segments: &[&str]) -> String {
    let mut path = String::from("/v1");
    for segment in segments {
        path.push('/');
        path.push_str(&escape(segment));
    }
    path
}

/// Builds a query; pairs without a value are omitted.
pub fn query(pairs: &[(&str, Option<String>)]) -> String {
    let mut query = String::new();
    for (key, value) in pairs {
        if let Some(value) = value {
            query.push(if query.is_empty() { '?' } else { '&' });
            query.push_str(key);
            query.push('=');
            query.push_str(&escape(value));
        }
    }
    query
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_one_segment_whatever_is_in_it() {
        let given = path(&["instances", "a/../b?c=d#e %", "morph"]);
        assert_eq!(given, "/v1/instances/a%2F..%2Fb%3Fc%3Dd%23e%20%25/morph");
        assert_eq!(path(&["instances", "wéb"]), "/v1/instances/w%C3%A9b");
    }

    #[test]
    fn absent_values_are_left_out_of_the_query() {
        assert_eq!(query(&[("a", None), ("b", None)]), "");
        let some = [
            ("a", None),
            ("b", Some("x y".to_owned())),
            ("c", Some("1".to_owned())),
        ];
        assert_eq!(query(&some), "?b=x%20y&c=1");
    }
}
