//! Converts results and refusals to HTTP responses.

use std::pin::Pin;
use std::task::{Context, Poll};

use actix::MailboxError;
use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::{Payload, ServiceRequest, ServiceResponse};
use actix_web::error::{Error, InternalError, PayloadError};
use actix_web::http::StatusCode;
use actix_web::http::header::{ALLOW, HeaderValue, LOCATION};
use actix_web::web::Bytes;
use actix_web::{HttpMessage, HttpRequest, HttpResponse, Responder};
use kmorph_control_api::{ApiError, ErrorCode, Operation, REQUEST_BODY_MAX_BYTES};
use serde::Serialize;

use super::ANSWER_TIMEOUT;

/// Returns a refusal as a response.
pub(super) fn response(error: &ApiError) -> HttpResponse {
    let status =
        StatusCode::from_u16(error.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    HttpResponse::build(status).json(error)
}

pub(super) fn refuse(error: ApiError) -> Error {
    let response = response(&error);
    InternalError::from_response(error, response).into()
}

/// A result as a response: `T` as JSON, or the refusal.
pub(super) struct Answer<T>(Result<T, ApiError>);

pub(super) fn answer<T>(result: Result<T, ApiError>) -> Answer<T> {
    Answer(result)
}

impl<T: Serialize> Responder for Answer<T> {
    type Body = BoxBody;

    fn respond_to(self, _: &HttpRequest) -> HttpResponse {
        match self.0 {
            Ok(value) => HttpResponse::Ok().json(value),
            Err(error) => response(&error),
        }
    }
}

/// An operation that has begun (202, with its place), or the refusal.
pub(super) struct Begun(pub(super) Result<Operation, ApiError>);

impl Responder for Begun {
    type Body = BoxBody;

    fn respond_to(self, _: &HttpRequest) -> HttpResponse {
        match self.0 {
            Ok(operation) => HttpResponse::Accepted()
                .insert_header((LOCATION, format!("/v1/operations/{}", operation.id)))
                .json(operation),
            Err(error) => response(&error),
        }
    }
}

/// As [`Answer`], for a list.
pub(super) struct Listing<T>(pub(super) Result<Vec<T>, ApiError>);

impl<T: Serialize> Responder for Listing<T> {
    type Body = BoxBody;

    fn respond_to(self, request: &HttpRequest) -> HttpResponse {
        Answer(self.0).respond_to(request)
    }
}

/// Returns the error for an actor that did not answer.
pub(super) fn actor_gone(_: MailboxError) -> ApiError {
    ApiError::new(ErrorCode::Busy, "the actor asked is being replaced")
        .hint("try again in a moment")
}

pub(super) fn bad_body(error: Error) -> Error {
    let too_large = matches!(
        error.as_error::<PayloadError>(),
        Some(PayloadError::Overflow)
    ) || error.as_response_error().status_code() == StatusCode::PAYLOAD_TOO_LARGE;
    let (code, text) = if too_large {
        let text = format!("the request is larger than {REQUEST_BODY_MAX_BYTES} bytes");
        (ErrorCode::TooLarge, text)
    } else {
        let text = format!("the request cannot be read: {error}");
        (ErrorCode::InvalidRequest, text)
    };
    refuse(ApiError::new(code, text))
}

/// Returns the refusal of a method that a path does not support; `allowed` lists the supported methods.
pub(super) fn no_such_method(request: &HttpRequest, allowed: &str) -> HttpResponse {
    let path: String = request.path().chars().take(200).collect();
    let text = format!("{path} is not asked with {}", request.method());
    let refusal = ApiError::new(ErrorCode::MethodNotAllowed, text);
    let mut response = response(&refusal.hint(format!("ask it with {allowed}")));
    if let Ok(allowed) = HeaderValue::from_str(allowed) {
        response.headers_mut().insert(ALLOW, allowed);
    }
    response
}

/// Refuses a request that does not state its length.
pub(super) fn without_length(mut request: ServiceRequest) -> ServiceResponse {
    let unread = Box::new(request.take_payload());
    let text = "the request does not say how long it is (Transfer-Encoding: chunked)";
    let error = ApiError::new(ErrorCode::InvalidRequest, text).hint("send it with Content-Length");
    let text = serde_json::to_vec(&error).unwrap_or_default().into();
    let answer = response(&error).set_body(HangUp {
        text: Some(text),
        _unread: unread,
    });
    request.into_response(answer.map_into_boxed_body())
}

/// A response after which the server closes the connection. It holds the request's body: without
/// that, the server would read the rest of a chunked request to its end, however long.
struct HangUp {
    text: Option<Bytes>,
    _unread: Box<Payload>,
}

impl MessageBody for HangUp {
    type Error = std::convert::Infallible;

    fn size(&self) -> BodySize {
        BodySize::Sized(self.text.as_ref().map_or(0, |text| text.len() as u64))
    }

    fn poll_next(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Self::Error>>> {
        Poll::Ready(self.get_mut().text.take().map(Ok))
    }
}

pub(super) fn too_slow() -> Error {
    let text = format!("no whole request, or no answer to it, within {ANSWER_TIMEOUT:?}");
    refuse(ApiError::new(ErrorCode::Timeout, text).hint("send the whole request at once"))
}

pub(super) async fn no_such_path(request: HttpRequest) -> impl Responder {
    let (method, path) = (
        request.method(),
        request.path().chars().take(200).collect::<String>(),
    );
    let text = format!("there is no {method} {path}");
    response(
        &ApiError::new(ErrorCode::NotFound, text).hint("GET /v1/openapi.json lists what there is"),
    )
}
