//! What is served, as a table: each module lists its endpoints. The routes of the server and the OpenAPI
//! document are both made from it, and what an endpoint takes and gives is read off its handler's type:
//! a handler that takes something else is described as taking something else.

use actix_web::{FromRequest, Handler, HttpRequest, Responder, Route, web};
use serde_json::{Map, Value, json};
use utoipa::openapi::path::ParameterIn;
use utoipa::openapi::{RefOr, Schema};
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::answers::{Answer, Listing};

/// One method of one path.
pub(super) struct Endpoint {
    pub(super) path: &'static str,
    /// In lower case, as OpenAPI writes it.
    pub(super) method: &'static str,
    pub(super) route: Route,
    /// Its description in the document.
    pub(super) operation: Value,
    /// The types that the description refers to.
    pub(super) schemas: Schemas,
}

/// Types by their names.
pub(super) type Schemas = Vec<(String, RefOr<Schema>)>;

impl Endpoint {
    pub(super) fn new<F, Args>(
        route: Route,
        method: &'static str,
        path: &'static str,
        summary: &str,
        handler: F,
    ) -> Self
    where
        F: Handler<Args>,
        Args: FromRequest + Takes + 'static,
        F::Output: Responder + Gives + 'static,
    {
        let mut schemas = Schemas::new();
        let refusal = reference::<kmorph_control_api::ApiError>(&mut schemas);
        let done = F::Output::describe(&mut schemas);
        let mut operation = json!({
            "summary": summary,
            "responses": {
                "200": { "description": "done", "content": done },
                "default": {
                    "description": "refused",
                    "content": { "application/json": { "schema": refusal } },
                },
            },
        });
        let mut taken = Taken {
            parameters: path_parameters(path),
            ..Taken::default()
        };
        Args::describe(&mut taken, &mut schemas);
        if !taken.parameters.is_empty() {
            operation["parameters"] = taken.parameters.into();
        }
        if let Some(body) = taken.body {
            operation["requestBody"] =
                json!({ "required": true, "content": { "application/json": { "schema": body } } });
        }
        Self {
            path,
            method,
            route: route.to(handler),
            operation,
            schemas,
        }
    }
}

macro_rules! methods {
    ($($method:ident)+) => {$(
        #[doc = concat!("An endpoint that is asked with ", stringify!($method), ".")]
        pub(super) fn $method<F, Args>(path: &'static str, summary: &str, handler: F) -> Endpoint
        where
            F: Handler<Args>,
            Args: FromRequest + Takes + 'static,
            F::Output: Responder + Gives + 'static,
        {
            Endpoint::new(web::$method(), stringify!($method), path, summary, handler)
        }
    )+};
}

methods!(get post put patch delete);

fn path_parameters(path: &str) -> Vec<Value> {
    let names = path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let describe = |name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } });
    names.map(describe).collect()
}

/// A reference to `T`, which is described with all that it is made of.
pub(super) fn reference<T: ToSchema>(schemas: &mut Schemas) -> Value {
    let name = T::name();
    let place = json!({ "$ref": format!("#/components/schemas/{name}") });
    schemas.push((name.into_owned(), T::schema()));
    T::schemas(schemas);
    place
}

/// What a handler takes from a request.
#[derive(Default)]
pub(super) struct Taken {
    parameters: Vec<Value>,
    body: Option<Value>,
}

impl Taken {
    pub(super) fn header(&mut self, name: &str, description: &str, schema: Value) {
        self.parameters.push(json!({
            "name": name, "in": "header", "required": false, "description": description, "schema": schema,
        }));
    }
}

/// A handler's argument, described.
pub(super) trait Takes {
    fn describe(taken: &mut Taken, schemas: &mut Schemas);
}

macro_rules! takes_nothing {
    ($($argument:ty),+) => {$(
        impl Takes for $argument {
            fn describe(_: &mut Taken, _: &mut Schemas) {}
        }
    )+};
}

// What is in the path is described by the path.
takes_nothing!(HttpRequest, web::Data<Api>, web::Path<String>);

impl<T: ToSchema> Takes for web::Json<T> {
    fn describe(taken: &mut Taken, schemas: &mut Schemas) {
        taken.body = Some(reference::<T>(schemas));
    }
}

impl<T: IntoParams> Takes for web::Query<T> {
    fn describe(taken: &mut Taken, _: &mut Schemas) {
        let parameters = T::into_params(|| Some(ParameterIn::Query));
        let described = parameters.into_iter().map(serde_json::to_value);
        taken.parameters.extend(described.filter_map(Result::ok));
    }
}

macro_rules! takes_all {
    ($($argument:ident)*) => {
        impl<$($argument: Takes),*> Takes for ($($argument,)*) {
            #[allow(unused_variables, reason = "some handlers take nothing")]
            fn describe(taken: &mut Taken, schemas: &mut Schemas) {
                $($argument::describe(taken, schemas);)*
            }
        }
    };
}

takes_all!();
takes_all!(A);
takes_all!(A B);
takes_all!(A B C);
takes_all!(A B C D);

/// A handler's answer, described: its media types with their schemas.
pub(super) trait Gives {
    fn describe(schemas: &mut Schemas) -> Value;
}

pub(super) fn media(kind: &str, schema: Value) -> Value {
    let mut content = Map::new();
    content.insert(kind.to_owned(), json!({ "schema": schema }));
    content.into()
}

impl<T: ToSchema> Gives for Answer<T> {
    fn describe(schemas: &mut Schemas) -> Value {
        media("application/json", reference::<T>(schemas))
    }
}

impl<T: ToSchema> Gives for Listing<T> {
    fn describe(schemas: &mut Schemas) -> Value {
        let items = reference::<T>(schemas);
        media(
            "application/json",
            json!({ "type": "array", "items": items }),
        )
    }
}
