//! The OpenAPI description of all endpoints.

use actix_web::body::BoxBody;
use actix_web::{HttpRequest, HttpResponse, Responder};
use serde_json::{Value, json};
use utoipa::OpenApi;

use super::endpoint::{Endpoint, Gives, Schemas, TAGS, get, media};

pub(super) fn endpoints() -> Vec<Endpoint> {
    vec![get(
        "/v1/openapi.json",
        "This description",
        show_description,
    )]
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "kmorph control API",
        description = "HTTP and JSON over kmorphd's Unix socket."
    ),
    // Results of operations: no endpoint's type refers to them.
    components(schemas(kmorph_control_api::CaptureReport, kmorph_control_api::MorphStatus))
)]
struct Head;

fn document(endpoints: Vec<Endpoint>) -> Value {
    let mut document = serde_json::to_value(Head::openapi()).unwrap_or_default();
    let describe = |(name, description)| json!({ "name": name, "description": description });
    document["tags"] = TAGS.map(describe).to_vec().into();
    for endpoint in endpoints {
        document["paths"][endpoint.path][endpoint.method] = endpoint.operation;
        for (name, schema) in endpoint.schemas {
            document["components"]["schemas"][name] = json!(schema);
        }
    }
    document
}

/// The document. OpenAPI itself specifies its format.
struct Document(Value);

impl Responder for Document {
    type Body = BoxBody;

    fn respond_to(self, _: &HttpRequest) -> HttpResponse {
        HttpResponse::Ok().json(self.0)
    }
}

impl Gives for Document {
    fn describe(_: &mut Schemas) -> Value {
        media("application/json", json!({ "type": "object" }))
    }
}

async fn show_description() -> Document {
    Document(document(super::endpoints()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_schema_referred_to_is_described() {
        let document = document(crate::control::endpoints());
        let text = document.to_string();
        let mut referred = 0;
        for piece in text.split("#/components/schemas/").skip(1) {
            let name: String = piece.chars().take_while(|c| c.is_alphanumeric()).collect();
            let schema = document["components"]["schemas"].get(&name);
            assert!(schema.is_some_and(Value::is_object), "{name}");
            referred += 1;
        }
        assert!(referred > 50, "{referred}");
    }

    #[test]
    fn each_operation_has_a_name_of_its_own_and_a_tag_that_is_described() {
        let document = document(crate::control::endpoints());
        let tags: Vec<_> = TAGS.iter().map(|(name, _)| *name).collect();
        let mut names = std::collections::BTreeSet::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            for (method, operation) in methods.as_object().unwrap() {
                let name = operation["operationId"].as_str().unwrap();
                assert!(name.contains('_'), "{method} {path}: {name}");
                assert!(
                    names.insert(name.to_owned()),
                    "{method} {path}: {name} twice"
                );
                let tag = operation["tags"][0].as_str().unwrap();
                assert!(tags.contains(&tag), "{method} {path}: {tag}");
                let begins = operation["responses"].get("202").is_some();
                let about = operation["responses"]["202"].to_string();
                assert_eq!(
                    begins,
                    about.contains("schemas/Operation"),
                    "{method} {path}"
                );
            }
        }
        assert!(names.contains("spawn_instance"), "{names:?}");
    }

    #[test]
    fn no_two_endpoints_are_the_same() {
        let endpoints = crate::control::endpoints();
        let mut names: Vec<_> = endpoints.iter().map(|e| (e.path, e.method)).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), endpoints.len());
    }
}
