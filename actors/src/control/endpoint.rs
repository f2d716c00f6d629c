//! The table of endpoints: each module lists its own. The server's routes and the OpenAPI document are
//! generated from this table. The types of an endpoint's handler determine the documented parameters and
//! responses, so the document cannot differ from the code.

use actix_web::{FromRequest, Handler, HttpRequest, Responder, Route, web};
use serde_json::{Map, Value, json};
use utoipa::openapi::path::ParameterIn;
use utoipa::openapi::{RefOr, Schema};
use utoipa::{IntoParams, ToSchema};

use kmorph_control_api::Operation;

use super::Api;
use super::answers::{Answer, Begun, Listing};
use super::body::Body;

/// One method of one path.
pub(super) struct Endpoint {
    pub(super) path: &'static str,
    /// Method in lower case, as in OpenAPI.
    pub(super) method: &'static str,
    pub(super) route: Route,
    /// Its description in the document.
    pub(super) operation: Value,
    /// Types that the description refers to.
    pub(super) schemas: Schemas,
}

/// Types, by name.
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
            "operationId": operation_id::<F>(),
            "tags": [tag(path)],
            "summary": summary,
        });
        let mut taken = Taken {
            parameters: path_parameters(path),
            ..Taken::default()
        };
        Args::describe(&mut taken, &mut schemas);
        operation["responses"] = responses::<F::Output>(done, &refusal, refusals(method, &taken));
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
        #[doc = concat!("An endpoint with the method ", stringify!($method), ".")]
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

/// Returns the handler's name. A test finds duplicates.
fn operation_id<F>() -> &'static str {
    let name = std::any::type_name::<F>();
    name.rsplit("::").next().unwrap_or(name)
}

/// Returns the tag of an endpoint in the document: the first of [`TAGS`] that is a part of its path.
fn tag(path: &str) -> &'static str {
    let about = |tag: &&(&'static str, &str)| path.split('/').any(|part| part == tag.0);
    TAGS.iter().find(about).map_or("daemon", |(tag, _)| tag)
}

/// The tags with their descriptions; the more specific ones come first.
pub(super) const TAGS: [(&str, &str); 10] = [
    ("morph", "Moving an instance to another kernel"),
    ("policy", "How one instance is watched and healed"),
    ("policies", "The policies of all instances"),
    ("vmcore", "The memory of an instance"),
    ("recoveries", "What failed and was healed"),
    ("operations", "Work that was begun"),
    ("events", "What happens"),
    ("metrics", "Figures"),
    ("instances", "Kernels with what they run"),
    ("daemon", "kmorphd itself"),
];

/// A status code, and when it is returned.
type Refused = (&'static str, &'static str);

/// Errors of every request.
const ALWAYS: [Refused; 4] = [
    (
        "400",
        "the request does not parse, or a value is out of its range",
    ),
    ("500", "a fault of kmorph's own"),
    (
        "503",
        "too much is under way, or the machine lacks something",
    ),
    ("504", "no whole request, or no answer, in time"),
];
/// Errors of a request that names something.
const NAMED: Refused = ("404", "there is no such thing");
/// Errors of a request that changes something.
const CHANGES: [Refused; 5] = [
    ("403", "the caller may look, not change"),
    ("409", "not in the present state, or not with this backend"),
    (
        "422",
        "a kernel image was refused, or an instance did not start",
    ),
    ("501", "not built yet"),
    ("507", "the journal cannot be written: nothing was changed"),
];
/// Errors of a request with a body.
const BODY: Refused = ("413", "the body is too large");

fn refusals(method: &str, taken: &Taken) -> Vec<Refused> {
    let mut all = ALWAYS.to_vec();
    if !taken.parameters.is_empty() || taken.body.is_some() {
        all.push(NAMED);
    }
    if method != "get" {
        all.extend(CHANGES);
    }
    if taken.body.is_some() {
        all.push(BODY);
    }
    all
}

fn responses<T: Gives>(done: Value, refusal: &Value, refusals: Vec<Refused>) -> Value {
    let mut all = Map::new();
    let (status, description) = T::DONE;
    all.insert(
        status.to_owned(),
        json!({ "description": description, "content": done, "headers": T::headers() }),
    );
    for (status, description) in refusals {
        let content = json!({ "application/json": { "schema": refusal } });
        all.insert(
            status.to_owned(),
            json!({ "description": description, "content": content }),
        );
    }
    all.into()
}

fn path_parameters(path: &str) -> Vec<Value> {
    let names = path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let describe = |name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } });
    names.map(describe).collect()
}

/// Returns a reference to `T`; adds `T` and all types that it contains to `schemas`.
pub(super) fn reference<T: ToSchema>(schemas: &mut Schemas) -> Value {
    let name = T::name();
    let place = json!({ "$ref": format!("#/components/schemas/{name}") });
    schemas.push((name.into_owned(), T::schema()));
    T::schemas(schemas);
    place
}

/// Parameters and body of a handler.
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

/// Describes an argument of a handler.
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

// The path itself describes its parameters.
takes_nothing!(HttpRequest, web::Data<Api>, web::Path<String>);

impl<T: ToSchema> Takes for Body<T> {
    fn describe(taken: &mut Taken, schemas: &mut Schemas) {
        taken.body = Some(reference::<T>(schemas));
    }
}

impl<T: IntoParams> Takes for web::Query<T> {
    fn describe(taken: &mut Taken, _: &mut Schemas) {
        let parameters = T::into_params(|| Some(ParameterIn::Query));
        let described = parameters.into_iter().map(serde_json::to_value);
        let described = described.filter_map(Result::ok).map(with_whole_range);
        taken.parameters.extend(described);
    }
}

/// Widens a non-negative `int64` parameter to the full range of `u64`.
fn with_whole_range(mut parameter: Value) -> Value {
    let schema = &mut parameter["schema"];
    if schema["format"] == "int64" && schema["minimum"] == 0 {
        schema["maximum"] = u64::MAX.into();
        if let Some(schema) = schema.as_object_mut() {
            schema.remove("format");
        }
    }
    parameter
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

/// Describes a handler's response: its media types with their schemas.
pub(super) trait Gives {
    /// The status on success, and its description.
    const DONE: (&'static str, &'static str) = ("200", "done");

    /// Returns the response's additional headers.
    fn headers() -> Value {
        json!({})
    }

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

impl Gives for Begun {
    const DONE: (&'static str, &'static str) = ("202", "begun: the operation tells how it goes on");

    fn headers() -> Value {
        json!({ "Location": {
            "description": "where the operation is",
            "schema": { "type": "string" },
        } })
    }

    fn describe(schemas: &mut Schemas) -> Value {
        media("application/json", reference::<Operation>(schemas))
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
