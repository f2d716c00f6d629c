//! How results and refusals become HTTP.

use actix::MailboxError;
use actix_web::error::{Error, InternalError, JsonPayloadError};
use actix_web::http::StatusCode;
use actix_web::{HttpRequest, HttpResponse, Responder};
use kmorph_control_api::{ApiError, ErrorCode, REQUEST_BODY_MAX_BYTES};
use serde::Serialize;

/// A refusal as a response.
pub(super) fn response(error: &ApiError) -> HttpResponse {
    let status =
        StatusCode::from_u16(error.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    HttpResponse::build(status).json(error)
}

pub(super) fn refuse(error: ApiError) -> Error {
    let response = response(&error);
    InternalError::from_response(error, response).into()
}

/// A result as a response.
pub(super) fn answer<T: Serialize>(result: Result<T, ApiError>) -> HttpResponse {
    match result {
        Ok(value) => HttpResponse::Ok().json(value),
        Err(error) => response(&error),
    }
}

/// An actor that did not answer.
pub(super) fn actor_gone(_: MailboxError) -> ApiError {
    ApiError::new(ErrorCode::Busy, "the actor asked is being replaced")
        .hint("try again in a moment")
}

pub(super) fn bad_body(error: JsonPayloadError) -> Error {
    let too_large = matches!(
        error,
        JsonPayloadError::OverflowKnownLength { .. } | JsonPayloadError::Overflow { .. }
    );
    let (code, text) = if too_large {
        let text = format!("the request is larger than {REQUEST_BODY_MAX_BYTES} bytes");
        (ErrorCode::TooLarge, text)
    } else {
        (
            ErrorCode::InvalidRequest,
            format!("the request does not parse: {error}"),
        )
    };
    refuse(ApiError::new(code, text))
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
